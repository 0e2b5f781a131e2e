"""A version that serves, of a real small model, and a log and a catalogue that go on after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from hllm.models.family import family
from hllm.pipeline import export_step, keys, steps
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store
from hllm.work.step import settings_of
from tests import world
from tests.features.world import linked, prepared_registry

DAY = 86_400


def serve(trained: Any, folder: Path, **feast: Any) -> Settings:
    """Version 1 of the session's model: registered with its record, published, verified, champion. Read the
    settings' source files, do not write into them: `changed_source` gives others."""
    from hllm.features.publish import publish
    from hllm.features.verify import verify
    from hllm.registry.promote import promote

    settings = elsewhere(trained.settings, folder, **feast)
    register(settings, trained)
    publish(settings, "1")
    verify(settings, "1")
    promote(settings, "1", by="a test")
    return settings


def elsewhere(settings: Settings, folder: Path, **feast: Any) -> Settings:
    """The same pipeline, with stores and outputs of its own."""
    return Settings.model_validate(
        settings.model_dump()
        | {
            "run": {**settings.run.model_dump(), "root": str(folder / "root")},
            "mlflow": {
                **settings.mlflow.model_dump(),
                "tracking_uri": f"sqlite:///{folder}/mlflow.db",
                "artifact_root": str(folder / "artifacts"),
            },
            "feast": {
                **settings.feast.model_dump(),
                "registry": str(folder / "feast" / "registry.db"),
                "online_url": str(folder / "feast" / "online.db"),
                "offline_path": str(folder / "feast" / "offline"),
                "write_batch_rows": 16,
                **feast,
            },
        }
    )


def register(settings: Settings, trained: Any) -> int:
    """What `hllm register` leaves of a pipeline: a run that knows its outputs, and a version."""
    import contextlib

    from mlflow.exceptions import MlflowException

    from hllm.work import tracking
    from hllm.work.mlflow import client

    prepared_registry(settings)
    registry, found = client(settings), keys(trained.settings)
    pipeline = f"pipeline-{len(registry.search_model_versions())}"
    run = tracking.parent_run(registry, settings, pipeline)
    decided: dict[str, str] = {}
    for step in steps(trained.settings).values():
        decided |= tracking.flatten(settings_of(step, trained.settings))
    tracking.log_params(registry, run, decided)
    tracking.log_tags(registry, run, {f"hllm.output.{name}": key for name, key in found.items()})
    name, model = export_step(family("hllm")), settings.mlflow.model_name
    for step, key in found.items():
        made = Store(trained.settings.run.root).folder(step, key)
        if made.exists():
            linked(settings, made)
    export = Store(settings.run.root).location(name, found[name])
    with contextlib.suppress(MlflowException):
        registry.create_registered_model(model)
    tags = {
        "gate": "passed",
        "publication": "absent",
        "pipeline": pipeline,
        "export": export,
        "family": "hllm",
    }
    return int(registry.create_model_version(model, source=export, run_id=run, tags=tags).version)


def go_on(
    settings: Settings, folder: Path, events: list[tuple[str, str, int]], **items: list[Any]
) -> Settings:
    """The settings with a log and a catalogue that have grown, read and validated."""
    folder.mkdir(parents=True)
    source = world.TinySource(folder / "items.parquet", folder / "interactions.csv", [], events)
    world.write_items(source.items, **items)
    world.write_csv(source.interactions, ["user_id", "item_id", "timestamp"], events)
    data = {"items": str(source.items), "interactions": str(source.interactions)}
    later = settings.model_copy(update={"data": settings.data.model_copy(update=data)})
    world.run_steps(later, "ingest", "validate")
    return later


def catalogue(source: world.TinySource) -> dict[str, list[Any]]:
    return parquet.read_table(source.items).to_pydict()


def read_users(settings: Settings, names: list[str], version: int = 1) -> dict[str, list[Any]]:
    """What is read online of users."""
    return _read(settings, "user", names, version, ("user_vector", "user_model_version", "user_events"))


def read_items(settings: Settings, names: list[str], version: int = 1) -> dict[str, list[Any]]:
    return _read(settings, "item", names, version, ("item_vector", "item_model_version"))


def _read(
    settings: Settings, kind: str, names: list[str], version: int, features: tuple[str, ...]
) -> dict[str, list[Any]]:
    from hllm.features.store import open_store

    wanted = [f"hllm_{kind}_v{version}:{feature}" for feature in features]
    rows = [{f"{kind}_id": name} for name in names]
    return open_store(settings).get_online_features(features=wanted, entity_rows=rows).to_dict()


def manifest_of(settings: Settings, key: str) -> Manifest | None:
    return Store(settings.run.root).manifest("refresh", key)


def vectors_of(trained: Any, histories: list[list[str]]) -> Any:
    """The same model, asked directly."""
    from hllm.embedding.package import Package

    return Package.open(trained["embed-hllm-3"] / "package").user_vectors(histories)


def history(events: list[tuple[str, str, int]], user: str) -> list[str]:
    """Item ids of a user, oldest first; equal times in the file's order."""
    return [item for _, item, _ in sorted((one for one in events if one[0] == user), key=lambda one: one[2])]
