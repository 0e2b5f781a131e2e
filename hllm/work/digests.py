"""Digests of files, worked out once for each change of a file.

A file is known again by path, size, time of its last change (two of them) and inode, so a log of ten
gigabytes is read once, and an output costs its readers one look per file. The memory is a file of one JSON
array a line beside the outputs: processes append to it, lines that cannot be read count as unknown, and
losing it costs time alone. Who must not be wrong (`hllm register`, `publish`, `verify`) reads the bytes all
the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from functools import lru_cache
from pathlib import Path

MEMORY = ".digests.jsonl"
SETTLED_SECONDS = 2.0
"""A file that changed so lately is not remembered: it may change again within one tick of the file system."""
MOST_LINES = 50_000
"""A longer memory is begun anew."""

State = tuple[int, int, int, int]
"""Size, mtime_ns, ctime_ns and inode."""


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path, folder: Path) -> str:
    """sha256 of a file, remembered in `folder`."""
    place, state = os.path.abspath(path), _state(path)
    memory = _memory(str(folder))
    found = memory.get(place)
    if found and found[0] == state:
        return found[1]
    digest = digest_file(path)
    settled = time.time() - max(state[1], state[2]) / 1e9 > SETTLED_SECONDS
    if settled and _state(path) == state:
        memory[place] = (state, digest)
        _append(folder / MEMORY, [place, *state, digest])
    return digest


def _state(path: Path) -> State:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@lru_cache(maxsize=16)
def _memory(folder: str) -> dict[str, tuple[State, str]]:
    """What earlier commands remembered; this one adds to it."""
    found: dict[str, tuple[State, str]] = {}
    path, lines = Path(folder) / MEMORY, 0
    try:
        with path.open("rb") as file:
            for lines, line in enumerate(file, start=1):  # noqa: B007 - how many there were
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    place, size, modified, changed, inode, digest = json.loads(line)
                    if isinstance(place, str) and isinstance(digest, str) and len(digest) == 64:
                        found[place] = ((size, modified, changed, inode), digest)
    except OSError:
        return found
    if lines > MOST_LINES:
        with contextlib.suppress(OSError):
            path.unlink()
        return {}
    return found


def _append(path: Path, line: list[object]) -> None:
    """One write of one line: processes that append at once do not mix. Where nothing may be written, nothing
    is remembered."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, b"\n" + json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)
