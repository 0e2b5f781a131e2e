"""Sources and outputs in S3, against a real S3 server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hllm.data.prepared import Prepared
from hllm.data.readers import source_fingerprints
from hllm.errors import DataError, InfraError
from hllm.pipeline import keys
from hllm.settings import Settings
from hllm.work import objects
from hllm.work.artifacts import Store, file_digests
from hllm.work.objects import upload
from tests.conftest import S3
from tests.world import TinySource, run_steps, write_csv

TinySettings = Callable[..., Settings]


def test_a_source_in_s3_gives_what_the_local_one_gives(
    s3: S3, tiny_settings: TinySettings, tiny_source: TinySource, tmp_path: Path
) -> None:
    bucket = s3.bucket("source-of-events")
    upload(tiny_source.interactions, f"{bucket}/raw/log.csv")
    upload(tiny_source.items, f"{bucket}/raw/items.parquet")
    remote = tiny_settings(
        tmp_path / "remote",
        **{"data.interactions": f"{bucket}/raw/log.csv", "data.items": f"{bucket}/raw/items.parquet"},
    )
    local = tiny_settings(tmp_path / "local")
    assert file_digests(run_steps(remote, "ingest")) == file_digests(run_steps(local, "ingest"))

    before = source_fingerprints(remote.data)
    upload(
        write_csv(tmp_path / "other.csv", ["user_id", "item_id", "timestamp"], []), f"{bucket}/raw/log.csv"
    )
    assert source_fingerprints(remote.data) != before


def test_of_a_parquet_source_only_what_is_read_travels(
    s3: S3,
    tiny_settings: TinySettings,
    tiny_source: TinySource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A column that nobody asks for stays where it is, and nothing is kept on this machine."""
    bucket = s3.bucket("wide-source")
    columns = parquet.read_table(tiny_source.items)
    pictures = [os.urandom(200_000) for _ in range(columns.num_rows)]
    parquet.write_table(columns.append_column("picture", pa.array(pictures)), tmp_path / "wide.parquet")
    upload(tmp_path / "wide.parquet", f"{bucket}/items.parquet")
    monkeypatch.setattr("hllm.work.objects.BLOCK_BYTES", 64 << 10)
    fetched: list[int] = []
    fetch = objects._Ranges._fetch
    monkeypatch.setattr(
        objects._Ranges,
        "_fetch",
        lambda self, start, count: fetched.append(count) or fetch(self, start, count),
    )
    settings = tiny_settings(**{"data.items": f"{bucket}/items.parquet"})
    output = run_steps(settings, "ingest")
    assert file_digests(output) == file_digests(run_steps(tiny_settings(tmp_path / "local"), "ingest"))
    assert 0 < sum(fetched) < 1_000_000
    assert sum(map(len, pictures)) == 12_000_000


def test_outputs_in_s3_reach_another_machine(
    s3: S3, tiny_settings: TinySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{s3.bucket('outputs-of-steps')}/team/run"
    settings = tiny_settings(**{"run.root": root})
    run_steps(settings, "ingest", "validate", "prepare")

    monkeypatch.setenv("HOME", str(tmp_path / "another-machine"))
    key = keys(settings)["prepare"]
    there = Store(root)
    manifest = there.manifest("prepare", key)
    assert manifest is not None
    assert manifest.rows["items"] == 60
    fetched = there.fetch("prepare", key)
    assert "another-machine" in str(fetched)
    assert file_digests(fetched) == manifest.files
    assert Prepared.open(fetched).items == 60
    assert [found.key for found in there.finished("validate")] == [keys(settings)["validate"]]


def test_an_output_whose_upload_failed_is_not_done(
    s3: S3, tiny_settings: TinySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither here nor elsewhere: the same command sends what is missing."""
    settings = tiny_settings(**{"run.root": s3.bucket("failed-uploads")})
    store, key = Store(settings.run.root), keys(settings)["ingest"]

    def broken(*_: object) -> None:
        raise InfraError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr("hllm.work.artifacts.write_object", broken)
        with pytest.raises(InfraError, match="connection reset"):
            run_steps(settings, "ingest")
    assert store.manifest("ingest", key) is None
    run_steps(settings, "ingest")
    assert [found.key for found in store.finished("ingest")] == [key]


def test_a_damaged_object_is_refused(
    s3: S3, tiny_settings: TinySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = s3.bucket("damaged-outputs")
    settings = tiny_settings(**{"run.root": root})
    run_steps(settings, "ingest")
    key = keys(settings)["ingest"]
    (tmp_path / "noise").write_bytes(b"noise")
    upload(tmp_path / "noise", f"{root}/ingest/{key}/items.parquet")
    monkeypatch.setenv("HOME", str(tmp_path / "another-machine"))
    with pytest.raises(InfraError, match=r"items\.parquet: arrived damaged"):
        Store(root).fetch("ingest", key)


def test_what_is_missing_in_s3_is_named(s3: S3, tiny_settings: TinySettings) -> None:
    bucket = s3.bucket("missing-sources")
    settings = tiny_settings(**{"data.interactions": f"{bucket}/nothing.csv"})
    with pytest.raises(DataError, match=r"s3://missing-sources/nothing\.csv: does not exist"):
        source_fingerprints(settings.data)


def test_wrong_credentials_can_be_told_from_missing_data(
    s3: S3, tiny_settings: TinySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(**{"data.interactions": f"{s3.bucket('closed-bucket')}/log.csv"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InfraError, match="access denied"):
        source_fingerprints(settings.data)


def test_a_folder_and_a_pattern_in_s3_are_read_in_the_order_of_names(
    s3: S3, tiny_settings: TinySettings, tiny_source: TinySource, tmp_path: Path
) -> None:
    bucket = s3.bucket("folder-of-parts")
    lines = tiny_source.interactions.read_text("utf-8")
    header, *_ = lines.split("\n", 1)
    events = tiny_source.events
    for n, part in enumerate((events[:50], events[50:51], events[51:])):
        upload(write_csv(tmp_path / "x.csv", header.split(","), part), f"{bucket}/log/dt={n}/part.csv")
    upload(write_csv(tmp_path / "x", [], []), f"{bucket}/log/_SUCCESS")
    upload(write_csv(tmp_path / "x", ["a"], []), f"{bucket}/log-of-others/part.csv")
    upload(tiny_source.items, f"{bucket}/items/part-0.parquet")
    local = parquet.read_table(
        run_steps(tiny_settings(tmp_path / "local"), "ingest") / "interactions.parquet"
    )
    before = set()
    for n, where in enumerate((f"{bucket}/log", f"{bucket}/log/", f"{bucket}/log/*/part.csv")):
        sets = {"data.interactions": where, "data.items": f"{bucket}/items"}
        remote = tiny_settings(tmp_path / str(n), **sets)
        output = run_steps(remote, "ingest")
        assert parquet.read_table(output / "interactions.parquet") == local
        before.add(source_fingerprints(remote.data)["interactions"])
    upload(write_csv(tmp_path / "x.csv", header.split(","), events[:1]), f"{bucket}/log/dt=3/part.csv")
    assert source_fingerprints(remote.data)["interactions"] not in before
    with pytest.raises(DataError, match="nothing: does not exist"):
        source_fingerprints(tiny_settings(tmp_path / "no", **{"data.interactions": f"{bucket}/nothing"}).data)
