"""JSON of any length, value by value: one object's pairs, one array's values, or values in lines.

The standard library's decoder reads each value from a window of the file, so memory is bounded by the largest
value. Numbers keep their text (`Number`), and a text with half a character (a lone surrogate) is refused:
what cannot be kept exactly is not kept at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hllm.data.parts import require_file
from hllm.data.streams import texts
from hllm.errors import DataError

WINDOW_BYTES = 1 << 20
LARGEST_VALUE = 256 << 20
"""Characters of one value. A longer one is a file of another shape."""
_space = re.compile(r"[ \t\n\r]*")
_key = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:')
_surrogate = re.compile("[\ud800-\udfff]")


class Number(str):
    """A number as the file writes it."""


class Fields(dict[str, Any]):
    """A JSON object that remembers whether it named a field twice: a dict keeps the last one in silence."""

    repeated = False


def _fields(pairs: list[tuple[str, Any]]) -> Fields:
    found = Fields(pairs)
    found.repeated = len(found) < len(pairs)
    return found


def _refuse_constant(token: str) -> Any:
    raise _Refused(f"{token} is no JSON value")


class _Refused(ValueError):
    """A value that no more of the file would make right."""


_decoder = json.JSONDecoder(
    object_pairs_hook=_fields, parse_int=Number, parse_float=Number, parse_constant=_refuse_constant
)


class _Window:
    """The part of a file's text that is not read yet."""

    def __init__(self, path: Path, name: str) -> None:
        require_file(path, name)
        self.name = name
        self.chunks = texts(path, name, WINDOW_BYTES)
        self.text, self.at, self.passed = next(self.chunks, ""), 0, 0

    def more(self) -> bool:
        chunk = next(self.chunks, None)
        if chunk is None:
            return False
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + chunk, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        if self.at < len(self.text) and self.text[self.at] > " ":
            return self.text[self.at]
        while True:
            match = _space.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        if self.peek() not in expected or not self.peek():
            self.refuse(f"{' or '.join(map(repr, expected))} is missing")
        self.at += 1

    def value(self) -> Any:
        while True:
            self.peek()
            try:
                value, end = _decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.more():  # a number may go on
                    self.at = end
                    return value
            except RecursionError:
                self.refuse("it is nested too deeply")
            except _Refused as error:
                self.refuse(str(error))
            except json.JSONDecodeError as error:
                # What the window cuts off is tried again with more of the file.
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not cut_off or not self.more():
                    self.refuse(error.msg, error.pos)
            unread = len(self.text) - self.at
            if unread > LARGEST_VALUE:
                self.refuse(f"one value is longer than {LARGEST_VALUE >> 20} MiB")
            while len(self.text) - self.at < 2 * unread and self.more():
                pass  # twice as much: no character is tried more often than a few times

    def key(self) -> str:
        """A name in quotes, and the colon behind it."""
        plain = _key.match(self.text, self.at)
        if plain:  # nearly always
            self.at = plain.end()
            return plain[1]
        if self.peek() != '"':
            self.refuse("a key in quotes is missing")
        name: str = self.value()
        self.take(":")
        return name

    def refuse(self, what: str, at: int | None = None) -> None:
        at = self.at if at is None else at
        said = self.text[max(0, at - 20) : at + 20]
        raise DataError(
            f"is not JSON: {what}, at character {self.passed + at + 1:,}",
            where=self.name,
            examples=[said] if said else (),
            remedy="Is the file complete?" if at >= len(self.text) - 16 else "",
        ) from None


def pairs(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The pairs of a file that is one JSON object, a repeated key as often as it stands there.

    Raises:
        DataError: the file is missing, damaged, not UTF-8, not JSON, or holds something else.
    """
    window = _Window(path, name)
    first = window.peek()
    if first != "{":
        kinds = {"[": "holds a JSON array, not an object", '"': "holds a JSON string, not an object"}
        raise DataError(kinds.get(first, "is not JSON" if first else "holds nothing"), where=name)
    window.take("{")
    if window.peek() == "}":
        window.take("}")
    else:
        while True:
            key = window.key()
            value = window.value()
            yield key, value
            if window.peek() == "}":
                window.take("}")
                break
            window.take(",")
    if window.peek() == "{":
        raise DataError(
            "holds JSON lines (more than one object), not one object",
            where=name,
            remedy='A file of lines is read as data.source = "table".',
        )
    if window.peek():
        window.refuse("something follows the object")


def records(path: Path, name: str) -> Iterator[Any]:
    """The values of JSON lines, or of a file that is one array.

    Raises:
        DataError: as in `pairs`.
    """
    window = _Window(path, name)
    if window.peek() != "[":
        while window.peek():
            yield window.value()
        return
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        while True:
            yield window.value()
            if window.peek() == "]":
                window.take("]")
                break
            window.take(",")
    if window.peek():
        window.refuse("something follows the array")


def is_broken(text: str) -> bool:
    """Whether a text holds half a character."""
    return not text.isascii() and _surrogate.search(text) is not None
