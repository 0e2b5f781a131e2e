"""Objects in S3, or in any store that speaks its protocol: whole or not at all, in parts where they are
large, again where the network failed.

Credentials come from the AWS SDK's own chain, the address from AWS_ENDPOINT_URL_S3. The SDK repeats every
request that may be repeated, each part of a large object by itself, after waits that grow and are jittered;
it sends a checksum with everything that it stores, and compares the lengths of what it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hllm.errors import ConfigError, DataError, InfraError
from hllm.work.waiting import waiting_for

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig

ATTEMPTS = 4
"""Of one request, with waits of up to 1, 2 and 4 seconds between them; AWS_MAX_ATTEMPTS wins."""
CONNECT_SECONDS, READ_SECONDS = 5.0, 15.0
"""How long a store may take to answer at all, and between two pieces of an answer."""
PART_BYTES = 16 << 20
"""Larger objects travel in parts of this size (larger still, where there would be more than 10,000)."""
BLOCK_BYTES = 4 << 20
"""What a reader asks for at a time, at least."""


OF_CLIENTS = (
    "AWS_",
    "HLLM_S3_",
    "HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
"""Beginnings of the environment variables that decide what a client is like."""


def is_s3(location: str) -> bool:
    return location.startswith("s3://")


def split_s3(location: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> ("bucket", "a/b"). A key is not part of a URL: no character ends it."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, key


def s3_client(whole: bool = True) -> Any:
    """A client that any number of threads may share; making one takes longer than a small request.

    `whole`: what it reads are whole objects, whose checksums can be compared. Not every store knows that the
    checksum of an object is not the one of a range.
    """
    aws = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(OF_CLIENTS)))
    return _client(whole, os.getpid(), aws)


@lru_cache(maxsize=8)
def _client(whole: bool, process: int, aws: tuple[tuple[str, str], ...]) -> Any:
    """One for each process (connections cannot be shared) and each environment, which is where it looks."""
    import boto3
    from botocore.config import Config

    chosen: dict[str, Any] = {}  # what the user's own variables say is left to them
    if "AWS_MAX_ATTEMPTS" not in os.environ and "AWS_RETRY_MODE" not in os.environ:
        chosen["retries"] = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    if not whole:
        chosen["response_checksum_validation"] = "when_required"
    # A session of its own: the default session is not safe to share between threads.
    return boto3.session.Session().client(
        "s3",
        config=Config(
            s3={"addressing_style": os.environ.get("HLLM_S3_ADDRESSING", "path")},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            tcp_keepalive=True,
            max_pool_connections=16,
            **chosen,
        ),
    )


@contextmanager
def s3_errors(location: str, setting: str = "") -> Iterator[None]:
    """S3's many exceptions as the few that matter: a setting is wrong, no such object, or try again.

    `setting`: which one names the location, where that is not plain.
    """
    from boto3.exceptions import Boto3Error, S3UploadFailedError
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        FlexibleChecksumError,
        NoCredentialsError,
        SSLError,
    )
    from s3transfer.exceptions import RetriesExceededError

    where = f"{setting} = {location}" if setting else location
    try:
        try:
            with waiting_for(_store_of(location)):
                yield
        except S3UploadFailedError as error:
            # boto3 tells the reason of a file that was refused in words only: the error itself is behind it.
            raise (error.__context__ if isinstance(error.__context__, ClientError) else error) from None
    except ClientError as error:
        said = error.response.get("Error", {})
        code = said.get("Code", "")
        bucket = said.get("BucketName") or (split_s3(location)[0] if is_s3(location) else "")
        if code == "NoSuchBucket" or (code == "404" and not _bucket_exists(bucket)):
            raise ConfigError(
                f"the bucket {bucket} does not exist" if bucket else "the bucket does not exist",
                where=where,
                remedy="Create it, or correct the setting that names it (and AWS_ENDPOINT_URL_S3).",
            ) from None
        if code in {"404", "NoSuchKey", "NotFound"}:
            raise DataError("does not exist", where=where) from None
        if code in _REFUSED:
            raise InfraError(
                f"access denied ({code})", where=where, remedy="Check the AWS credentials of this process."
            ) from None
        if code in {"412", "PreconditionFailed"}:
            raise InfraError("was replaced while it was read", where=where) from None
        remedy = CHECKSUMS if "checksum" in _one_line(error).lower() or code in _NO_CHECKSUMS else ""
        raise InfraError(_one_line(error), where=where, remedy=remedy) from None
    except SSLError as error:
        raise ConfigError(
            f"the certificate is not accepted: {_one_line(error)}",
            where=where,
            remedy="Correct AWS_ENDPOINT_URL_S3, or name the authority's certificates in AWS_CA_BUNDLE.",
        ) from None
    except NoCredentialsError:
        raise ConfigError(
            "there are no AWS credentials",
            where=where,
            remedy="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or whatever else the AWS SDK finds.",
        ) from None
    except FlexibleChecksumError as error:
        raise InfraError(_one_line(error), where=where, remedy=CHECKSUMS) from None
    except (BotoCoreError, Boto3Error, RetriesExceededError) as error:
        raise InfraError(
            _one_line(error),
            where=where,
            remedy="Check AWS_ENDPOINT_URL_S3; retrying helps when the network failed.",
        ) from None


_REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}


CHECKSUMS = (
    "Not every store knows the SDK's checksums: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required."
)
_NO_CHECKSUMS = {"NotImplemented", "XAmzContentSHA256Mismatch", "BadDigest", "InvalidDigest"}


def _store_of(location: str) -> str:
    """Who is waited for, in a message: the address where one is set, and the bucket."""
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "S3"
    return f"{address} (s3://{split_s3(location)[0]})"


def _bucket_exists(bucket: str) -> bool:
    """Asked where a HEAD found nothing: it has no body to say whether the bucket was missing or the key."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response.get("Error", {}).get("Code") != "404"
    except BotoCoreError:  # it cannot be told
        pass
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _transfer() -> TransferConfig:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)


