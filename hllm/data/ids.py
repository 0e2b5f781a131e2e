"""Ids: one string each, whatever type a file stores them in, or a refusal.

The number 1 is "1" as an integer, a decimal, a floating point number and in JSON. In text, "1.0" is the
number 1 only where floating point numbers were written: where every id of the kind, in every row of both
tables, is a number. "007", "+5", "0x1F" and "1.0" beside "1.1" or "abc" are names, and stay as they are.
No number is taken from a type or a notation that may have lost some of its digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from hllm.errors import DataError

if TYPE_CHECKING:
    import duckdb

EXACT = {16: 2**11, 32: 2**24, 64: 2**53}
"""From here on a floating point number of so many bits may stand for its neighbour, too."""
NO_ID = ("nan", "NaN", "NaT", "<NA>", "None", "null", "NULL")
"""What programs write where there is no id. A user who is really called so is quarantined, visibly."""
AS_TEXT = "Write the ids as integers or as strings."
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?"
_PLAIN = r"^-?(?:0|[1-9][0-9]*)$"
_DOTTED = r"^-?(?:0|[1-9][0-9]*)\.(?:0*|[0-9]*[eE][+-]?[0-9]{1,3})$"
"""What programs write for a whole floating point number; a name is hardly ever like it."""
_number = re.compile(_NUMBER)


class Lost(ValueError):
    """The number may have lost digits before it was written."""


def ids(column: pa.Array, where: str) -> pa.Array:
    """The ids of a column as strings.

    Raises:
        DataError: the type holds no ids, or some of them may have lost digits or are not whole.
    """
    kind = column.type
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        column = column.dictionary_decode() if pa.types.is_dictionary(kind) else pc.run_end_decode(column)
        return ids(column, where)
    if pa.types.is_string(kind):
        return column
    if (
        pa.types.is_integer(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    ):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        return _from_floats(column, where)
    if pa.types.is_decimal(kind):
        return _from_decimals(column, where)
    if isinstance(kind, pa.UuidType):
        return pa.array([None if cell is None else str(cell) for cell in column.to_pylist()], pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        try:
            return column.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            raise DataError("holds ids that are not UTF-8 text", where=where, remedy=_BYTES) from None
    remedy = _BYTES if pa.types.is_fixed_size_binary(kind) else AS_TEXT
    raise DataError(f"holds {kind}, not ids (strings or integers)", where=where, remedy=remedy)


_BYTES = (
    "Write the ids as text. Of UUIDs this is CAST(id AS VARCHAR) in DuckDB, "
    "str(uuid.UUID(bytes=id)) in Python."
)


def _from_floats(column: pa.Array, where: str) -> pa.Array:
    limit = EXACT[column.type.bit_width]
    cells = pc.if_else(pc.is_nan(column.cast(pa.float64())), None, column.cast(pa.float64()))
    lost = pc.greater_equal(pc.abs(cells), float(limit))
    if pc.any(lost).as_py():
        raise DataError(
            f"holds ids as {column.type} numbers beyond 2^{limit.bit_length() - 1}: "
            "their last digits may be lost already",
            where=where,
            examples=[f"{cell:.0f}" for cell in cells.filter(lost).unique().to_pylist()],
            remedy=AS_TEXT,
        )
    broken = pc.not_equal(cells, pc.floor(cells))
    if pc.any(broken).as_py():
        _refuse_fractions(cells.filter(broken), where)
    return cells.cast(pa.int64()).cast(pa.string())


def _from_decimals(column: pa.Array, where: str) -> pa.Array:
    cells = column.to_pylist()
    broken = [cell for cell in cells if cell is not None and cell != cell.to_integral_value()]
    if broken:
        _refuse_fractions(pa.array(map(str, broken)), where)
    return pa.array([None if cell is None else f"{cell:.0f}" for cell in cells], pa.string())


def _refuse_fractions(found: pa.Array, where: str) -> None:
    raise DataError(
        "holds numbers with a fraction, not ids",
        where=where,
        examples=found.unique().to_pylist(),
        remedy="Does the setting name the right column? Versions and the like are ids as strings.",
    )


def whole(text: str) -> str:
    """The integer that a number's text stands for: "17.0", "1.7e1" -> "17".

    Raises:
        Lost: it is so large, or rounded so (1.23457E+11), that digits may be missing.
        ValueError: it is no number, or not a whole one.
    """
    if not _number.fullmatch(text):
        raise ValueError(text)
    mantissa, exponent, _ = text.lower().partition("e")
    if not exponent and "." not in text:
        return text
    value = Decimal(text)
    if abs(value) >= EXACT[64]:
        raise Lost(text)
    if value != value.to_integral_value():
        raise ValueError(text)
    found = f"{value.copy_abs() if value == 0 else value:.0f}"
    digits = mantissa.lstrip("-").replace(".", "").rstrip("0")
    if exponent and 6 <= len(digits) < len(found.lstrip("-")):  # as spreadsheets and %g round
        raise Lost(text)
    return found


@dataclass
class Spelling:
    """How the ids of one kind (users, items) are written, seen batch by batch over every file of them."""

    kind: str
    word: str | None = None
    """An id that is no whole number."""
    floated: str | None = None
    """An id that is written as a floating point number."""
    lost: str | None = None
    """One of those that may have lost digits."""
    places: list[tuple[Path, str]] = field(default_factory=list)
    """Files and columns that hold some of those."""

    def look(self, ids: pa.Array, path: Path, column: str) -> None:
        floated = [cell for cell in self._suspects(ids) if self._weigh(cell)]
        if floated and (path, column) not in self.places:
            self.places.append((path, column))

    def _suspects(self, ids: pa.Array) -> list[str]:
        """Different ids that may be numbers in floating point notation, at little cost for all others."""
        if self.word is None:
            if _plain(ids):
                return []
            ids = pc.unique(ids.filter(pc.invert(pc.match_substring_regex(ids, _PLAIN))))
            missing = pc.is_in(pc.utf8_trim_whitespace(ids), pa.array(["", *NO_ID]))
            ids = ids.filter(pc.invert(missing))
            numbers = pc.match_substring_regex(ids, f"^{_NUMBER}$")
            words = ids.filter(pc.invert(numbers))
            if len(words):
                self.word = words[0].as_py()
            return ids.filter(numbers).to_pylist()  # type: ignore[no-any-return]
        if not holds(ids, b"."):
            return []
        dotted = ids.filter(pc.match_substring(ids, "."))
        return pc.unique(dotted.filter(pc.match_substring_regex(dotted, _DOTTED))).to_pylist()  # type: ignore[no-any-return]

    def _weigh(self, cell: str) -> bool:
        try:
            whole(cell)
        except Lost:
            if self.lost is None or "." in cell:
                self.lost = cell
        except ValueError:
            self.word = self.word or cell
            return False
        self.floated = self.floated or cell
        return True

    def refuse_lost(self) -> None:
        """
        Raises:
            DataError: ids were written as floating point numbers which may have lost digits.
        """
        # An exponent without a point, 1e20 beside words, is a name like any other.
        if self.lost and (self.word is None or "." in self.lost):
            raise DataError(
                f"{self.kind} ids are written as floating point numbers whose last digits may be lost",
                where=self.places[0][0].stem if self.places else None,
                examples=[self.lost],
                remedy=AS_TEXT,
            )

    @property
    def are_numbers(self) -> bool:
        """Whether "17.0" is the number 17: some ids are written so, and every other id is a number."""
        return self.floated is not None and self.word is None


def _plain(ids: pa.Array) -> bool:
    """Whether all are integers as they are written by everybody (no 007, no 0x1F), told without a regex."""
    if holds(ids, b"-") or pc.any(pc.starts_with(ids, "0")).as_py():
        return False
    try:
        ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def holds(column: pa.Array, byte: bytes) -> bool:
    """Whether a byte stands anywhere in a column of strings: one search through all of its bytes."""
    _, offsets, data = column.buffers()
    if not len(column) or data is None:
        return False
    ends = memoryview(offsets).cast("i")
    first, last = ends[column.offset], ends[column.offset + len(column)]
    return byte in data.slice(first, last - first).to_pybytes()


def without_fractions(ids: pa.Array) -> pa.Array:
    """17.0 -> 17 in a column whose every id is a number."""
    short = pc.replace_substring_regex(ids, r"^(-?[1-9][0-9]*)\.0*$", r"\1")
    if _plain(short):
        return short
    return pa.array([_whole_or_missing(cell) for cell in short.to_pylist()], pa.string())


def _whole_or_missing(cell: str | None) -> str | None:
    try:
        return None if cell is None else whole(cell)
    except ValueError:  # nan and its like: validation tells
        return cell


def spelled_twice(db: duckdb.DuckDBPyConnection, columns: Iterable[str]) -> tuple[int, list[tuple[str, str]]]:
    """How many numbers are there as "17" and as "17.0" (1,000 at the most), and three of them.

    `columns`: SELECTs of one column.
    """
    every = " UNION ".join(columns)
    found = db.execute(
        f"""
        WITH every(id) AS ({every}),
        floated AS (SELECT id, regexp_replace(id, '[.]0*$', '') AS plain FROM every
            WHERE regexp_full_match(id, '-?(0|[1-9][0-9]*)[.]0*'))
        SELECT plain, floated.id FROM floated JOIN every ON every.id = plain
        """
    ).fetchmany(1_000)
    return len(found), sorted(found)[:3]
