"""What MLflow remembers of a pipeline: one parent run per pipeline, a child run per execution of a step, from
the log that was read to the alias that moved.

Separate processes (and machines) find the same parent by its tag `hllm.pipeline`. Curves are buffered and
sent by a thread every few seconds, so training never waits for MLflow. A server that is away when a step
starts stops the step (nothing is lost yet); one that goes away later only costs the record, never the work:
the curves are in the output's `curves.jsonl`, and `hllm register` completes the parent from the manifests.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hllm.errors import ConfigError, Terminated
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work.artifacts import Manifest, Store
from hllm.work.costs import Meter

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    from hllm.registry.versions import VersionInfo

FLUSH_SECONDS = 3.0
SYSTEM_SECONDS = 5.0
AWAY_SECONDS = 30.0
"""How long a finished step waits for a server that does not answer before it goes on without."""
_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
PARENT_TAG = "mlflow.parentRunId"
OUTPUT_TAG = "hllm.output."
"""Of a pipeline's run: the key of each step's output."""
_CONTEXT_TAG = "mlflow.data.context"
_LAST_STEPS = {
    *("evaluate", "register", "publish", "verify", "promote"),
    *("refresh-users", "refresh-items", "backfill", "retire"),
}
"""Steps after which the pipeline may stand still, for a person's decision or for good."""


@contextmanager
def child_run(
    settings: Settings, pipeline_key: str, step_name: str, step_settings: Mapping[str, Any], parent: str = ""
) -> Iterator[Tracker]:
    """The child run of one step execution; ends FINISHED, or FAILED or KILLED when the step stops.

    `parent` names the pipeline's run where it is known; otherwise it is found by the pipeline's key, or made.

    Raises:
        InfraError: MLflow does not answer.
    """
    client = server.client(settings)
    with server.mlflow_errors(settings):
        parent = parent or parent_run(client, settings, pipeline_key)
        run_id = _start(client, settings, parent, step_name, step_settings)
    tracker = Tracker(client, settings, parent, run_id, step_name)
    tracker.start()
    try:
        yield tracker
    except BaseException as error:
        stopped = isinstance(error, (Terminated, KeyboardInterrupt))
        reason = "stopped by a signal" if stopped else (str(error) or type(error).__name__)
        tracker.end("KILLED" if stopped else "FAILED", reason.splitlines()[0])
        raise
    tracker.end("FINISHED")


@contextmanager
def version_run(
    settings: Settings, info: VersionInfo, step_name: str, step_settings: Mapping[str, Any]
) -> Iterator[Tracker]:
    """The child run of a step that acts on a registered version, under the run that the version came from.

    Raises:
        InfraError: MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    parent = ""
    with server.mlflow_errors(settings), contextlib.suppress(MlflowException):  # somebody may have deleted it
        run = server.client(settings).get_run(info.run_id)
        parent = info.run_id if run.info.lifecycle_stage == "active" else ""
    pipeline = info.tags.get("pipeline", f"{info.model} version {info.version}")
    decides = {"version": info.version, **step_settings}
    with child_run(settings, pipeline, step_name, decides, parent) as tracker:
        yield tracker


def finish_lost(settings: Settings, info: VersionInfo, step_name: str, manifest: Manifest) -> None:
    """Runs of a step on a version that say RUNNING although its work is done: their process was killed after
    it had written the manifest. They get what it would have logged."""
    client = server.client(settings)
    with server.mlflow_errors(settings):
        parents = [info.run_id] if info.run_id else []
        found = find_parent(
            client, settings, info.tags.get("pipeline", f"{info.model} version {info.version}")
        )
        for parent in dict.fromkeys([*parents, *([found] if found else [])]):
            experiment = _experiment_of(client, parent)
            own = f"tags.`{PARENT_TAG}` = '{parent}' AND tags.`hllm.step` = '{step_name}'"
            running = f"{own} AND attributes.status = 'RUNNING'"
            for run in client.search_runs([experiment], running) if experiment else ():
                tracker = Tracker(client, settings, parent, run.info.run_id, step_name)
                tracker.start()
                tracker.finish(manifest)
                tracker.end("FINISHED")


def _experiment_of(client: MlflowClient, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run_id).info.experiment_id)
    except MlflowException:
        return ""


def parent_run(client: MlflowClient, settings: Settings, pipeline_key: str) -> str:
    """The id of the pipeline's parent run; created on first use, exactly once."""
    with server.local_lock(server.tracking_uri(settings)):
        experiment = _experiment(client, settings)
        found = _parents(client, experiment, pipeline_key)
        if found:
            return found[0]
        tags = {
            "hllm.pipeline": pipeline_key,
            "hllm.root": settings.run.root,
            "hllm.family": settings.model.family,
        }
        created = client.create_run(experiment, run_name=f"{settings.run.name} {pipeline_key[:8]}", tags=tags)
        # Without a common lock (a server), two steps may both have seen nothing: the earliest run wins.
        first = _parents(client, experiment, pipeline_key)[0]
        if first != created.info.run_id:
            client.delete_run(created.info.run_id)
        return first


