"""A small export as the frozen model writes it, and a real MLflow registry that knows it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.settings import Settings
from hllm.work.artifacts import Manifest, digest_of, file_digests

WIDTH = 8
ODD_IDS = ["a b", "o'hara", 'quo"te', "new\nline", "\N{ROCKET}", "0042", "naïve"]


def settings_for(folder: Path, **feast: Any) -> Settings:
    return Settings.model_validate(
        {
            "run": {"root": str(folder / "root")},
            "mlflow": {
                "tracking_uri": f"sqlite:///{folder}/mlflow.db",
                "artifact_root": str(folder / "artifacts"),
            },
            "feast": {
                "registry": str(folder / "feast" / "registry.db"),
                "online_url": str(folder / "feast" / "online.db"),
                "offline_path": str(folder / "feast" / "offline"),
                "write_batch_rows": 16,
                **feast,
            },
        }
    )


def vectors(rows: int, seed: int, width: int = WIDTH) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def write_export(
    folder: Path, users: int = 60, items: int = 40, seed: int = 0, width: int = WIDTH, spoil: Any = None
) -> Path:
    """Two shards of users and one of items, with ids that are hard to quote; `spoil` edits the vectors."""
    folder.mkdir(parents=True)
    user_vectors, item_vectors = vectors(users, seed, width), vectors(items, seed + 1, width)
    if spoil:
        spoil(user_vectors, item_vectors)
    user_ids = [*ODD_IDS, *(f"u{row}" for row in range(len(ODD_IDS), users))]
    item_ids = [*ODD_IDS, *(f"i{row}" for row in range(len(ODD_IDS), items))]
    parquet.write_table(
        pa.table({"item_id": item_ids, "vector": _column(item_vectors)}), folder / "items.parquet"
    )
    half = users // 2
    for shard, part in enumerate((slice(0, half), slice(half, users))):
        table = {
            "user_id": user_ids[part],
            "vector": _column(user_vectors[part]),
            "events": pa.array(range(users)[part], pa.int64()),
            "last_event_time": pa.array([1_000_000_000 + row for row in range(users)[part]], pa.int64()),
        }
        parquet.write_table(pa.table(table), folder / f"users-{shard:05d}.parquet")
    files = file_digests(folder)
    Manifest(
        step=folder.parent.name,
        key=folder.name,
        settings_digest="",
        code_version="",
        created_at="2026-01-01T00:00:00+00:00",
        seconds=0.0,
        digest=digest_of(files),
        rows={"users": users, "items": items},
        facts={"width": width, "family": "hllm", "as_of": "2001-09-09T01:46:40+00:00"},
        files=files,
    ).write(folder)
    return folder


def register(settings: Settings, export: Path) -> int:
    """A version in a real registry, as `hllm register` leaves it."""
    from mlflow.exceptions import MlflowException

    from hllm.work.mlflow import client

    prepared_registry(settings)
    registry, model = client(settings), settings.mlflow.model_name
    export = linked(settings, export)
    with contextlib.suppress(MlflowException):  # an earlier version made it
        registry.create_registered_model(model)
    pipeline = {"pipeline": export.name, "export": str(export)}
    tags = {"gate": "passed", "publication": "absent", **pipeline}
    return int(registry.create_model_version(model, source=str(export), tags=tags).version)


def linked(settings: Settings, output: Path) -> Path:
    """An output made elsewhere, under the root of these settings."""
    place = Path(settings.run.root) / output.parent.name / output.name
    if place != output and not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(output)
    return place


def prepared_registry(settings: Settings) -> None:
    """The settings' MLflow database, with its tables, if it is not there yet."""
    database = Path(settings.mlflow.tracking_uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists():
        shutil.copy(_empty_registry(), database)


@functools.cache
def _empty_registry() -> Path:
    """MLflow takes seconds to make its tables: once for all tests."""
    from hllm.work.mlflow import client

    folder = Path(tempfile.mkdtemp(prefix="hllm-empty-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = settings_for(folder)
    client(settings).search_registered_models()
    return folder / "mlflow.db"


def tags_of(settings: Settings, version: int) -> dict[str, str]:
    from hllm.registry.versions import registered_version

    return registered_version(settings, str(version)).tags


def online(settings: Settings, version: int, pairs: list[tuple[str, str]]) -> dict[str, list[Any]]:
    """What a ranking request reads."""
    from hllm.features.store import open_store

    store = open_store(settings)
    rows = [{"user_id": user, "item_id": item} for user, item in pairs]
    service = store.get_feature_service(f"hllm_v{version}")
    return store.get_online_features(features=service, entity_rows=rows).to_dict()


def _column(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
