from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hllm.errors import DataError, InfraError
from hllm.work.artifacts import (
    Manifest,
    Store,
    digest_of,
    file_digests,
    fingerprint,
    user_name,
    write_atomically,
)
from hllm.work.objects import is_s3, write_object
from tests.conftest import S3

HOLD = """
import sys
from hllm.work.artifacts import Store
with Store(sys.argv[1]).lock("ingest", "k"):
    print("held", flush=True)
    sys.stdin.read()
"""


def manifest(key: str = "k", created_at: str = "2026-01-01T00:00:00", **files: str) -> Manifest:
    return Manifest("ingest", key, "s", "0", created_at, 1.0, digest_of(files), {"rows": 3}, {}, files)


def test_without_a_manifest_there_is_no_output(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    folder = store.folder("ingest", "k")
    folder.mkdir(parents=True)
    (folder / "items.parquet").write_text("everything is here")
    assert store.manifest("ingest", "k") is None
    with pytest.raises(DataError, match="ingest has no finished output"):
        store.fetch("ingest", "k")
    store.finish(manifest())
    assert store.manifest("ingest", "k") == manifest()
    assert store.fetch("ingest", "k") == folder


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where outputs lie: in a folder, or in S3 with nothing of it here."""
    if request.param == "folder":
        return str(tmp_path / "runs")
    s3: S3 = request.getfixturevalue("s3")
    return s3.bucket(f"artifacts-{tmp_path.name.replace('_', '-').lower()}")


def leave_manifest(root: str, content: bytes) -> None:
    if is_s3(root):
        write_object(f"{root}/ingest/k/manifest.json", content)
    else:
        write_atomically(Path(root, "ingest", "k", "manifest.json"), content)


@pytest.mark.parametrize(
    "look", [lambda store: store.manifest("ingest", "k"), lambda store: store.finished("ingest")]
)
def test_a_damaged_manifest_is_named(root: str, look: Callable[[Store], object]) -> None:
    for damaged in (b'{"step": "ing', b'{"step": "ingest"}', b"[1, 2]", b"\xff"):
        leave_manifest(root, damaged)
        with pytest.raises(DataError, match=r"ingest/k/manifest\.json: is damaged"):
            look(Store(root))


def test_a_manifest_of_a_newer_version_is_no_damage(root: str) -> None:
    newer = json.loads(manifest().content) | {"code_version": "9.1", "licences": {}}
    leave_manifest(root, json.dumps(newer).encode())
    with pytest.raises(DataError, match=r"written by a newer HLLM \(9\.1; this is .*'licences'"):
        Store(root).manifest("ingest", "k")


def test_finished_outputs_come_oldest_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for key, day in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2026-01-01")):
        store.finish(manifest(key, day))
    assert [found.key for found in store.finished("ingest")] == ["c", "b", "a"]
    assert store.finished("validate") == []


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_cover_names_and_content_but_not_scratch(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b", "work/c", ".hidden", "manifest.json"):
        (tmp_path / name).write_text(name)
    before = file_digests(tmp_path)
    assert sorted(before) == ["a", "sub/b"]
    (tmp_path / "a").write_text("other")
    assert file_digests(tmp_path) != before


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert (
        digest_of({"a": 1, "b": [1, 2]})
        == digest_of({"b": [1, 2], "a": 1})
        != digest_of({"a": 1, "b": [2, 1]})
    )


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b").write_text("other")
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))
    with pytest.raises(DataError, match="no such file"):
        fingerprint(str(tmp_path / "c"))
    with pytest.raises(DataError, match="is a folder"):
        fingerprint(str(tmp_path))


def test_one_process_at_a_time_writes_an_output_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        store = Store(str(tmp_path))
        with (
            pytest.raises(InfraError, match="another process is writing this output"),
            store.lock("ingest", "k"),
        ):
            pass
        with store.lock("ingest", "another key"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with store.lock("ingest", "k"):
        pass


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod whose user is in no file of its image."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_010)
    assert user_name() == "uid 4000010"
