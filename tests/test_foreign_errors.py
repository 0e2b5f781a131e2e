"""One table: whatever the system or a library raises ends with the code that a scheduler needs."""

from __future__ import annotations

import errno
import gzip
import json
import sqlite3

import duckdb
import pyarrow as pa
import pytest
from safetensors import SafetensorError

from hllm.errors import ConfigError, DataError, InfraError
from hllm.foreign_errors import as_ours


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InfraError),
        (OSError(errno.EDQUOT, "quota"), InfraError),
        (OSError(errno.EROFS, "Read-only file system", "/x"), InfraError),
        (OSError(errno.EIO, "Input/output error"), InfraError),
        (OSError(errno.EACCES, "Permission denied", "/x"), ConfigError),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), ConfigError),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), ConfigError),
        (OSError(errno.ELOOP, "loop", "/x"), ConfigError),
        (OSError(errno.ENAMETOOLONG, "too long", "/x"), ConfigError),
        (ConnectionResetError(errno.ECONNRESET, "reset"), InfraError),
        (TimeoutError(), InfraError),
        (ValueError("embedded null byte"), ConfigError),
        (MemoryError(), InfraError),
        (EOFError("Compressed file ended"), DataError),
        (gzip.BadGzipFile("Not a gzipped file"), DataError),
        (json.JSONDecodeError("half", "{", 1), DataError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), DataError),
        (sqlite3.DatabaseError("file is not a database"), InfraError),
        (duckdb.IOException("Could not write file"), InfraError),
        (duckdb.ConversionException("Could not convert"), DataError),
        (pa.ArrowInvalid("Parquet magic bytes not found"), DataError),
        (SafetensorError("header too large"), DataError),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else one.__name__,
)
def test_it_has_a_class(error: BaseException, ours: type):
    assert type(as_ours(error)) is ours


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError(), ZeroDivisionError()])
def test_a_bug_of_ours_stays_one_also_while_another_error_is_handled(error: Exception):
    assert as_ours(error) is None
    try:
        try:
            raise OSError(errno.EACCES, "Permission denied")
        except OSError:
            raise error  # noqa: B904 - as a handler with a bug in it does
    except Exception as met:
        found = as_ours(met)
    assert found is None


def test_what_an_error_was_raised_from_counts():
    try:
        raise RuntimeError("the step failed") from OSError(errno.ENOSPC, "No space left on device")
    except RuntimeError as error:
        found = as_ours(error)
    assert isinstance(found, InfraError)
    assert "the disk is full" in str(found)
