"""The processes behind `make demo` and `make ui`: started on loopback, ended by their ids."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from hllm.errors import ConfigError, InfraError
from hllm.settings import Settings
from hllm.work.artifacts import write_atomically

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
MLFLOW_PORT = 5000
"""Where `make ui` shows MLflow, when it is free."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks loopback, past whatever proxy this machine uses."""
START_SECONDS = 180.0
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Airflow:
    """A running Airflow: where it is, and who started it. Kept in its home, for the next command to find."""

    url: str
    home: str
    pid: int
    started: float

    @property
    def passwords(self) -> Path:
        return Path(self.home, "passwords.json")


class Processes:
    """Processes of ours, each the head of its own session, all stopped at the end whatever happens."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._record = self.logs / f"{os.getpid()}.json"

    def start(self, name: str, argv: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running[name] = process
        record = {
            "owner": _identity(os.getpid()),
            "started": [_identity(each.pid) for each in self._running.values()],
        }
        write_atomically(self._record, json.dumps(record).encode())
        return process

    def check(self) -> None:
        """
        Raises:
            InfraError: one of them has ended, with the end of its log.
        """
        for name, process in self._running.items():
            code = process.poll()
            if code is not None:
                tail = self._log(name).read_text("utf-8", "replace").splitlines()[-8:]
                raise InfraError(f"{name} ended with {code}", where=self._log(name), remedy="\n  ".join(tail))

    def wait_for(self, what: str, ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise InfraError(
                    f"{what} did not answer within {seconds:.0f} s",
                    where=self.logs,
                    remedy="The logs there say why.",
                )
            time.sleep(0.2)

    def stop(self) -> None:
        end([process.pid for process in self._running.values()])
        self._running.clear()
        self._record.unlink(missing_ok=True)

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def end(pids: list[int]) -> None:
    """Children first noted, then all asked to end, then made to: steps get the time for a checkpoint."""
    family: dict[int, psutil.Process] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            head = psutil.Process(pid)
            family.update({each.pid: each for each in (head, *head.children(recursive=True))})
    for act, seconds in ((psutil.Process.terminate, STOP_SECONDS), (psutil.Process.kill, 5.0)):
        for each in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                act(each)
        _, alive = psutil.wait_procs(list(family.values()), timeout=seconds)
        family = {each.pid: each for each in alive}


def end_leftovers(logs: Path) -> int:
    """End what a killed `make demo` or `make ui` could not end itself; how many processes that were."""
    ended = 0
    for record in logs.glob("*.json"):
        found = json.loads(record.read_text("utf-8"))
        if not _lives(found["owner"]):
            left = [pid for pid, started in found["started"] if _lives((pid, started))]
            end(left)
            ended += len(left)
            record.unlink(missing_ok=True)
    return ended


@contextlib.contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """Processes that end with the block: at its end, on an error, on Ctrl-C and on SIGTERM."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    found, before = Processes(logs), signal.signal(signal.SIGTERM, interrupted)
    try:
        yield found
    finally:
        # A second Ctrl-C must not leave anything behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            found.stop()
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGINT, signal.default_int_handler)


