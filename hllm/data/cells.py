"""What a cell means: times, labels and texts out of whatever type a file stores them in (`ids` has ids).

A cell that cannot be read becomes null and its text is kept beside it (`timestamp_raw`, `label_raw`): the
validation step quarantines the row, with what stood there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, cast, get_args

import pyarrow as pa
import pyarrow.compute as pc

from hllm.data.ids import holds
from hllm.errors import DataError

Unit = Literal["s", "ms", "us", "ns", "iso"]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def seconds(column: pa.Array, unit: Unit, where: str) -> tuple[pa.Array, pa.Array]:
    """(seconds since 1970 UTC, the text of cells that are no time). Fractions of a second are cut off."""
    whole, _, raw = moments(column, unit, where)
    return whole, raw


def moments(column: pa.Array, unit: Unit, where: str) -> tuple[pa.Array, pa.Array, pa.Array]:
    """(seconds since 1970 UTC, nanoseconds within the second, the text of cells that are no time)."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("s" if pa.types.is_date32(kind) else "ms"))
    if pa.types.is_timestamp(
        column.type
    ):  # never by way of a finer unit, in which the year 300,000 is another
        return _parts(column.cast(pa.int64()), PER_SECOND[column.type.unit])
    if pa.types.is_decimal(kind):
        column, kind = column.cast(pa.string()), pa.string()
    if pa.types.is_integer(kind) and unit != "iso":
        return _parts(column.cast(pa.int64(), safe=False), PER_SECOND[unit])
    if pa.types.is_null(kind):
        return _parts(column.cast(pa.int64()), 1)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_text(kind)):
        raise DataError(f"holds {kind}, not times", where=where, remedy="See data.timestamp_unit.")
    if unit != "iso" and _is_text(kind):
        column = column.cast(pa.string())
        try:  # the common case, without a Python loop
            if holds(column, b"x") or holds(column, b"X"):  # Arrow reads 0x10 as 16
                raise pa.ArrowInvalid
            return _parts(column.cast(pa.int64()), PER_SECOND[unit])
        except pa.ArrowInvalid:
            pass
    pairs, raw = _each(
        column,
        _iso_moment if unit == "iso" else lambda cell: _number_moment(cell, PER_SECOND[unit]),
        pa.struct([("seconds", pa.int64()), ("nanos", pa.int32())]),
    )
    return pc.struct_field(pairs, "seconds"), pc.struct_field(pairs, "nanos"), raw


