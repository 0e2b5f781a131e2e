"""A real MLflow for every test: SQLite from a migrated copy, and one real server for those that need HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hllm.settings import Mlflow, Run, Settings
from tests.conftest import free_port


@pytest.fixture(autouse=True)
def _no_server_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a test, and after it: MLflow writes the address it was given into the environment."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def settings(tmp_path: Path, migrated: Path) -> Settings:
    database = tmp_path / "mlflow.db"
    shutil.copy(migrated, database)
    return Settings(
        run=Run(name="shop", root=str(tmp_path / "runs"), threads=1),
        mlflow=Mlflow(
            tracking_uri=f"sqlite:///{database}",
            artifact_root=str(tmp_path / "art"),
            keep_system_metrics=False,
        ),
    )


class Server:
    """`mlflow server` in its own process group on a free port of the loopback."""

    def __init__(self, folder: Path, database: Path) -> None:
        shutil.copy(database, folder / "server.db")
        self.uri = f"http://127.0.0.1:{free_port()}"
        argv = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2]]
        argv += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        argv += ["--artifacts-destination", str(folder / "artifacts")]
        self.log = (folder / "server.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, *argv], stdout=self.log, stderr=self.log, cwd=folder, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while not self._listens():
            assert self.process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.1)

    def _listens(self) -> bool:
        import requests

        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self.log.close()


@pytest.fixture(scope="session")
def _servers(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Callable[[], Server]]:
    started: list[Server] = []

    def running() -> Server:
        if not started or started[-1].process.poll() is not None:
            started.append(Server(tmp_path_factory.mktemp("server"), migrated))
        return started[-1]

    yield running
    for one in started:
        one.stop()


@pytest.fixture
def mlflow_server(_servers: Callable[[], Server]) -> Server:
    """Starting one takes ten seconds, so tests share it; one that a test has stopped is replaced."""
    return _servers()
