"""Where something lies: a local path or `s3://bucket/key`, refused when it is read if it looks like
neither."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
VARIABLE = re.compile(r"\$\{?[A-Za-z_]")


def location(value: str) -> str:
    """The location, `~` written out. Every character of an S3 key stands for itself.

    Raises:
        ValueError: it is neither a path nor `s3://bucket/key`.
    """
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError("holds a control character (a line break?)")
    if value != value.strip():
        raise ValueError("begins or ends with a space")
    if VARIABLE.search(value):
        raise ValueError("names an environment variable, which is not replaced here: write the place itself")
    if value.startswith("s3://"):
        return _s3(value)
    if SCHEME.match(value) or value.lower().startswith("s3:"):
        raise ValueError("is of a scheme unknown here: places are local paths or s3://bucket/key")
    if value.startswith("~"):
        if value != "~" and not value.startswith("~/"):
            raise ValueError("begins with another user's ~: write the whole path")
        value = str(Path.home()) + value[1:]
    if any(len(part.encode()) > 255 for part in value.split("/")) or len(value.encode()) > 4095:
        raise ValueError("is longer than a file system allows")
    return value


def _s3(value: str) -> str:
    bucket, _, key = value.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise ValueError("names no bucket: s3://bucket/key (is a variable empty?)")
    segments = key.rstrip("/").split("/") if key.rstrip("/") else []
    if any(segment in ("", ".", "..") for segment in segments):
        raise ValueError('has an empty part, "." or ".." in its key')
    if len(key.encode()) > 900:  # of the 1,024 bytes of a key, the rest names outputs and their files
        raise ValueError("has a key longer than S3 allows")
    return value


Location = Annotated[str, AfterValidator(location)]
"""A local path, or `s3://bucket/key`."""


def folder(value: str) -> str:
    """A location that is written to.

    Raises:
        ValueError: it is empty, or none.
    """
    if not value:
        raise ValueError("is empty: name a folder or s3://bucket/prefix")
    return location(value)


Folder = Annotated[str, AfterValidator(folder)]
"""A location that outputs are written under."""
