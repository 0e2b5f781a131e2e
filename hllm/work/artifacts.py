"""Where steps write, and how anyone knows that an output is whole.

An output is a folder `ROOT/STEP/KEY`. Its `manifest.json` is written last: no manifest, no output.
The key is a digest of everything that determines the output, so "already done" is one look, and an
output is never overwritten by different settings. ROOT is a local folder or `s3://bucket/prefix`;
steps always work on local files, and the store carries finished folders to S3 and back.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import hllm
from hllm.errors import ConfigError, DataError, HLLMError, InfraError
from hllm.work.digests import digest_file, known_digest
from hllm.work.lease import Claim, claimed
from hllm.work.objects import (
    abandon_uploads,
    delete_objects,
    download,
    head_object,
    is_s3,
    list_objects,
    object_bytes,
    read_object,
    s3_client,
    upload,
    write_object,
)

MANIFEST = "manifest.json"
FORGOTTEN = ".forgotten"
"""An empty file in an output that is being removed."""
USED = ".used"
"""An empty file in an output: when it was written, a step last relied on that output."""
DIGEST = re.compile(r"[0-9a-f]{64}")
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}(?:\.part)?")
"""The name of a file that is being written by `write_atomically` or `download`."""
WORK = "work"
"""The top folder of an output that is scratch: checkpoints, partial results."""


@dataclass(frozen=True)
class Manifest:
    """What a finished output holds. `digest` covers every file's name and content."""

    step: str
    key: str
    settings_digest: str
    code_version: str
    created_at: str
    seconds: float
    digest: str
    rows: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    schema: dict[str, dict[str, str]] = field(default_factory=dict)
    """File -> column -> type, of every Parquet file; of an array, its type and shape."""
    usage: dict[str, float] = field(default_factory=dict)
    """What making it took, by the names of `hllm.work.costs`; of the try that finished it."""

    @property
    def content(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    def write(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST, self.content)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        try:
            return cls.parse((folder / MANIFEST).read_bytes(), folder / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @classmethod
    def parse(cls, content: bytes, where: object) -> Manifest:
        """What `content` says; `where` it was found.

        Raises:
            DataError: it is no manifest, or holds what only a newer version knows.
        """
        try:
            values = dict(json.loads(content))
            unknown = sorted(set(values) - {known.name for known in fields(cls)})
            if not unknown:
                return _well_formed(_of_manifests().validate_json(content, strict=True), str(where))
        except (ValueError, TypeError, RecursionError) as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(
                f"is damaged: {said}", where=where, remedy="Delete the folder and run the step again."
            ) from None
        raise DataError(
            f"was written by a newer HLLM ({values.get('code_version')}; this is {hllm.__version__})",
            where=where,
            examples=unknown,
            remedy="Install that version here too, or choose another run.root.",
        )


@cache
def _of_manifests() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def _well_formed(manifest: Manifest, where: str) -> Manifest:
    """Nothing is believed because a manifest says it: step and key are those of the place where it was found,
    and its files lie below that place.

    Raises:
        ValueError: it says something else.
    """
    place = f"/{manifest.step}/{manifest.key}/{MANIFEST}"
    if not where.endswith(place):
        raise ValueError(f"it is of {manifest.step}/{manifest.key}, and was found elsewhere")
    for name, digest in manifest.files.items():
        require_relative(name)
        if not DIGEST.fullmatch(digest):
            raise ValueError(f"{name!r} has no sha256")
    if any(count < 0 for count in manifest.rows.values()):
        raise ValueError("a count of rows is negative")
    return manifest


def require_relative(name: str) -> str:
    """A name that was read, if it is relative, plain and leads below the folder that it is joined to.

    Raises:
        ValueError: it leads elsewhere, or could.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise ValueError(f"{name[:100]!r} is no name of a file below its folder")
    return name


def below(folder: Path, name: str) -> Path:
    """`folder / name`, of a name that was read; links that lead elsewhere are not followed.

    Raises:
        DataError: it does not lie in the folder.
    """
    try:
        path = folder / require_relative(name)
        if path.resolve().is_relative_to(folder.resolve()):
            return path
    except (ValueError, OSError, RuntimeError):
        pass
    raise DataError(f"{name[:100]!r} does not lie in its folder", where=folder)


def digest_of(value: Any) -> str:
    """A stable digest of JSON-like content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: Path, content: bytes) -> None:
    """All of it or nothing, whenever the power goes: write beside, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """A name is on disk when its folder is; not every file system can be asked."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Store:
    """Outputs of steps under one root, local or S3."""

    def __init__(self, root: str, cache: Path | None = None) -> None:
        self.root = root.rstrip("/")
        self.remote = self.root.startswith("s3://")
        if self.remote:
            self.local = cache or Path.home() / ".cache" / "hllm" / digest_of(self.root)
        else:
            self.local = Path(self.root).absolute()
        self._claim: Claim | None = None

    def folder(self, step: str, key: str) -> Path:
        """The local folder of an output, whether it is finished or not."""
        return self.local / step / key

    def location(self, step: str, key: str) -> str:
        """Where the output lives for everybody else."""
        return f"{self.root}/{step}/{key}"

    def work_location(self, step: str, key: str) -> str:
        """Where an unfinished output's scratch outlives this machine: in S3, or nowhere ("")."""
        return f"{self.location(step, key)}/{WORK}" if self.remote else ""

    def clear_work(self, step: str, key: str) -> None:
        """Remove what scratch there is in S3."""
        if self.remote:
            delete_objects(list_objects(f"{self.work_location(step, key)}/"))

    def tidy(self, step: str, key: str) -> None:
        """Remove the scratch in S3 of a process that was killed after it had finished the output. One
        listing, where there is none."""
        if not self.remote:
            return
        try:
            if not list_objects(f"{self.work_location(step, key)}/"):
                return
            with self.lock(step, key):  # or it is of one that makes the output anew
                if _read_remote(f"{self.location(step, key)}/{MANIFEST}"):
                    self.clear_work(step, key)
        except HLLMError as error:  # no reason to stop: the output is whole
            print(f"warning: checkpoints stay: {error.first_line}", file=sys.stderr)

    def forget(self, step: str, key: str) -> None:
        """Remove an output, its manifest first: from then on it is not done. A mark stays to the last, by
        which who is killed in between is known (`half_forgotten`)."""
        folder, location = self.folder(step, key), self.location(step, key)
        if folder.is_dir() and not self.remote:
            (folder / FORGOTTEN).touch()
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                clear(path)
            elif path.name != FORGOTTEN:
                path.unlink(missing_ok=True)
        clear(folder)
        if self.remote:
            found = list_objects(f"{location}/")
            if not found:
                return
            write_object(f"{location}/{FORGOTTEN}", b"")
            last = {f"{location}/{MANIFEST}": 0, f"{location}/{FORGOTTEN}": 2}
            delete_objects(
                sorted([*found, f"{location}/{FORGOTTEN}"], key=lambda place: last.get(place, 1))
            )

    def half_forgotten(self, step: str) -> list[str]:
        """Keys of outputs whose removal was broken off."""
        if self.remote:
            start = f"{self.root}/{step}/"
            places = [place.removeprefix(start) for place in list_objects(start)]
            return sorted(
                place.partition("/")[0] for place in places if place.partition("/")[2] == FORGOTTEN
            )
        return sorted(path.parent.name for path in (self.local / step).glob(f"*/{FORGOTTEN}"))

    def size(self, step: str, key: str) -> int:
        """Bytes that an output takes where it lives; a copy of it on this machine is not counted."""
        if self.remote:
            return object_bytes(f"{self.location(step, key)}/")
        return sum(path.stat().st_size for path in self.folder(step, key).rglob("*") if path.is_file())

    def use(self, step: str, key: str) -> None:
        """Note that a step relies on an output now: to `hllm prune` it is as young as that. Outputs that may
        only be read do without, and say so."""
        try:
            if self.remote:
                write_object(f"{self.location(step, key)}/{USED}", b"")
            else:
                (self.folder(step, key) / USED).touch()
        except (OSError, InfraError) as error:
            said = error.first_line if isinstance(error, InfraError) else error
            print(f"warning: `hllm prune` will not know of this use: {said}", file=sys.stderr)

    def used(self, step: str, key: str) -> datetime | None:
        """When a step last relied on an output, if any did after it was made."""
        try:
            if self.remote:
                modified: datetime = head_object(f"{self.location(step, key)}/{USED}")["LastModified"]
                return modified
            return datetime.fromtimestamp((self.folder(step, key) / USED).stat().st_mtime, UTC)
        except (FileNotFoundError, DataError):
            return None

    def carry(self, step: str, key: str, name: str) -> None:
        """Send one whole file of an unfinished output ahead: a process elsewhere need not make it again."""
        if self.remote:
            upload(self.folder(step, key) / name, f"{self.location(step, key)}/{name}")

    def bring(self, step: str, key: str, name: str) -> bool:
        """Fetch a file of an unfinished output from S3, where somebody may have carried it; whether it was
        there."""
        if not self.remote:
            return False
        try:
            download(f"{self.location(step, key)}/{name}", self.folder(step, key) / name)
        except DataError:
            return False
        return True

    def manifest(self, step: str, key: str) -> Manifest | None:
        """The manifest of a finished output, or None."""
        if self.remote:  # a copy on this machine may be of an output that was removed since
            return _read_remote(f"{self.location(step, key)}/{MANIFEST}")
        return Manifest.read(self.folder(step, key))

    def damaged(self, manifest: Manifest, again: bool = False) -> str:
        """The first file of an output on this machine that is not what was written, or "". A file is read
        once for each change of it, with `again` in any case."""
        folder = self.folder(manifest.step, manifest.key)
        for name, digest in manifest.files.items():
            try:
                path = below(folder, name)
                found = digest_file(path) if again else known_digest(path, self.local)
            except (OSError, DataError):
                return name
            if found != digest:
                return name
        return ""

    def whole(self, step: str, key: str) -> Manifest | None:
        """The manifest of a finished output whose files, where they lie on this machine, are what was
        written; None means that the step is to run."""
        try:
            found = self.manifest(step, key)
        except DataError as error:
            print(f"{step}: {error.first_line}: made anew", file=sys.stderr)
            return None
        if found is None or self.remote:
            return found
        damaged = self.damaged(found)
        if damaged:
            print(f"{step}: {damaged} is damaged in {self.folder(step, key)}: made anew", file=sys.stderr)
        return None if damaged else found

    def fetch(self, step: str, key: str, again: bool = False) -> Path:
        """The local folder of a finished output, downloaded if it lives in S3. Its files are compared with
        their digests: each once for every change of it, with `again` by reading all bytes.

        Raises:
            DataError: the output is not finished, or a file does not match its digest.
        """
        folder = self.folder(step, key)
        here = Manifest.read(folder)
        if here is not None:
            damaged = self.damaged(here, again)
            if not damaged:
                return folder
            if not self.remote:
                raise DataError(
                    f"{damaged} is not what the step {step} wrote: its digest is another",
                    where=folder,
                    remedy=f"Run the step {step} again with the same settings: it makes the output anew. "
                    "Then look at the disk.",
                )
            (folder / MANIFEST).unlink()  # of a copy: fetched again
        manifest = self.manifest(step, key)
        if manifest is None:
            raise DataError(
                f"{step} has no finished output",
                where=self.location(step, key),
                remedy=f"Run `hllm plan`, then the step {step}.",
            )
        client = s3_client()
        for name, digest in manifest.files.items():
            path = folder / require_relative(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            download(f"{self.location(step, key)}/{name}", below(folder, name), client, digest)
        manifest.write(folder)
        return folder

    def sweep(self, step: str, key: str) -> None:
        """Remove what killed writers left half-written in an output on this machine."""
        sweep(self.folder(step, key))

    def finish(self, manifest: Manifest, carried: Collection[str] = ()) -> None:
        """Publish a finished folder: in S3 every file first (but those carried there before), the manifest
        last.

        Raises:
            InfraError: the lock on the output was lost to another process.
        """
        folder = self.folder(manifest.step, manifest.key)
        self.sweep(manifest.step, manifest.key)
        if self._claim:
            self._claim.require()  # before others' uploads are thrown away
        if self.remote:
            location = self.location(manifest.step, manifest.key)
            client = s3_client()
            try:
                abandon_uploads(f"{location}/", client)  # an output has one writer: these are of a killed one
            except HLLMError as error:  # not every store offers it, not every account may: no reason to stop
                print(f"warning: parts of broken-off uploads stay: {error.first_line}", file=sys.stderr)
            with ThreadPoolExecutor(4) as pool:
                sent = [
                    pool.submit(upload, folder / name, f"{location}/{name}", client)
                    for name in manifest.files
                    if name not in carried
                ]
                for done in sent:
                    done.result()
            if self._claim:
                self._claim.require()
            write_object(f"{location}/{MANIFEST}", manifest.content, client)
        # Here at the very last: a local manifest says "done" to the next run, which would not send anything.
        manifest.write(folder)

    def finished(self, step: str) -> list[Manifest]:
        """Every finished output of a step, oldest first."""
        if self.remote:
            places = [
                place for place in list_objects(f"{self.root}/{step}/") if place.endswith(f"/{MANIFEST}")
            ]
            with ThreadPoolExecutor(8) as pool:  # there may be hundreds
                found = [manifest for manifest in pool.map(_read_remote, places) if manifest]
        else:
            folders = [folder for folder in sorted((self.local / step).glob("*")) if folder.is_dir()]
            found = [manifest for manifest in map(Manifest.read, folders) if manifest]
        return sorted(found, key=lambda manifest: manifest.created_at)

    @contextmanager
    def lock(self, step: str, key: str) -> Iterator[None]:
        """One process at a time per output, of this machine and, in S3, of all. The lock dies with its
        process: in a folder at once, in S3 after `hllm.work.lease.STALE_SECONDS`.

        Raises:
            InfraError: another process is writing this output.
        """
        import fcntl

        folder = self.local / step
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / f".{key}.lock").open("a+")
        except (NotADirectoryError, FileNotFoundError, PermissionError) as error:  # not a full disk: 75
            raise ConfigError(
                f"outputs cannot be written there: {error.strerror}",
                where=str(folder),
                remedy="Choose another run.root.",
            ) from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise InfraError(
                    f"another process is writing this output: {file.read() or 'it has just begun'}",
                    where=self.location(step, key),
                    remedy="Wait for it, then run again.",
                ) from None
            file.truncate(0)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            who = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
            with suppress(OSError):  # on a full disk it holds without a word, so that outputs can be removed
                os.write(file.fileno(), who.encode())
            if not self.remote:
                yield
                return
            with claimed(f"{self.root}/{step}/.{key}.lock", who) as self._claim:
                try:
                    yield
                finally:
                    self._claim = None


def sweep(folder: Path) -> None:
    """Remove the half-written files of killed writers. Nobody else may be writing there."""
    for path in folder.rglob(".*"):
        if LEFTOVER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _read_remote(location: str) -> Manifest | None:
    content = read_object(location)
    return None if content is None else Manifest.parse(content, location)


def user_name() -> str:
    """Who runs this process, for audit trails. In a container that may be a number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def file_digests(folder: Path, exclude: tuple[str, ...] = (WORK,)) -> dict[str, str]:
    """Relative name -> sha256 of every file; `exclude` names top folders (scratch: checkpoints, partial
    shards)."""
    return {
        str(path.relative_to(folder)): digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST
        and path.relative_to(folder).parts[0] not in exclude
        and not path.name.startswith(".")
    }


def file_schemas(folder: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What the Parquet files and arrays among these hold, from their headers alone."""
    import numpy as np
    import pyarrow.parquet as parquet

    found = {}
    for name in names:
        if name.endswith(".parquet"):
            schema = parquet.read_schema(folder / name)
            found[name] = {column.name: str(column.type) for column in schema}
        elif name.endswith(".npy"):
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            found[name] = {"type": str(array.dtype), "shape": " x ".join(map(str, array.shape))}
    return found


def fingerprint(location: str, memory: Path | None = None) -> str:
    """What a source file's content is known by: sha256 of a local file, entity tag and size of an S3
    object. The digest of a local file is remembered in the folder `memory`."""
    if is_s3(location):
        head = head_object(location)
        return f"{head['ETag']}-{head['ContentLength']}"
    try:
        return known_digest(Path(location), memory) if memory else digest_file(Path(location))
    except FileNotFoundError:
        raise DataError("no such file", where=location) from None
    except IsADirectoryError:
        raise DataError("is a folder, not a file", where=location) from None


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
