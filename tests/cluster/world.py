"""A namespace of its own in a real cluster, the services beside it, and a real Airflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from hllm.demo.api import Api
from hllm.demo.services import Processes
from tests.k8s.world import K8S, kubectl, render

REPOSITORY = Path(__file__).parents[2]
OVERLAY = K8S / "overlays" / "local"
CONFIG = "/etc/hllm/hllm.toml"
"""Where pods find their settings."""
WAIT = 600.0
"""Seconds after which something hangs, however busy the machine is."""


def wait_until(what: str, ready: Callable[[], Any], seconds: float = WAIT) -> Any:
    """The first answer that is not false."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.3)
    return found


@dataclass(frozen=True)
class Given:
    """What the caller says of the cluster: tests/cluster/run."""

    image: str
    host: str
    pod: Mapping[str, Any]

    @classmethod
    def read(cls) -> Given:
        pod = os.environ.get("HLLM_CLUSTER_POD")
        return cls(
            os.environ["HLLM_CLUSTER_IMAGE"],
            os.environ["HLLM_CLUSTER_HOST"],
            json.loads(Path(pod).read_text("utf-8")) if pod else {},
        )

    def template(self) -> dict[str, Any]:
        """The overlay's template, and what stands for the ENTRYPOINT and ENV of our image."""
        template: dict[str, Any] = yaml.safe_load((K8S / "base" / "step.yaml").read_text("utf-8"))
        (container,) = template["spec"]["containers"]
        container["command"] = ["dumb-init", "--single-child", "--"]
        container["workingDir"] = "/work"
        own = {"HOME": "/work", "MPLCONFIGDIR": "/tmp/matplotlib", "OMP_NUM_THREADS": "1"}
        own |= {"PYTHONDONTWRITEBYTECODE": "1"}
        if self.pod:
            packages = sysconfig.get_path("purelib")
            own["PYTHONPATH"] = f"{REPOSITORY}:{packages}"
            own["PATH"] = f"{REPOSITORY}/tests/cluster/bin:{sys.prefix}/bin:/usr/bin:/bin"
            container["volumeMounts"] = list(self.pod["volumeMounts"])
            template["spec"]["volumes"] = list(self.pod["volumes"])
        container["env"] = [{"name": name, "value": value} for name, value in own.items()]
        return template


