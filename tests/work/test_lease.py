"""One writer at a time in S3, for processes that share nothing but a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from hllm.errors import InfraError
from hllm.work import lease
from hllm.work.artifacts import Manifest, Store, digest_of, file_digests
from hllm.work.lease import claimed
from hllm.work.objects import list_objects, write_object
from tests.conftest import S3

HOLD = """
import sys
from hllm.work import lease
from hllm.work.artifacts import Store
lease.BEAT_SECONDS, lease.STALE_SECONDS = 1.0, 6.0
with Store(sys.argv[1]).lock("ingest", "k"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock counts whole ones."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1.0)
    monkeypatch.setattr(lease, "STALE_SECONDS", 6.0)


@contextmanager
def elsewhere(root: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of another machine that holds the lock, until it is told to end or killed."""
    argv = [sys.executable, "-c", HOLD, root]
    environment = {**os.environ, "HOME": str(home)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_one_machine_at_a_time_writes_an_output(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3.bucket("claims-one")
    with elsewhere(root, tmp_path) as holder:
        with (
            pytest.raises(InfraError, match=rf"is writing this output: process {holder.pid} on"),
            Store(root).lock("ingest", "k"),
        ):
            pass
        with Store(root).lock("ingest", "another key"):
            pass
        holder.communicate("")  # it ends as it should
        assert "waiting" in capsys.readouterr().err
        with Store(root).lock("ingest", "k"):
            assert capsys.readouterr().err == "", "nobody is there to wait for"
    assert list_objects(f"{root}/") == []


def test_a_machine_that_is_gone_lets_go(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = s3.bucket("claims-gone")
    with elsewhere(root, tmp_path) as holder:
        holder.kill()
        with Store(root).lock("ingest", "k"):
            assert len(list_objects(f"{root}/")) == 1
    assert "waiting to see whether another process still writes this output" in capsys.readouterr().err


def test_of_many_that_come_at_once_never_two_hold(s3: S3) -> None:
    folder = f"{s3.bucket('claims-many')}/ingest/.k.lock"
    holding, most, held = 0, 0, 0
    counting = threading.Lock()

    def come(_: int) -> None:
        nonlocal holding, most, held
        with claimed(folder, "one of many"):
            with counting:
                holding, held = holding + 1, held + 1
                most = max(most, holding)
            time.sleep(0.05)
            with counting:
                holding -= 1

    with ThreadPoolExecutor(6) as pool:
        ended = [pool.submit(come, number) for number in range(12)]
        errors = [error for done in ended if (error := done.exception())]
    assert most == 1
    assert held >= 1
    assert all(isinstance(error, InfraError) for error in errors)
    assert len(errors) + held == 12


def test_who_gave_no_sign_of_life_publishes_only_what_nobody_took_over(s3: S3) -> None:
    """As after a suspended machine: the claim is old, and somebody may have thrown it away."""
    root = s3.bucket("claims-late")
    store = Store(root)
    store.folder("ingest", "k").mkdir(parents=True)
    manifest = Manifest("ingest", "k", "s", "0", "2026-01-01T00:00:00", 1.0, digest_of({}))
    with store.lock("ingest", "k"):
        assert store._claim
        store._claim._refreshed -= timedelta(seconds=1000)
        store.finish(manifest)
    store.forget("ingest", "k")
    with store.lock("ingest", "k"):
        assert store._claim
        write_object(f"{root}/ingest/.k.lock/00000000deadbeef", b"process 7 on another machine")
        store._claim._refreshed -= timedelta(seconds=1000)
        for _ in range(2):
            with pytest.raises(InfraError, match="took this output over"):
                store.finish(manifest)
            assert list_objects(f"{root}/ingest/.k.lock/") == [f"{root}/ingest/.k.lock/00000000deadbeef"]
    assert list_objects(f"{root}/") == [f"{root}/ingest/.k.lock/00000000deadbeef"]


def test_what_is_taken_over_while_it_is_sent_is_not_published(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = s3.bucket("claims-sent")
    store = Store(root)
    store.folder("ingest", "k").mkdir(parents=True)
    (store.folder("ingest", "k") / "items.parquet").write_bytes(b"rows")
    files = file_digests(store.folder("ingest", "k"))

    def suspended(*_: object) -> None:
        assert store._claim
        write_object(f"{root}/ingest/.k.lock/00000000deadbeef", b"process 7 on another machine")
        store._claim._refreshed -= timedelta(seconds=1000)

    monkeypatch.setattr("hllm.work.artifacts.upload", suspended)
    with store.lock("ingest", "k"), pytest.raises(InfraError, match="took this output over"):
        store.finish(Manifest("ingest", "k", "s", "0", "2026-01-01", 1.0, digest_of(files), files=files))
    assert store.manifest("ingest", "k") is None


def test_scratch_of_a_process_that_was_killed_after_it_had_finished_goes(s3: S3, tmp_path: Path) -> None:
    root = s3.bucket("claims-tidy")
    store, scratch = Store(root), f"{root}/train-hllm-1/k/work/step-3/numbers.json"
    write_object(scratch, b"{}")
    store.tidy("train-hllm-1", "k")
    assert list_objects(f"{root}/") == [scratch], "nobody has finished: it is to go on from"
    finished = Manifest("train-hllm-1", "k", "s", "0", "2026-01-01T00:00:00", 1.0, digest_of({}))
    store.folder("train-hllm-1", "k").mkdir(parents=True)
    store.finish(finished)
    with claimed(f"{root}/train-hllm-1/.k.lock", "one that makes it anew"):
        store.tidy("train-hllm-1", "k")
        assert scratch in list_objects(f"{root}/")
    store.tidy("train-hllm-1", "k")
    assert list_objects(f"{root}/") == [f"{root}/train-hllm-1/k/manifest.json"]
