"""What MLflow knows of outputs: from which ones, by which settings, a registered version was made; and which
ones pipelines at work may still read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm.errors import ConfigError, DataError, HLLMError
from hllm.registry.versions import OUTPUT_NAME, VersionInfo, place_of
from hllm.settings import Settings
from hllm.settings.keys import renamed
from hllm.work import mlflow as server
from hllm.work.artifacts import Store
from hllm.work.objects import list_objects, read_object
from hllm.work.tracking import OUTPUT_TAG, PARENT_TAG, flatten, metric_name, text

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

Output = tuple[str, str]
"""A step and the key of its output."""


def output_of(settings: Settings, info: VersionInfo, step: str) -> Path:
    """The folder of a step's output in the pipeline that made a version, fetched if it lies in S3.

    Raises:
        DataError: MLflow does not know it, or it was deleted.
    """
    with server.mlflow_errors(settings):
        run = server.client(settings).get_run(info.run_id)
    key = run.data.tags.get(f"{OUTPUT_TAG}{step}")
    if key is None:
        raise DataError(f"has no record of its step {step}", where=f"{info.model} version {info.version}")
    info.output(settings)  # of these settings' root, or of no use
    if not OUTPUT_NAME.fullmatch(key):
        raise DataError(
            f"its record of the step {step} is no key: {key[:100]!r}",
            where=f"{info.model} version {info.version}",
        )
    return Store(settings.run.root).fetch(step, key)


def require_same_settings(settings: Settings, info: VersionInfo, names: Iterable[str]) -> None:
    """The settings at hand say of these what the version was trained with.

    Raises:
        ConfigError: one is another.
    """
    with server.mlflow_errors(settings):
        recorded = server.client(settings).get_run(info.run_id).data.params
    recorded = _in_todays_names(recorded)
    for dotted in names:
        value = settings.at(dotted)
        value = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, said in flatten({dotted: value}).items():
            was = recorded.get(metric_name(name))
            if was is None:
                raise DataError(
                    f"there is no record of the {name} it was trained with",
                    where=f"{info.model} version {info.version}, run {info.run_id}",
                    remedy="It was registered by another release: train and register it again.",
                )
            if was != text(said):
                raise ConfigError(
                    f"{name} is {said}, version {info.version} of {info.model} was trained with {was}",
                    remedy="Its model reads texts as in its training: use the settings file of that version.",
                )


def _in_todays_names(recorded: Mapping[str, str]) -> dict[str, str]:
    """Recorded settings, also by what they are called now: earlier releases had other names."""
    found = dict(recorded)
    for name, value in recorded.items():
        for now in renamed(name):
            found.setdefault(metric_name(now), value)
    return found


def outputs_of_versions(settings: Settings) -> set[Output]:
    """All that registered versions were made from: those of every model in MLflow, and those that were ever
    registered from these outputs, until the version and its run are deleted in MLflow.

    Raises:
        ConfigError: MLflow does not know one of the versions of these outputs, or not what it was made from.
        DataError: the record of a version is damaged.
    """
    client, store = server.client(settings), Store(settings.run.root)
    here = {each["run_id"]: f"{each['model']} version {each['version']}" for each in _records(store)}
    found: set[Output] = set()
    with server.mlflow_errors(settings):
        versions = _all(partial(client.search_model_versions, ""))
        every = [each for each in versions if {"pipeline", "export"} <= each.tags.keys()]
        known = {each.run_id: f"{each.name} version {each.version}" for each in every}
        own = [each for each in every if each.tags["export"].startswith(f"{store.root}/")]
        here |= {each.run_id: f"{each.name} version {each.version}" for each in own}
        for run_id, version in (known | here).items():
            run = _run(client, run_id) if run_id else None  # others register models without one
            if run and run.info.lifecycle_stage == "deleted" and run_id not in known:
                continue
            outputs = _outputs(run) if run else set()
            if not outputs and run_id in here:
                raise ConfigError(
                    f"does not know what {version} was made from (its run {run_id})",
                    where=server.shown(server.tracking_uri(settings)),
                    remedy="Is this the MLflow that these outputs were registered in (MLFLOW_TRACKING_URI)? "
                    "If it is, and the version serves no more (or was registered by an HLLM that did not "
                    f"record this): delete it in MLflow, and its folder in {store.root}/register.",
                )
            found |= outputs
    return found


def require_known(settings: Settings, outputs: Collection[Output]) -> None:
    """Some pipeline in this MLflow has named one of these outputs, under this root: an MLflow that knows
    nothing of them cannot say which of them are at work.

    Raises:
        ConfigError: none has.
    """
    client, place = server.client(settings), place_of(settings.run.root)
    with server.mlflow_errors(settings):
        experiments = [each.experiment_id for each in _all(client.search_experiments)]
        for run in _all(partial(client.search_runs, experiments, "tags.`hllm.root` LIKE '%'")):
            if place_of(run.data.tags["hllm.root"]) == place and not _outputs(run).isdisjoint(outputs):
                return
    raise ConfigError(
        f"no pipeline in it has made any of the outputs in {settings.run.root}",
        where=server.shown(server.tracking_uri(settings)),
        remedy="Name the MLflow that your pipelines use: MLFLOW_TRACKING_URI, or mlflow.tracking_uri. "
        "Pipelines of earlier releases do not count: if it is the right one, run one anew first.",
    )


def outputs_at_work(settings: Settings, since: datetime) -> set[Output]:
    """All that pipelines read and make of which a step runs now, or has ended after `since`."""
    client, parents = server.client(settings), set()
    with server.mlflow_errors(settings):
        experiments = [each.experiment_id for each in _all(client.search_experiments)]
        for state in ("status = 'RUNNING'", f"end_time >= {int(since.timestamp() * 1000)}"):
            condition = f"tags.`hllm.step` LIKE '%' AND attributes.{state}"
            for run in _all(partial(client.search_runs, experiments, condition)):
                parents.add(run.data.tags.get(PARENT_TAG))
        runs = [_run(client, parent) for parent in parents if parent]
    return {output for run in runs if run for output in _outputs(run)}


def end_lost_runs(settings: Settings, since: datetime) -> int:
    """Runs of these outputs' steps that began before `since` and still say RUNNING, although no process holds
    the lock of their output: they were killed, and nobody will run the same again. They end as KILLED; how
    many they were."""
    client, store, ended = server.client(settings), Store(settings.run.root), 0
    with server.mlflow_errors(settings):
        experiments = [each.experiment_id for each in _all(client.search_experiments)]
        began = f"attributes.start_time < {int(since.timestamp() * 1000)}"
        condition = f"tags.`hllm.step` LIKE '%' AND attributes.status = 'RUNNING' AND {began}"
        for run in list(_all(partial(client.search_runs, experiments, condition))):
            parent = _run(client, run.data.tags.get(PARENT_TAG, ""))
            root = parent.data.tags.get("hllm.root") if parent else None
            if parent is None or root is None or place_of(root) != place_of(settings.run.root):
                continue  # of others, whose locks are elsewhere
            step = run.data.tags["hllm.step"]
            with ExitStack() as held:
                key = dict(_outputs(parent)).get(step, "")
                if OUTPUT_NAME.fullmatch(step) and OUTPUT_NAME.fullmatch(key):
                    try:
                        held.enter_context(store.lock(step, key))
                    except HLLMError:
                        continue  # somebody is at work
                client.set_tag(run.info.run_id, "hllm.error", "the process disappeared; nobody ran it again")
                client.set_terminated(run.info.run_id, "KILLED")
                siblings = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}' AND attributes.status = 'RUNNING'"
                if not client.search_runs([parent.info.experiment_id], siblings, max_results=1):
                    client.set_terminated(parent.info.run_id, "KILLED")
                ended += 1
    return ended


def _outputs(run: Run) -> set[Output]:
    tags = run.data.tags.items()
    return {(name.removeprefix(OUTPUT_TAG), key) for name, key in tags if name.startswith(OUTPUT_TAG)}


def _run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _records(store: Store) -> Iterator[dict[str, Any]]:
    """What `hllm register` has left beside the outputs, of every version."""
    if store.remote:
        for place in list_objects(f"{store.root}/register/"):
            if place.endswith("/registered.json") and (content := read_object(place)) is not None:
                yield _record(content, place)
    else:
        for path in (store.local / "register").glob("*/registered.json"):
            yield _record(path.read_bytes(), path)


def _record(content: bytes, where: object) -> dict[str, Any]:
    try:
        record: dict[str, Any] = dict(json.loads(content))
        if {"run_id", "model", "version"} <= record.keys():
            return record
    except (ValueError, TypeError):
        pass
    raise DataError(
        "is damaged: it does not say which version was registered",
        where=where,
        remedy="`hllm register` with the settings of that version writes it anew. If the version is gone for "
        "good, remove the folder.",
    )


def _all(search: Callable[..., Any]) -> Iterator[Any]:
    """Every entry of an answer that comes in pages."""
    page = None
    while True:
        answer = search(page_token=page)
        yield from answer
        page = answer.token
        if not page:
            return