def find_parent(client: MlflowClient, settings: Settings, pipeline_key: str) -> str | None:
    experiment = client.get_experiment_by_name(settings.run.name)
    found = _parents(client, experiment.experiment_id, pipeline_key) if experiment else []
    return found[0] if found else None


def log_dataset(client: MlflowClient, run_id: str, manifest: Manifest, settings: Settings) -> None:
    """The data set as a logged input: name, digest, where it lies, and its size."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    location = Store(settings.run.root).location(manifest.step, manifest.key)
    source = settings.data.path or settings.data.interactions or settings.data.source
    dataset = Dataset(
        name=f"{settings.run.name} {manifest.step}",
        digest=manifest.digest[:32],
        source_type="hllm",
        source=json.dumps({"uri": location, "from": source}),
        profile=json.dumps({**manifest.rows, **_plain(manifest.facts)})[:16_000],
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(_CONTEXT_TAG, "training")])])


def headline_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """`hllm-2/ndcg_at_10` and so on: the headline numbers of every model in an evaluation's metrics.json."""
    mode = metrics["headline"]
    figures = {label: entry["overall"][mode] for label, entry in metrics["models"].items()}
    for label, found in metrics.get("labelled", {}).get("models", {}).items():
        figures[label] = figures.get(label, {}) | found
    return {
        f"{label}/{name}": float(number["value"])
        for label, found in figures.items()
        for name, number in found.items()
    }