def start_airflow(
    group: Processes,
    settings: Settings,
    config: str,
    home: Path,
    wish: int = 8080,
    own: Mapping[str, str] | None = None,
) -> Airflow:
    """Airflow as it is in production, small: web server, scheduler with its workers, DAG processor.

    A triggerer only where steps are pods: approvals wait without one since Airflow 3.3, and nothing else
    defers. `own`: what its environment has besides.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port(wish)
    url = f"http://{HOST}:{port}"
    _write_passwords(home / "passwords.json", settings)
    environment = {**airflow_environment(settings, config, home, url), **(own or {})}
    _migrate(home, environment)
    airflow = [sys.executable, "-m", "airflow"]
    group.start(
        "airflow-api-server", [*airflow, "api-server", "--host", HOST, "--port", str(port)], environment
    )
    group.start("airflow-dag-processor", [*airflow, "dag-processor"], environment)
    # Its workers' log server would listen on every interface; the web server reads the log files itself.
    group.start("airflow-scheduler", [*airflow, "scheduler", "--skip-serve-logs"], environment)
    if settings.runner.kind == "kubernetes":
        group.start("airflow-triggerer", [*airflow, "triggerer", "--skip-serve-logs"], environment)
    group.wait_for("Airflow", lambda: _healthy(url))
    running = Airflow(url, str(home), *_identity(os.getpid()))
    write_atomically(home / "running.json", json.dumps(asdict(running)).encode())
    return running


def running_airflow(home: Path) -> Airflow | None:
    """The Airflow that a living `make ui` or `make demo` started in this home."""
    try:
        found = Airflow(**json.loads((home / "running.json").read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return found if _lives((found.pid, found.started)) and _healthy(found.url) else None


def start_mlflow(group: Processes, settings: Settings, wish: int = MLFLOW_PORT) -> str:
    """MLflow's pages over the store that the settings name; a server that exists already is only named."""
    store = os.environ.get("MLFLOW_TRACKING_URI") or settings.mlflow.tracking_uri
    if store.startswith(("http://", "https://")):
        return store
    port = free_port(wish)
    url = f"http://{HOST}:{port}"
    argv = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    argv += [
        "--backend-store-uri",
        store,
        "--default-artifact-root",
        str((ROOT / settings.mlflow.artifact_root).resolve()),
    ]
    group.start("mlflow-server", argv, {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
    group.wait_for("MLflow", lambda: _answers(f"{url}/health"))
    return url


def airflow_environment(settings: Settings, config: str, home: Path, url: str) -> dict[str, str]:
    """Everything that makes a bare Airflow this one. Its secrets are made once, for their owner to read."""
    key = _secret(home / "secret")
    airflow = {
        "CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": str(max(2, settings.runner.parallel_steps)),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{name}:admin" for name in _users(settings)),
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "API__BASE_URL": url,
        "API__SECRET_KEY": key,
        "API__WORKERS": "1",
        "API_AUTH__JWT_SECRET": key,
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
        # DAG files do not change while a demo runs; parsing them again would take a core from training.
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "120",
        "DAG_PROCESSOR__REFRESH_INTERVAL": "60",
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
        # How soon the end of a task's process is seen.
        "WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
        "USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")}
    return {
        **inherited,
        **{f"AIRFLOW__{name}": value for name, value in airflow.items()},
        "AIRFLOW_HOME": str(home),
        "HLLM_CONFIG": config,
        # The triggerer imports from there what the DAGs' tasks wait with.
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT / "dags")))),
        # The parts of Airflow speak to each other over loopback, whatever proxy this machine uses.
        "no_proxy": ",".join(filter(None, (os.environ.get("no_proxy"), HOST))),
    }


def free_port(wish: int) -> int:
    """The wished port of loopback, or the next free one."""
    for port in range(wish, wish + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise InfraError(f"no free port between {wish} and {wish + 49}", where=HOST)


def _identity(pid: int) -> tuple[int, float]:
    """A process id alone may have been given to somebody else since."""
    return pid, psutil.Process(pid).create_time()


def _lives(identity: tuple[int, float]) -> bool:
    try:
        return psutil.Process(identity[0]).create_time() == identity[1]
    except psutil.NoSuchProcess:
        return False


def _users(settings: Settings) -> list[str]:
    """A person, and the name that automatic approvals are recorded under."""
    name = settings.release.approved_by
    if any(character in name for character in ",:") or not name.strip():
        raise ConfigError(
            f"must be a name without commas and colons, got {name!r}", where="release.approved_by"
        )
    return list(dict.fromkeys(("admin", name)))


def _write_passwords(path: Path, settings: Settings) -> None:
    """Airflow's simple login wants a file of passwords; random ones, for loopback."""
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.touch(mode=0o600)
    path.write_text(
        json.dumps({name: known.get(name) or secrets.token_urlsafe(12) for name in _users(settings)}), "utf-8"
    )


def _secret(path: Path) -> str:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(48), "utf-8")
    return path.read_text("utf-8")


def _migrate(home: Path, environment: dict[str, str]) -> None:
    """Airflow's tables; once per Airflow version, because looking takes ten seconds."""
    from importlib.metadata import version

    stamp, wanted = home / "migrated", version("apache-airflow")
    if stamp.exists() and stamp.read_text("utf-8") == wanted and (home / "airflow.db").exists():
        return
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InfraError(
            "airflow db migrate failed",
            where=home,
            remedy="\n  ".join((done.stdout + done.stderr).strip().splitlines()[-8:]),
        )
    stamp.write_text(wanted, "utf-8")


def _healthy(url: str) -> bool:
    """The web server answers, and the scheduler and the DAG processor have reported."""
    try:
        with DIRECT.open(f"{url}/api/v2/monitor/health", timeout=5) as answer:
            health = json.load(answer)
    except (OSError, ValueError):
        return False
    return all(
        health.get(part, {}).get("status") == "healthy"
        for part in ("metadatabase", "scheduler", "dag_processor")
    )


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