@dataclass
class Namespace:
    """One namespace: `kubectl` in it, and every pod that was ever seen there."""

    name: str
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> the pod as it was last seen."""

    def kubectl(self, *args: str, stdin: str = "") -> str:
        return kubectl("--namespace", self.name, *args, stdin=stdin)

    def apply(self, *manifests: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def secret(self, name: str, values: Mapping[str, str]) -> None:
        self.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": dict(values)}
        )

    def pods(self, dag: str, task: str) -> list[dict[str, Any]]:
        """Every pod that this task has had, by when it was made."""
        found = [
            pod
            for pod in list(self.seen.values())
            if pod["metadata"]["labels"].get("dag_id") == dag
            and pod["metadata"]["labels"].get("task_id") == task
        ]
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def living(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self.kubectl("get", "pods", "-o", "json"))["items"]
        return {pod["metadata"]["name"]: pod for pod in found}

    def running(self, dag: str, task: str) -> str:
        """The name of this task's pod whose command runs now; empty if there is none."""
        for pod in self.pods(dag, task):
            states = [status.get("state", {}) for status in pod["status"].get("containerStatuses", ())]
            if any("running" in state for state in states) and pod["metadata"]["name"] in self.living():
                return str(pod["metadata"]["name"])
        return ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remembers every pod, once a second: succeeded ones are gone before a test asks for them."""
        over = threading.Event()

        def watch() -> None:
            from kubernetes import client, config

            config.load_kube_config(os.environ["KUBECONFIG"])
            api = client.CoreV1Api()
            while not over.wait(1.0):
                for pod in api.list_namespaced_pod(self.name).items:
                    self.seen[pod.metadata.name] = api.api_client.sanitize_for_serialization(pod)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(10)


@contextmanager
def namespace(folder: Path, settings: str, *files: Path) -> Iterator[Namespace]:
    """The overlay `local`, but for its name, its settings (`files` beside them) and how much it may take."""
    name = f"hllm-test-{uuid.uuid4().hex[:8]}"
    (folder / "hllm.toml").write_text(settings.replace(NAMESPACE, name), "utf-8")
    hard = {
        "pods": "20",
        "requests.cpu": "8",
        "requests.memory": "64Gi",
        "limits.cpu": "40",
        "limits.memory": "64Gi",
    }
    quota = [{"op": "replace", "path": "/spec/hard", "value": hard}]
    moved = {
        "namespace": name,
        "resources": [os.path.relpath(OVERLAY, folder)],
        "configMapGenerator": [
            {
                "name": "hllm-settings",
                "behavior": "replace",
                "files": ["hllm.toml", *(file.name for file in files)],
            }
        ],
        "generatorOptions": {"disableNameSuffixHash": True},
        "patches": [
            {"target": {"kind": "ResourceQuota", "name": "hllm-steps"}, "patch": yaml.safe_dump(quota)}
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(moved))
    made = Namespace(name)
    kubectl("create", "namespace", name)
    # The cluster makes it by itself, and `apply` would meet it half-way.
    wait_until("its account", lambda: made.kubectl("get", "serviceaccount", "default", "--ignore-not-found"))
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(render(folder)))
    try:
        with made.watched():
            yield made
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


NAMESPACE = "NAMESPACE-OF-THE-TEST"
"""Stands in the settings for a name that is known only when the namespace is made."""


def airflows_kubeconfig(made: Namespace, path: Path) -> Path:
    """What Airflow would be inside the cluster: the service account `hllm-airflow` and no more."""
    given = yaml.safe_load(kubectl("config", "view", "--minify", "--raw"))
    token = made.kubectl("create", "token", "hllm-airflow", "--duration", "2h").strip()
    given["users"] = [{"name": "hllm-airflow", "user": {"token": token}}]
    given["contexts"][0]["context"] |= {"user": "hllm-airflow", "namespace": made.name}
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(given))
    return path


class Restartable(Processes):
    """Processes, any of which may be killed and started again."""

    def __init__(self, logs: Path) -> None:
        super().__init__(logs)
        self.started: dict[str, tuple[list[str], dict[str, str]]] = {}

    def start(self, name: str, argv: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        self.started[name] = (argv, environment)
        return super().start(name, argv, environment)

    def kill(self, name: str) -> None:
        """It, and every process that it had started, at once and without a word."""
        head = psutil.Process(self._running.pop(name).pid)
        for process in (*head.children(recursive=True), head):
            process.kill()
        head.wait(10)

    def start_again(self, name: str) -> None:
        self.start(name, *self.started[name])


@dataclass
class Run:
    """One run of a DAG with one task of interest."""

    api: Api
    dag: str
    run: str
    task: str

    def state(self) -> str:
        return self.api.task_state(self.dag, self.run, self.task)

    def wait(self, *states: str, seconds: float = WAIT) -> str:
        """The task's state, when it is one of these."""

        def ready() -> str:
            state = self.state()
            if state == "upstream_failed":
                tasks = {task["task_id"]: task["state"] for task in self.api.tasks(self.dag, self.run)}
                raise AssertionError(f"{self.dag}: {tasks}")
            assert state in states or state not in {"success", "failed"}, (
                f"{self.dag}.{self.task} is {state}: {self.log()[-3000:]}"
            )
            return state if state in states else ""

        return str(wait_until(f"{self.dag}.{self.task} {' or '.join(states)}", ready, seconds))

    def log(self, attempt: int = 0) -> str:
        """What Airflow shows of a try: of the last one, if none is named."""
        attempt = attempt or self._tries()
        found = self.api.get(f"{self._path}/logs/{attempt}?full_content=true")
        lines = found["content"] if isinstance(found, dict) else []
        return "\n".join(
            f"{line.get('event', line)} {line.get('error_detail', '')}"
            if isinstance(line, dict)
            else str(line)
            for line in lines
        )

    def every_log(self) -> str:
        """Of all tries, one after another."""
        return "\n".join(self.log(attempt) for attempt in range(1, self._tries() + 1))

    def _tries(self) -> int:
        return max(1, int(self.api.get(self._path)["try_number"]))

    def fail(self) -> None:
        """What a person does who marks the running task as failed."""
        self.api.patch(self._path, {"new_state": "failed"})

    @property
    def _path(self) -> str:
        return f"/api/v2/dags/{self.dag}/dagRuns/{self.run}/taskInstances/{self.task}"


def python(*argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], text=True, capture_output=True, **kwargs)