def _parts(column: pa.Array, per_second: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    whole = _floor_divide(column, per_second)
    rest = pc.subtract(column, pc.multiply(whole, per_second)) if per_second > 1 else pc.multiply(whole, 0)
    return whole, pc.multiply(rest, 1_000_000_000 // per_second).cast(pa.int32()), _nulls(column)


def fitting_unit(cells: Sequence[str], earliest: float, latest: float) -> Unit | None:
    """The unit in which all of these lie between two moments (seconds), found by trying each."""
    for unit in get_args(Unit):
        with suppress(ValueError, OverflowError):
            read = [_iso_moment(c) if unit == "iso" else _number_moment(c, PER_SECOND[unit]) for c in cells]
            if read and all(time is not None and earliest <= time["seconds"] <= latest for time in read):
                return cast("Unit", unit)
    return None


def unit_advice(column: str, unit: str, cells: Sequence[str], earliest: float, latest: float) -> str:
    """What helps where these cells of `data.columns.COLUMN` are no times in `unit`, or absurd ones."""
    setting = f"data.{column}_unit"
    fits = fitting_unit(cells, earliest, latest)
    if fits and fits != unit:
        return f'{_LOOK[fits]}: set {setting} = "{fits}".'
    if cells and not any(_is_number(cell) for cell in cells):
        return (
            "Write them as ISO 8601 with the offset of their zone, such as 2024-03-31T12:00:00+02:00, and "
            f'set {setting} = "iso". Other orders, and names of zones other than UTC, are not read.'
        )
    return f'{setting} is "{unit}". Does data.columns.{column} name the right column?'


_LOOK = {
    "s": "These look like seconds",
    "ms": "These look like milliseconds",
    "us": "These look like microseconds",
    "ns": "These look like nanoseconds",
    "iso": "These look like dates",
}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def labels(column: pa.Array, where: str) -> tuple[pa.Array, pa.Array]:
    """(labels as small integers, the text of cells that are none); an empty cell is no label."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())
    kind = column.type
    if pa.types.is_boolean(kind):
        return column.cast(pa.int8()), _nulls(column)
    if not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind) or _is_text(kind)
    ):
        raise DataError(f"holds {kind}, not labels (0 or 1)", where=where)
    return _each(column, _label, pa.int8())


def numbers(column: pa.Array) -> tuple[list[float | None], pa.Array]:
    """(numbers, the text of cells that are none)."""
    values, raw = _each(column, lambda cell: None if _missing(cell) else float(str(cell)), pa.float64())
    return values.to_pylist(), raw


def texts(column: pa.Array, where: str) -> pa.Array:
    """Any scalar as text; a list of texts is joined by commas.

    Raises:
        DataError: the type has no text, or its bytes are not UTF-8.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return texts(column.dictionary_decode(), where)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_nested(kind.value_type) or _is_bytes(kind.value_type):
            raise DataError(f"holds {kind}, not text", where=where)
        lists = column.to_pylist()
        return pa.array(
            [
                None if cells is None else ", ".join(str(cell) for cell in cells if cell is not None)
                for cells in lists
            ],
            pa.string(),
        )
    if pa.types.is_floating(kind):  # a year with gaps is stored as 1995.0, and cast to 1995
        column = pc.if_else(pc.is_nan(column.cast(pa.float64())), None, column)
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"holds {kind}, not text", where=where) from None


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _nulls(column: pa.Array) -> pa.Array:
    return pa.nulls(len(column), pa.string())


def _floor_divide(column: pa.Array, by: int) -> pa.Array:
    if by == 1:
        return column
    quotient = pc.divide(column, by)  # towards zero
    below = pc.less(column, pc.multiply(quotient, by))
    return pc.subtract(quotient, pc.if_else(below, 1, 0)).cast(pa.int64())


def _each(
    column: pa.Array, read: Callable[[object], Any], kind: pa.DataType
) -> tuple[pa.Array, pa.Array]:
    values: list[Any] = []
    raw: list[str | None] = []
    for cell in column.to_pylist():
        try:
            values.append(read(cell))
            raw.append(None)
        except (ValueError, OverflowError):
            values.append(None)
            raw.append(str(cell))
    return pa.array(values, kind), pa.array(raw, pa.string())


def _number_moment(cell: object, per_second: int) -> dict[str, int] | None:
    if _missing(cell):
        return None
    try:
        number = Decimal(str(cell))
    except InvalidOperation:
        raise ValueError from None
    if not number.is_finite() or number.adjusted() > 40:
        raise OverflowError
    whole, rest = divmod(math.floor(number * 1_000_000_000 / per_second), 1_000_000_000)
    if abs(whole) >= 2**63:
        raise OverflowError
    return {"seconds": whole, "nanos": rest}


def _iso_moment(cell: object) -> dict[str, int] | None:
    if _missing(cell):
        return None
    # BigQuery and others write the zone as a word; Java in brackets behind the offset.
    text = re.sub(
        r" ?(UTC|GMT)$|(?<=[Z\d])\[[\w/+-]+\]$", lambda found: "Z" if found[1] else "", str(cell).strip()
    )
    moment = datetime.fromisoformat(text)
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH
    nanos = since.microseconds * 1_000
    finer = re.search(r"[.,]\d{6}(\d{1,3})", text)  # beyond what a datetime holds
    if finer:
        nanos += int(finer[1].ljust(3, "0"))
    return {"seconds": since.days * 86_400 + since.seconds, "nanos": nanos}


def _label(cell: object) -> int | None:
    if _missing(cell):
        return None
    value = {"true": 1.0, "false": 0.0}.get(str(cell).strip().lower())
    value = float(str(cell)) if value is None else value
    if not value.is_integer() or not -128 <= value <= 127:
        raise ValueError
    return int(value)


def _missing(cell: object) -> bool:
    return cell is None or str(cell).strip().lower() in ("", "nan", "nat", "null", "none", "<na>")