class Tracker:
    """The running child: takes points of curves at any rate, and the manifest at the end."""

    def __init__(self, client: MlflowClient, settings: Settings, parent: str, run_id: str, step: str) -> None:
        self.client, self.settings, self.parent, self.run_id, self.step = (
            client,
            settings,
            parent,
            run_id,
            step,
        )
        self._buffer: list[Metric] = []
        self._buffer_lock = threading.Lock()
        self._sending = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_regularly, name="mlflow-metrics", daemon=True)
        self._system: Any = None
        self._warned = False
        self._meter = Meter()

    def start(self) -> None:
        self._thread.start()
        if self.settings.mlflow.keep_system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            uri = server.tracking_uri(self.settings)
            self._system = SystemMetricsMonitor(
                self.run_id, sampling_interval=SYSTEM_SECONDS, tracking_uri=uri
            )
            self._system.start()

    def log_metrics(self, values: Mapping[str, float], at: int = 0) -> None:
        """One point of each curve; returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(metric_name(name), float(value), now, at) for name, value in values.items()]
        with self._buffer_lock:
            self._buffer.extend(points)

    def belongs_to(self, keys: Mapping[str, str]) -> None:
        """The pipeline's run names all of its outputs: `hllm prune` keeps those of one at work.

        Raises:
            ConfigError, InfraError: MLflow does not take it; nothing would keep the inputs while they are
                read.
        """
        tags = {f"{OUTPUT_TAG}{step}": key for step, key in keys.items()}
        with server.mlflow_errors(self.settings):
            log_tags(self.client, self.parent, tags)

    def finish(self, manifest: Manifest) -> None:
        """Row counts and numbers as metrics, other facts as tags, the data set as an input."""
        facts = _plain(manifest.facts)
        numbers = {f"rows.{name}": float(count) for name, count in manifest.rows.items()}
        numbers |= {name: float(value) for name, value in facts.items() if _is_number(value)}
        self.log_metrics(numbers | {"seconds": manifest.seconds})
        location = Store(self.settings.run.root).location(manifest.step, manifest.key)
        tags = {"hllm.output": location, "hllm.digest": manifest.digest, "hllm.code": manifest.code_version}
        tags |= {f"hllm.fact.{name}": text(value) for name, value in facts.items() if not _is_number(value)}
        self._attempt(lambda: self._record(manifest, tags))

    def note(self, tags: Mapping[str, str]) -> None:
        """What else the run says of itself."""
        self._attempt(lambda: log_tags(self.client, self.run_id, tags))

    def end(self, status: str, reason: str = "") -> None:
        self._stopping.set()
        self._thread.join()
        self._attempt(lambda: self._close(status, reason))

    def _record(self, manifest: Manifest, tags: Mapping[str, str]) -> None:
        log_tags(self.client, self.run_id, tags)
        if manifest.step in {"ingest", "prepare"}:
            log_dataset(self.client, self.run_id, manifest, self.settings)
        if manifest.step == "prepare":
            log_dataset(self.client, self.parent, manifest, self.settings)
        if manifest.step == "evaluate":
            self._log_headline(manifest)

    def _close(self, status: str, reason: str) -> None:
        self._end_system_metrics()
        self.log_metrics(self._meter.usage())  # of a try that failed too: it has been paid for
        self._send()
        if reason:
            self.client.set_tag(self.run_id, "hllm.error", reason[:1000])
        self.client.set_terminated(self.run_id, status)
        if status != "FINISHED" or self.step in _LAST_STEPS:
            self.client.set_terminated(self.parent, status)

    def _log_headline(self, manifest: Manifest) -> None:
        path = Store(self.settings.run.root).folder(manifest.step, manifest.key) / "metrics.json"
        log_metrics_now(self.client, self.parent, headline_metrics(json.loads(path.read_text("utf-8"))))

    def _end_system_metrics(self) -> None:
        if self._system is None:
            return
        self._system.finish()
        # A step shorter than the sampling interval gets its one sample too.
        self._system.collect_metrics()
        self._system.publish_metrics(self._system.aggregate_metrics())
        self._system.mlflow_logger.flush()

    def _send_regularly(self) -> None:
        while not self._stopping.wait(FLUSH_SECONDS):
            # Points stay buffered while the server is away: the next round sends them.
            with contextlib.suppress(Exception):
                server.wait_for(self.settings, seconds=0)
                self._send()

    def _send(self) -> None:
        with self._sending:
            while True:
                with self._buffer_lock:
                    batch = self._buffer[:_METRICS_PER_REQUEST]
                if not batch:
                    return
                self.client.log_batch(self.run_id, metrics=batch)
                with self._buffer_lock:
                    del self._buffer[: len(batch)]

    def _attempt(self, act: Callable[[], None]) -> None:
        """The work is done by now: a server that stays away costs its record, never the work."""
        try:
            server.wait_for(self.settings, AWAY_SECONDS)
            act()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            uri = server.shown(server.tracking_uri(self.settings))
            first = (str(error) or repr(error)).splitlines()[0]
            message = (
                f"{uri}: the record of {self.step} is incomplete ({first[:200]}); its output is not affected"
            )
            print(f"warning: {message}", file=sys.stderr)


def log_metrics_now(client: MlflowClient, run_id: str, values: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(metric_name(name), float(value), now, 0) for name, value in values.items()]
    client.log_batch(run_id, metrics=metrics)


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [Param(metric_name(name), value) for name, value in values.items()]
    for first in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[first : first + _PARAMS_PER_REQUEST])


def log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(metric_name(name), value) for name, value in tags.items()])


def metric_name(name: str) -> str:
    """MLflow allows letters, digits and a few signs, `@` not among them."""
    name = name.replace("@", "_at_")
    return "".join(sign if sign.isalnum() or sign in "_-. :/" else "_" for sign in name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"data": {"path": "x"}}` -> `{"data.path": "x"}`."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = text(value)
    return found


def text(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return shown[:5000] if shown else '""'


def _experiment(client: MlflowClient, settings: Settings) -> str:
    from mlflow.exceptions import MlflowException

    name = settings.run.name
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=server.artifact_location(settings))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        remedy = "Restore it in the MLflow page, or give the pipeline another name."
        raise ConfigError(f"the MLflow experiment {name} has been deleted", where="run.name", remedy=remedy)
    return str(experiment.experiment_id)


def _parents(client: MlflowClient, experiment: str, pipeline_key: str) -> list[str]:
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    runs = client.search_runs([experiment], f"tags.`hllm.pipeline` = '{pipeline_key}'", order_by=order)
    return [run.info.run_id for run in runs]


def _start(
    client: MlflowClient, settings: Settings, parent: str, step_name: str, step_settings: Mapping[str, Any]
) -> str:
    parent_info = client.get_run(parent).info
    own = f"tags.`{PARENT_TAG}` = '{parent}' AND tags.`hllm.step` = '{step_name}'"
    # An output has one writer, so a run of this step that still says RUNNING lost its process.
    for dead in client.search_runs([parent_info.experiment_id], f"{own} AND attributes.status = 'RUNNING'"):
        client.set_tag(dead.info.run_id, "hllm.error", "the process disappeared; a later run continued")
        client.set_terminated(dead.info.run_id, "KILLED")
    if parent_info.status != "RUNNING":
        client.update_run(parent, status="RUNNING")
    tags = {PARENT_TAG: parent, "hllm.step": step_name}
    run_id = client.create_run(parent_info.experiment_id, run_name=step_name, tags=tags).info.run_id
    log_params(client, run_id, flatten(step_settings))
    return str(run_id)


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts as `outer/inner`, values as they are."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": leaf for inner, leaf in _plain(value).items()}
        else:
            found[name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
