"""The files of one source: a file, or every data file of a folder, a prefix in S3, or a pattern with `*`.

They are read in the order of their names. Nothing is passed over in silence but what begins with `_` or `.`
(`_SUCCESS`, `.crc`): a file of another kind, or of two kinds, is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from hllm.errors import DataError
from hllm.work.artifacts import fingerprint
from hllm.work.objects import head_object, is_s3, object_tags

KINDS = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "jsonl": "json", "ndjson": "json", "json": "json"}
"""What a name says of its file, wherever in the name: `log.csv.gz`, `part-0.snappy.parquet`."""


def kind_of(name: str) -> str | None:
    suffixes = name.rpartition("/")[2].lower().split(".")[1:]
    return next((KINDS[suffix] for suffix in suffixes if suffix in KINDS), None)


def parts(location: str) -> list[str]:
    """
    Raises:
        DataError: a folder without data, or with files that are none, or of more than one kind.
    """
    found = _remote(location) if is_s3(location) else _local(location)
    if found == [location] or not found:
        return [location]
    wrong = [name for name in found if kind_of(name) is None]
    if wrong:
        raise DataError(
            "holds files that are neither Parquet, CSV nor JSON lines by their names",
            where=location,
            count=(len(wrong), len(found)),
            examples=[name.rpartition("/")[2] for name in wrong],
            remedy="Move them away, or name the others by a pattern such as part-*.parquet.",
        )
    if len({kind_of(name) for name in found}) > 1:
        raise DataError(
            "holds files of several kinds: are they the same rows twice?",
            where=location,
            examples=sorted({name.rpartition(".")[2] for name in found}),
            remedy="Name those of one kind by a pattern such as part-*.parquet.",
        )
    return found


def require_file(path: Path, name: str) -> None:
    """
    Raises:
        DataError: there is no regular file at `path` which this process may read, or it is empty.
    """
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            with path.open("rb"):
                pass
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("no such file", where=name) from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long or with a NUL, no permission
        said = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot be opened: {said}", where=name) from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError("is a folder, not a file", where=name)
    if not stat.S_ISREG(found.st_mode):
        raise DataError("is not a regular file", where=name)
    if not found.st_size:
        raise DataError("is an empty file", where=name)


def fingerprint_of(location: str, memory: Path | None = None) -> str:
    """What the content of all parts is known by; digests are remembered in the folder `memory`."""
    found = parts(location)
    if not is_s3(location):
        for name in found:
            require_file(Path(name), name)
    if found == [location]:
        return fingerprint(location, memory)
    tags = _tags(location) if is_s3(location) else {name: fingerprint(name, memory) for name in found}
    start = len(location.rstrip("/"))
    said = "".join(f"{name[start:]}\0{tags[name]}\n" for name in found)
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()


def _shown(name: str) -> bool:
    return not name.startswith(("_", "."))


def _tags(location: str) -> dict[str, str]:
    """Objects of a folder or a pattern in S3, with their entity tags."""
    pattern = _pattern(location)
    if pattern is not None:
        tags = object_tags(location[:pattern].rpartition("/")[0] + "/")
        return {name: tag for name, tag in tags.items() if _matches(name, location)}
    folder = location.rstrip("/") + "/"
    tags = object_tags(folder)
    return {n: t for n, t in tags.items() if n != folder and all(map(_shown, n[len(folder) :].split("/")))}


def _remote(location: str) -> list[str]:
    if not location.endswith("/") and kind_of(location) is not None and _pattern(location) is None:
        with contextlib.suppress(DataError):  # none of this name; Spark names folders so, too
            head_object(location)
            return [location]
    return sorted(_tags(location))


def _pattern(location: str) -> int | None:
    """Where the first `*` or `?` stands."""
    at = [place for mark in "*?" if (place := location.find(mark)) >= 0]
    return min(at) if at else None


def _matches(name: str, pattern: str) -> bool:
    ours, theirs = name.split("/"), pattern.split("/")
    return len(ours) == len(theirs) and all(map(fnmatchcase, ours, theirs))


def _local(location: str) -> list[str]:
    try:
        if Path(location).is_dir():
            return _folder(location)
        exists = Path(location).exists()
    except (OSError, ValueError):  # told where it is opened
        return [location]
    at = _pattern(location)
    if exists or at is None:
        return [location]
    base = location[:at].rpartition("/")[0]
    found = [
        str(path)
        for path in Path(base or ("/" if location.startswith("/") else ".")).glob(
            str(PurePosixPath(location[len(base) :].lstrip("/")))
        )
    ]
    if not found:
        raise DataError("matches no file", where=location)
    return sorted(name for name in found if not Path(name).is_dir())


def _folder(location: str) -> list[str]:
    found: list[str] = []
    for folder, folders, names in os.walk(location, onerror=_refuse):
        folders[:] = sorted(filter(_shown, folders))
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        if linked:
            raise DataError("holds links to folders, which are not followed", where=folder, examples=linked)
        found += [str(Path(folder, name)) for name in filter(_shown, names)]
    if not found:
        raise DataError("is a folder without any file of data", where=location)
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot be opened: {error.strerror}", where=error.filename) from None