def upload(path: Path, location: str, client: Any = None) -> None:
    """One file, in parts where it is large. A failed upload leaves no parts behind, a killed one does: see
    `abandon_uploads`."""
    bucket, key = split_s3(location)
    with s3_errors(location):
        (client or s3_client()).upload_file(str(path), bucket, key, Config=_transfer())


def write_object(location: str, content: bytes, client: Any = None) -> None:
    """One small object, whole or not at all."""
    bucket, key = split_s3(location)
    with s3_errors(location):
        (client or s3_client()).put_object(Bucket=bucket, Key=key, Body=content)


def download(location: str, path: Path, client: Any = None, digest: str = "") -> Path:
    """Fetch one object, in ranges where it is large; the file appears whole or not at all.

    Raises:
        DataError: there is no such object.
        InfraError: its sha256 is not `digest`, twice; or the store does not answer.
    """
    bucket, key = split_s3(location)
    client = client or s3_client()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may fetch the same file into the same cache.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        for _ in range(2):
            with s3_errors(location):
                client.download_file(bucket, key, str(partial), Config=_transfer())
            if not digest or _digest_file(partial) == digest:
                os.replace(partial, path)
                return path
    finally:
        partial.unlink(missing_ok=True)
    raise InfraError(
        "arrived damaged: its digest differs from the manifest's",
        where=location,
        remedy="If it stays so, the object itself is damaged: delete its folder and run its step again.",
    )


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(location: str, client: Any = None) -> bytes | None:
    """The content of one small object, or None when there is none."""
    bucket, key = split_s3(location)
    try:
        with s3_errors(location):
            return _whole(client or s3_client(), bucket, key)
    except DataError:
        return None


