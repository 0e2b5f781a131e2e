"""The export: every id beside its own vector, in shards that a killed run continues."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import hllm.embedding.export as export_module
from hllm.data.prepared import Prepared
from hllm.embedding.export import export
from hllm.embedding.items import ItemVectors
from hllm.embedding.package import Package
from hllm.errors import DataError
from hllm.pipeline import steps
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store, file_digests
from hllm.work.step import Context
from tests.conftest import Trained
from tests.world import TinySource, run_steps, tiny_settings, write_csv, write_items


def context(trained: Trained, output: Path) -> Context:
    step = steps(trained.settings)["embed-hllm-3"]
    inputs = {need: trained[need] for need in step.needs}
    return Context(trained.settings, step, "key", inputs, output, Store(str(output)))


def matrix(table: pa.Table) -> np.ndarray:
    return np.stack(table["vector"].to_numpy())


def users_of(folder: Path) -> pa.Table:
    return pa.concat_tables([parquet.read_table(path) for path in sorted(folder.glob("users-*.parquet"))])


def raw_histories(source: TinySource) -> dict[str, list[tuple[int, str]]]:
    """Straight from the log: (second, item) in time order, ties in the file's order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for user, item, second in source.events:
        found.setdefault(user, []).append((second, item))
    return {user: sorted(events, key=lambda event: event[0]) for user, events in found.items()}


def test_every_item_id_has_its_own_vector(trained: Trained, tiny_source: TinySource):
    table = parquet.read_table(trained["embed-hllm-3"] / "items.parquet")
    ids = Prepared.open(trained["prepare"]).item_table(["item_id"])["item_id"].to_pylist()
    assert sorted(table["item_id"].to_pylist()) == sorted(tiny_source.item_ids)
    vector_of = dict(zip(table["item_id"].to_pylist(), matrix(table), strict=True))
    cached = ItemVectors.open(trained["embed-hllm-1"]).matrix()
    for row, item in enumerate(ids):
        np.testing.assert_array_equal(vector_of[item], cached[row])
        assert np.abs(vector_of[item] - cached[row - 1]).max() > 1e-3  # one row off could not pass
        assert np.linalg.norm(vector_of[item]) == pytest.approx(1, abs=1e-5)


def test_every_user_id_has_the_vector_of_its_own_log(trained: Trained, tiny_source: TinySource):
    table = users_of(trained["embed-hllm-3"])
    histories = raw_histories(tiny_source)
    assert sorted(table["user_id"].to_pylist()) == sorted(histories)
    package = Package.open(trained["embed-hllm-3"] / "package")
    by_log = package.user_vectors(
        [[item for _, item in histories[user.as_py()]] for user in table["user_id"]]
    )
    np.testing.assert_allclose(matrix(table), by_log, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(matrix(table), axis=1), 1, atol=1e-5)
    assert table["events"].to_pylist() == [len(histories[user.as_py()]) for user in table["user_id"]]
    assert table["last_event_time"].to_pylist() == [
        histories[user.as_py()][-1][0] for user in table["user_id"]
    ]


def test_the_columns_are_those_that_publishing_reads(trained: Trained):
    folder = trained["embed-hllm-3"]
    vector = pa.list_(pa.float32(), 32)
    assert parquet.read_schema(folder / "items.parquet").field("vector").type == vector
    assert parquet.read_schema(folder / "users-00000.parquet").field("vector").type == vector
    assert [path.name for path in sorted(folder.glob("users-*"))] == [
        f"users-{n:05d}.parquet" for n in range(3)
    ]
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert manifest.rows == {"items": 60, "users": 40}
    assert manifest.facts["as_of"].endswith("+00:00")
    assert (manifest.facts["width"], manifest.facts["family"]) == (32, "hllm")


def test_a_killed_export_computes_only_the_missing_shard(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "export"
    shutil.copytree(trained["embed-hllm-3"], output)
    whole = file_digests(output)
    (output / "manifest.json").unlink()
    (output / "users-00001.parquet").unlink()
    (output / ".users-00001.parquet").write_bytes(b"half of")
    computed: list[int] = []
    compute = export_module.vectors_of_histories

    def counting(model, items, histories, *more, **named):
        computed.append(len(histories))
        return compute(model, items, histories, *more, **named)

    monkeypatch.setattr(export_module, "vectors_of_histories", counting)
    export(context(trained, output))
    assert computed == [15]
    assert file_digests(output) == whole


def test_item_vectors_of_another_catalogue_are_refused(trained: Trained, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "vectors-00000.npy", ItemVectors.open(trained["embed-hllm-1"]).matrix()[:-1])
    step = context(trained, tmp_path / "export")
    step.output.mkdir()
    step.inputs = {**step.inputs, "embed-hllm-1": other}
    with pytest.raises(DataError, match="59 vectors for 60 items"):
        export(step)


def exported(folder: Path, source: TinySource) -> tuple[Settings, Path]:
    """ID-based, which is the quicker family, and the one that alignment by number would hurt most."""
    settings = tiny_settings(folder, source, **{"model.family": "sasrec", "sasrec.stage1.steps": 1})
    names = ["ingest", "validate", "prepare", "train-sasrec-1", "embed-sasrec-1", "embed-sasrec-3"]
    return settings, run_steps(settings, *names)


def test_integer_ids_in_one_table_and_text_in_the_other_are_the_same_items(
    tmp_path: Path, tiny_source: TinySource
):
    number_of = {item: number for number, item in enumerate(tiny_source.item_ids)}
    items = write_items(
        tmp_path / "items.parquet",
        item_id=list(number_of.values()),
        title=[f"Title {number}" for number in number_of.values()],
        genre=["heist"] * len(number_of),
    )
    events = [(user, f"{number_of[item]}", second) for user, item, second in tiny_source.events]
    log = write_csv(tmp_path / "log.csv", ["user_id", "item_id", "timestamp"], events)
    source = TinySource(items, log, [str(number) for number in number_of.values()], events)
    _, folder = exported(tmp_path / "world", source)
    table = parquet.read_table(folder / "items.parquet")
    assert set(table["item_id"].to_pylist()) == set(source.item_ids)
    assert np.linalg.norm(matrix(table), axis=1).min() > 0.99
    users = users_of(folder)
    assert sum(users["events"].to_pylist()) == len(events)
    assert np.linalg.norm(matrix(users), axis=1).min() > 0.99


def test_users_without_events_are_left_out(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch):
    prepared = tmp_path / "prepared"
    shutil.copytree(trained["prepare"], prepared)
    offsets = np.load(prepared / "user_offsets.npy")
    emptied = np.insert(offsets, 5, offsets[5])  # between the fifth and the sixth user, one who did nothing
    np.save(prepared / "user_offsets.npy", emptied)
    table = parquet.read_table(prepared / "users.parquet", columns=["user_id"])
    ids = table["user_id"].to_pylist()
    parquet.write_table(pa.table({"user_id": [*ids[:5], "idle", *ids[5:]]}), prepared / "users.parquet")
    step = context(trained, tmp_path / "export")
    step.output.mkdir()
    step.inputs = {**step.inputs, "prepare": prepared}
    export(step)
    found, expected = users_of(step.output), users_of(trained["embed-hllm-3"])
    assert found["user_id"].to_pylist() == expected["user_id"].to_pylist()
    np.testing.assert_allclose(matrix(found), matrix(expected), atol=1e-5)
