"""Errors of the system and of libraries as the few that a scheduler acts on: one table, in one place.

Code that knows what failed raises `HLLMError` itself, with a better message. What nobody caught comes here
before it would be called a bug: by its errno, by the library that raised it, or by what it says. Libraries
are known by the names of their modules, so none is imported for it.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator

from hllm.errors import ConfigError, DataError, HLLMError, InfraError

DISK = "Free some room (`hllm prune`, ~/.cache/hllm, /tmp); in a cluster ask for more: runner.pod.disk."
AGAIN = "Run the same command again; it continues."

_CONFIG = (
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENODEV,
    errno.ENXIO,
)
"""Errors of a path that somebody named: nothing gets better by itself. All others are of a disk or a
network."""

Table = tuple[tuple[str, tuple[str, ...], type[HLLMError], str], ...]
LIBRARIES: Table = (
    ("botocore", (), InfraError, "Check AWS_ENDPOINT_URL_S3 and the network; then run it again."),
    ("s3transfer", (), InfraError, "Check AWS_ENDPOINT_URL_S3 and the network; then run it again."),
    ("boto3", (), InfraError, "Check AWS_ENDPOINT_URL_S3 and the network; then run it again."),
    ("requests", (), InfraError, "A server did not answer as it should. " + AGAIN),
    ("urllib3", (), InfraError, "A server did not answer as it should. " + AGAIN),
    ("http", (), InfraError, "A server did not answer as it should. " + AGAIN),
    ("aiohttp", (), InfraError, "A server did not answer as it should. " + AGAIN),
    ("ssl", (), InfraError, "Check the certificate of the server and of its authority."),
    ("redis", ("Authentication", "NoPermission"), ConfigError, "Check HLLM_FEAST_PASSWORD."),
    ("redis", ("DataError",), DataError, ""),
    ("redis", (), InfraError, "Check feast.online_url, and Redis itself. " + AGAIN),
    ("psycopg", ("InsufficientPrivilege", "InvalidPassword", "InvalidAuth"), ConfigError, "Check the role."),
    ("psycopg", ("InvalidCatalogName",), ConfigError, "The database does not exist: create it."),
    (
        "psycopg",
        ("DataError", "ProgramLimit", "UntranslatableCharacter", "StringDataRight", "NumericValue", "Check"),
        DataError,
        "PostgreSQL cannot hold a value: look at the ids.",
    ),
    ("psycopg", (), InfraError, "Check PostgreSQL. " + AGAIN),
    ("sqlite3", (), InfraError, "Is the database file whole, and may this user write it?"),
    ("sqlalchemy", (), InfraError, "Check the database. " + AGAIN),
    ("duckdb", ("Conversion", "InvalidInput", "Serialization", "OutOfRange"), DataError, ""),
    ("duckdb", ("IOException", "OutOfMemory", "HTTP", "Interrupt", "Fatal", "Connection"), InfraError, AGAIN),
    ("_duckdb", ("Conversion", "InvalidInput", "Serialization", "OutOfRange"), DataError, ""),
    (
        "_duckdb",
        ("IOException", "OutOfMemory", "HTTP", "Interrupt", "Fatal", "Connection"),
        InfraError,
        AGAIN,
    ),
    ("pyarrow", ("Memory",), InfraError, "The machine has too little memory."),
    ("pyarrow", (), DataError, "Is the file whole? `hllm doctor` and the step that wrote it say more."),
    (
        "safetensors",
        (),
        DataError,
        "The file is no whole safetensors file (half a copy, a Git LFS pointer?).",
    ),
    ("zlib", (), DataError, "The file is damaged: copy it again."),
    ("gzip", (), DataError, "The file is damaged, or not compressed at all."),
    ("lzma", (), DataError, "The file is damaged: copy it again."),
    ("zipfile", (), DataError, "The file is damaged: copy it again."),
    ("tarfile", (), DataError, "The file is damaged: copy it again."),
    ("json", (), DataError, "The file is damaged, or no JSON."),
    ("ijson", (), DataError, "The file is damaged, or no JSON."),
    ("tomllib", (), ConfigError, "The file is no TOML."),
    ("yaml", (), ConfigError, "The file is no YAML."),
    ("pydantic", (), ConfigError, ""),
    ("pydantic_core", (), ConfigError, ""),
    ("google.protobuf", (), InfraError, "A file of the feature store is damaged: `hllm doctor` names it."),
    ("feast", ("NotFound",), InfraError, "`hllm doctor` looks at the registry. " + AGAIN),
    ("feast", (), InfraError, "`hllm doctor` looks at the feature store. " + AGAIN),
    ("mlflow", (), InfraError, "`hllm doctor` looks at MLflow. " + AGAIN),
    ("great_expectations", (), DataError, ""),
    ("tokenizers", (), DataError, "The tokenizer's files are damaged."),
    ("huggingface_hub", (), ConfigError, "The backbone is neither a folder nor a model that can be reached."),
    ("kubernetes", (), InfraError, AGAIN),
    ("torch", ("OutOfMemory",), InfraError, "Lower the batch_size, or raise accumulate."),
    ("torch.distributed", (), InfraError, "Another process of this step is gone: its own message says why."),
    ("concurrent.futures", (), InfraError, "A worker process was killed (too little memory?)."),
    ("subprocess", (), InfraError, AGAIN),
)
"""Module, beginnings of class names (none: all), class, remedy; the first line that fits counts."""

READERS = ("numpy/lib/", "safetensors/", "tokenizers/", "zipfile", "gzip.py", "json/", "pyarrow/", "ijson/")
"""Where a ValueError or KeyError comes from a file that is not what it should be."""

WORDS = (
    ("No space left on device", InfraError, DISK),
    ("disk is full", InfraError, DISK),
    ("Disk quota exceeded", InfraError, DISK),
    ("Read-only file system", InfraError, "The disk is read-only: look at why, or choose another place."),
    ("embedded null", ConfigError, "A path or name holds a NUL character."),
    ("CUDA out of memory", InfraError, "Lower the batch_size, or raise accumulate."),
    ("CUDA error", InfraError, "The GPU failed; another one, or a restart of the machine, may help."),
    ("NCCL", InfraError, "Another process of this step is gone: its own message says why."),
    ("PytorchStreamReader", DataError, "The file is damaged, or no file of weights."),
    ("can't start new thread", InfraError, "The machine has too many threads."),
)


def as_ours(error: BaseException) -> HLLMError | None:
    """The error that a user is to meet instead, or None: then it is a bug of ours."""
    for each in _chain(error):
        if isinstance(each, HLLMError):
            return each
        found = _of_words(each) or _of_system(each) or _of_library(each) or _of_python(each)
        if found is not None:
            return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and the driver's own error that a wrapper keeps. Not what was being
    handled when it happened by chance: a bug of ours in a handler stays one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "orig", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__


def _of_words(error: BaseException) -> HLLMError | None:
    said = str(error)
    for words, kind, remedy in WORDS:
        if words in said:
            what = f"the disk is full: {_one_line(error)}" if remedy == DISK else _one_line(error)
            return kind(what, where=None if remedy == DISK else _where(error), remedy=remedy)
    return None


def _of_system(error: BaseException) -> HLLMError | None:
    number = getattr(error, "errno", None)
    if not isinstance(error, OSError) or not isinstance(number, int):
        return None
    what = os.strerror(number) if number > 0 else _one_line(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return InfraError(f"the disk is full: {_one_line(error)}", remedy=DISK)
    if number in _CONFIG:
        remedy = "Correct the setting or option that names it, or its owner and rights."
        return ConfigError(what[:1].lower() + what[1:], where=_where(error), remedy=remedy)
    return InfraError(what[:1].lower() + what[1:], where=_where(error), remedy=AGAIN)


def _of_library(error: BaseException) -> HLLMError | None:
    for kind in type(error).__mro__:
        for module, beginnings, ours, remedy in LIBRARIES:
            named = kind.__module__ == module or kind.__module__.startswith(module + ".")
            if named and (not beginnings or any(word in kind.__name__ for word in beginnings)):
                return ours(
                    f"{_one_line(error)} ({type(error).__name__})", where=_where(error), remedy=remedy
                )
    return None


def _of_python(error: BaseException) -> HLLMError | None:
    if isinstance(error, UnicodeEncodeError):
        return ConfigError(f"a path or name cannot be written: {_one_line(error)}")
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"is not UTF-8: {_one_line(error)}", where=_where(error))
    if isinstance(error, MemoryError):
        return InfraError("there is too little memory", remedy="Give the step more: runner.pod.memory.")
    if isinstance(error, RecursionError):
        return DataError("a value is nested too deeply to be read")
    if isinstance(error, (EOFError, ConnectionError, TimeoutError)):
        kind = DataError if isinstance(error, EOFError) else InfraError
        return kind(_one_line(error) or type(error).__name__)
    if isinstance(error, OSError):  # without a number: gzip and others say so of a file's content
        return DataError(_one_line(error), where=_where(error))
    if isinstance(error, (ValueError, KeyError, IndexError)):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and any(part in frames[-1].filename for part in READERS):
            return DataError(f"a file is not what it should be: {_one_line(error)}", remedy="Is it whole?")
    return None


def _where(error: BaseException) -> object:
    return getattr(error, "filename", None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
