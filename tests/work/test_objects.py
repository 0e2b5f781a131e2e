"""Objects against a real S3 server, with a proxy before it that resets, refuses, stalls and cuts off."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hllm.errors import ConfigError, DataError, InfraError
from hllm.work import objects
from hllm.work.artifacts import Manifest, Store, digest_of, fingerprint
from tests.conftest import S3, serve_s3_as_another
from tests.faulty import Fault, Proxy, faulty

LARGE = bytes(range(256)) * (9 << 12)  # 9 MiB: two parts with the smallest part that S3 allows


@pytest.fixture
def parts_of_5_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts, that is: botocore draws its waits from here, and we draw ours."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(objects, "_wait", lambda *_: None)


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch, no_waiting: None) -> Iterator[Proxy]:
    """The S3 server behind a proxy; clients made from here on go through it."""
    with faulty(s3.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.url)
        yield between


def large(folder: Path) -> Path:
    path = folder / "large.bin"
    path.write_bytes(LARGE)
    return path


def test_a_large_object_travels_in_parts_and_comes_back_whole(
    s3: S3, tmp_path: Path, parts_of_5_mib: None
) -> None:
    location = f"{s3.bucket('objects-large')}/a/large.bin"
    objects.upload(large(tmp_path), location)
    assert objects.head_object(location)["ContentLength"] == len(LARGE)
    back = objects.download(location, tmp_path / "back.bin", digest=hashlib.sha256(LARGE).hexdigest())
    assert back.read_bytes() == LARGE


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_an_upload_survives_faults_on_its_way(
    s3: S3, proxy: Proxy, tmp_path: Path, parts_of_5_mib: None, kind: str
) -> None:
    location = f"{s3.bucket(f'objects-up-{kind}')}/large.bin"
    proxy.faults = [Fault(kind, times=3, after=1 << 20, method="PUT")]  # type: ignore[arg-type]
    objects.upload(large(tmp_path), location)
    assert proxy.seen == 3
    assert objects.download(location, tmp_path / "back.bin").read_bytes() == LARGE


@pytest.mark.parametrize("kind", ["503", "truncate"])
def test_a_download_survives_faults_on_its_way(
    s3: S3, proxy: Proxy, tmp_path: Path, parts_of_5_mib: None, kind: str
) -> None:
    location = f"{s3.bucket(f'objects-down-{kind}')}/large.bin"
    objects.upload(large(tmp_path), location)
    proxy.faults = [Fault(kind, times=3, after=1 << 20, method="GET")]  # type: ignore[arg-type]
    assert objects.download(location, tmp_path / "back.bin").read_bytes() == LARGE
    assert proxy.seen == 3


def test_a_slow_store_is_waited_for(s3: S3, proxy: Proxy, tmp_path: Path) -> None:
    location = f"{s3.bucket('objects-slow')}/large.bin"
    objects.upload(large(tmp_path), location)
    proxy.delay = 0.005
    assert objects.download(location, tmp_path / "back.bin").read_bytes() == LARGE


def test_a_store_that_never_answers_is_given_up_with_one_line(
    s3: S3, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{s3.bucket('objects-stalled')}/small"
    monkeypatch.setattr(objects, "READ_SECONDS", 0.2)
    objects._client.cache_clear()
    proxy.faults = [Fault("stall", times=99, after=5)]
    with pytest.raises(InfraError, match="Read timeout") as error:
        objects.write_object(location, b"small")
    objects._client.cache_clear()
    assert 3 <= proxy.seen <= objects.ATTEMPTS
    assert error.value.first_line.startswith(location)


def test_an_upload_that_fails_leaves_no_parts(
    s3: S3, proxy: Proxy, tmp_path: Path, parts_of_5_mib: None
) -> None:
    bucket = s3.bucket("objects-given-up")
    proxy.faults = [Fault("503", times=99, method="PUT /objects-given-up/large.bin?uploadId")]
    with pytest.raises(InfraError, match="SlowDown"):
        objects.upload(large(tmp_path), f"{bucket}/large.bin")
    assert objects.list_objects(f"{bucket}/") == []
    assert objects.abandon_uploads(f"{bucket}/") == 0


def test_what_a_killed_upload_left_is_thrown_away_by_the_next(
    s3: S3, tmp_path: Path, parts_of_5_mib: None
) -> None:
    """The output's own parts only: another output's upload goes on."""
    bucket = s3.bucket("objects-killed")
    client = objects.s3_client()
    for key in ("ingest/k/large.bin", "ingest/other/large.bin"):
        begun = client.create_multipart_upload(Bucket="objects-killed", Key=key)
        client.upload_part(
            Bucket="objects-killed", Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=LARGE[: 5 << 20]
        )
    store = Store(bucket)
    folder = store.folder("ingest", "k")
    folder.mkdir(parents=True)
    digest = hashlib.sha256(large(folder).read_bytes()).hexdigest()
    files = {"large.bin": digest}
    store.finish(Manifest("ingest", "k", "s", "0", "2026-01-01T00:00:00", 1.0, digest_of(files), files=files))
    left = client.list_multipart_uploads(Bucket="objects-killed").get("Uploads", [])
    assert [one["Key"] for one in left] == ["ingest/other/large.bin"]
    assert objects.abandon_uploads(f"{bucket}/") == 1


KILLED = """
import sys
from hllm.work.artifacts import Manifest, Store, digest_of, file_digests
store = Store(sys.argv[1])
folder = store.folder("ingest", "k")
files = file_digests(folder)
print("begins", flush=True)
store.finish(Manifest("ingest", "k", "s", "0", "2026-01-01T00:00:00", 1.0, digest_of(files), files=files))
"""


def test_an_output_whose_process_was_killed_while_it_sent_it_is_never_read(
    s3: S3, proxy: Proxy, tmp_path: Path
) -> None:
    bucket = s3.bucket("objects-half")
    folder = Store(bucket).folder("ingest", "k")
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number:02}.bin").write_bytes(LARGE[: 1 << 18])
    proxy.delay = 0.02
    argv = [sys.executable, "-c", KILLED, bucket]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not (sent := objects.list_objects(f"{bucket}/ingest/k/")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert 0 < len(sent) < 41
    assert Store(bucket).manifest("ingest", "k") is None
    with pytest.raises(DataError, match="ingest has no finished output"):
        Store(bucket, cache=tmp_path / "elsewhere").fetch("ingest", "k")


def test_what_arrives_damaged_is_fetched_again_and_then_refused(s3: S3, tmp_path: Path) -> None:
    location = f"{s3.bucket('objects-damaged')}/small"
    objects.write_object(location, b"not what the manifest says")
    with pytest.raises(InfraError, match="small: arrived damaged"):
        objects.download(location, tmp_path / "small", digest=hashlib.sha256(b"what").hexdigest())
    assert list(tmp_path.glob("*small*")) == []


def test_only_the_ranges_that_are_read_are_fetched(
    s3: S3, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{s3.bucket('objects-ranges')}/large.bin"
    objects.write_object(location, LARGE)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1 << 10)
    proxy.faults = [Fault("truncate", times=2, after=100, method="GET")]
    with objects.open_object(location) as file:
        file.seek(-300, os.SEEK_END)
        assert file.read() == LARGE[-300:]
        file.seek(1 << 20)
        assert file.read(5) == LARGE[1 << 20 :][:5]
        assert file.seek(0, os.SEEK_CUR) == (1 << 20) + 5
    assert proxy.seen == 2
    with objects.open_object(location) as file:
        assert file.read() == LARGE


def test_a_small_object_is_read_again_where_its_answer_broke_off(
    s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{s3.bucket('objects-small')}/manifest.json"
    objects.write_object(location, LARGE[: 1 << 16])
    waits: list[int] = []
    monkeypatch.setattr(objects, "_wait", waits.append)
    proxy.faults = [Fault("truncate", times=3, after=100, method="GET")]
    assert objects.read_object(location) == LARGE[: 1 << 16]
    assert waits == [1, 2, 3]
    proxy.faults = [Fault("truncate", times=99, after=100, method="GET")]
    with pytest.raises(InfraError, match=r"manifest\.json: "):
        objects.read_object(location)
    assert proxy.seen == 3 + objects.ATTEMPTS
    assert waits == [1, 2, 3, 1, 2, 3]


def test_waits_grow_and_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    for attempt in (1, 2, 5):
        for _ in range(50):
            objects._wait(attempt)
    assert len(set(slept)) > 100
    assert max(slept[:50]) <= 1 < max(slept[50:100]) <= 2 < max(slept[100:]) <= 16


def test_an_object_that_changes_while_it_is_read_is_an_error(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{s3.bucket('objects-changing')}/log"
    objects.write_object(location, LARGE)
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1 << 10)
    with objects.open_object(location) as file:
        file.read(10)
        objects.write_object(location, LARGE[::-1])
        with pytest.raises(InfraError, match="log: was replaced while it was read"):
            file.read()


def test_listings_go_on_over_pages(s3: S3) -> None:
    bucket = s3.bucket("objects-many")
    folder = s3.folder / "objects-many" / "ingest"
    folder.mkdir()
    for number in range(1105):
        (folder / f"{number:04}").touch()
    assert len(objects.list_objects(f"{bucket}/ingest/")) == 1105


def test_a_bucket_that_does_not_exist_is_a_setting_to_correct(s3: S3) -> None:
    with pytest.raises(ConfigError, match="the bucket no-such-bucket does not exist") as error:
        Store("s3://no-such-bucket/runs").manifest("ingest", "k")
    assert "Create it" in str(error.value)


def test_whatever_a_missing_bucket_is_asked_for_it_is_named(s3: S3, tmp_path: Path) -> None:
    """A HEAD has no body that would say so, and boto3 hides why an upload was refused."""
    location = "s3://no-such-bucket/log.parquet"
    for ask in (
        lambda: objects.head_object(location),
        lambda: fingerprint(location),
        lambda: objects.download(location, tmp_path / "log.parquet"),
        lambda: objects.upload(large(tmp_path), location),
        lambda: objects.write_object(location, b""),
    ):
        with pytest.raises(ConfigError, match=r"log\.parquet: the bucket no-such-bucket does not exist"):
            ask()
    bucket = s3.bucket("objects-there")
    with pytest.raises(DataError, match=r"objects-there/log\.parquet: does not exist"):
        fingerprint(f"{bucket}/log.parquet")


def test_an_upload_with_the_wrong_password_says_so(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket("objects-refused")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(InfraError, match=r"large\.bin: access denied \(SignatureDoesNotMatch\)"):
        objects.upload(large(tmp_path), f"{bucket}/large.bin")


def test_two_processes_may_fetch_the_same_file_into_one_cache(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have it before either moves it to its place."""
    location = f"{s3.bucket('objects-shared')}/large.bin"
    objects.upload(large(tmp_path), location)
    both, digest_file = threading.Barrier(2, timeout=20), objects._digest_file

    def together(path: Path) -> str:
        both.wait()
        return digest_file(path)

    monkeypatch.setattr(objects, "_digest_file", together)
    target, digest = tmp_path / "cache" / "large.bin", hashlib.sha256(LARGE).hexdigest()
    with ThreadPoolExecutor(2) as pool:
        fetched = [pool.submit(objects.download, location, target, digest=digest) for _ in range(2)]
        assert [done.result() for done in fetched] == [target, target]
    assert target.read_bytes() == LARGE
    assert list(target.parent.iterdir()) == [target]


def test_without_credentials_it_says_so(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="there are no AWS credentials"):
        objects.read_object("s3://bucket/key")


def test_a_certificate_for_another_name_is_a_setting_to_correct(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_s3_as_another(tmp_path, "127.0.0.1") as (server, certificate):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        with pytest.raises(ConfigError, match=r"certificate is not accepted: .*storage\.example"):
            objects.read_object("s3://bucket/key")