def _whole(client: Any, bucket: str, key: str, count: int | None = None, **asked: str) -> bytes:
    """The body of an answer, all `count` bytes of it.

    The SDK repeats a request that failed, but not the reading of an answer that broke off: that is done here,
    as often and after the same waits.
    """
    from botocore.exceptions import (
        FlexibleChecksumError,
        IncompleteReadError,
        ReadTimeoutError,
        ResponseStreamingError,
    )

    broke_off = (FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
    for attempt in range(1, ATTEMPTS + 1):
        answer = client.get_object(Bucket=bucket, Key=key, **asked)
        if asked.get("IfMatch", answer["ETag"]) != answer["ETag"]:  # stores that do not heed it
            raise InfraError("was replaced while it was read", where=f"s3://{bucket}/{key}")
        try:
            content: bytes = answer["Body"].read()
            if count is None or len(content) == count:
                return content
            broken: Exception = IncompleteReadError(actual_bytes=len(content), expected_bytes=count)
        except broke_off as error:
            broken = error
        if attempt < ATTEMPTS:
            _wait(attempt)
    raise broken


def _wait(attempt: int) -> None:
    time.sleep(secrets.SystemRandom().uniform(0, 2 ** (attempt - 1)))


def head_object(location: str, client: Any = None) -> Mapping[str, Any]:
    """Size (`ContentLength`), entity tag (`ETag`) and the rest of what the store says of an object."""
    bucket, key = split_s3(location)
    with s3_errors(location):
        found: Mapping[str, Any] = (client or s3_client()).head_object(Bucket=bucket, Key=key)
        return found


def list_objects(location: str, client: Any = None) -> list[str]:
    """Every object under a prefix."""
    bucket, _ = split_s3(location)
    return [f"s3://{bucket}/{entry['Key']}" for entry in _entries(location, client)]


def object_tags(location: str, client: Any = None) -> dict[str, str]:
    """Every object under a prefix, with its entity tag and size."""
    bucket, _ = split_s3(location)
    return {
        f"s3://{bucket}/{entry['Key']}": f"{entry['ETag']}-{entry['Size']}"
        for entry in _entries(location, client)
    }


def object_bytes(location: str, client: Any = None) -> int:
    """How large all objects under a prefix are together."""
    return sum(entry["Size"] for entry in _entries(location, client))


def _entries(location: str, client: Any) -> list[Mapping[str, Any]]:
    bucket, prefix = split_s3(location)
    with s3_errors(location):
        lister = (client or s3_client()).get_paginator("list_objects_v2")
        pages = lister.paginate(Bucket=bucket, Prefix=prefix)
        return [entry for page in pages for entry in page.get("Contents", [])]


def delete_objects(locations: Iterable[str], client: Any = None) -> None:
    """Objects that are gone already are no error."""
    for location in locations:
        client = client or s3_client()
        bucket, key = split_s3(location)
        with s3_errors(location):
            client.delete_object(Bucket=bucket, Key=key)


def abandon_uploads(location: str, client: Any = None) -> int:
    """Throw away the parts of uploads under a prefix that a killed process never finished; how many uploads
    that were. They are in no listing, and are paid for until somebody does."""
    bucket, prefix = split_s3(location)
    client, found = client or s3_client(), 0
    with s3_errors(location), _nothing_begun(client):
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for begun in page.get("Uploads", []):
                client.abort_multipart_upload(Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"])
                found += 1
    return found


@contextmanager
def _nothing_begun(client: Any) -> Iterator[None]:
    """rclone says so of a bucket in which nobody has ever begun an upload in parts."""
    with contextlib.suppress(client.exceptions.NoSuchUpload):
        yield


def open_object(location: str) -> BinaryIO:
    """An object as a file to read and to seek in: only the ranges that are read are fetched."""
    return io.BufferedReader(_Ranges(location), BLOCK_BYTES)


class _Ranges(io.RawIOBase):
    """Ranges of one object as it was when it was opened."""

    def __init__(self, location: str) -> None:
        self._location, (self._bucket, self._key) = location, split_s3(location)
        self._client = s3_client(whole=False)
        head = head_object(location, self._client)
        self._size, self._tag, self._at = int(head["ContentLength"]), head["ETag"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        content = self._fetch(self._at, wanted)
        buffer[:wanted] = content
        self._at += wanted
        return wanted

    def readall(self) -> bytes:
        """By itself Python would ask for 8 KiB at a time."""
        found = []
        while self._at < self._size:
            found.append(self._fetch(self._at, min(PART_BYTES, self._size - self._at)))
            self._at += len(found[-1])
        return b"".join(found)

    def _fetch(self, start: int, count: int) -> bytes:
        asked = {"Range": f"bytes={start}-{start + count - 1}", "IfMatch": self._tag}
        with s3_errors(self._location):
            return _whole(self._client, self._bucket, self._key, count, **asked)
