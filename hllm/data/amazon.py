"""The amazon source: `NAME.inter.json` {user: [item, ...]} and `NAME.item.json` {item: {field: text}}."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hllm.data.ids import AS_TEXT, Lost, whole
from hllm.data.json_values import Fields, Number, is_broken, pairs
from hllm.data.schema import RESERVED
from hllm.errors import DataError

if TYPE_CHECKING:
    from hllm.data.readers import Source

DEEPEST = 100
"""Arrays and objects within each other. No catalogue is so deep; a file made to harm may be."""


def amazon_items(source: Source) -> Iterator[pa.RecordBatch]:
    """item_id and one string column per field that some item has; the file is read twice, fields first."""
    where = source.items_at
    with source.at_hand(where) as path:
        found: dict[str, None] = {}
        for _, item in _checked(path, where, dict):
            found.update(dict.fromkeys(item))
        fields = list(found)
        _refuse_names(fields, where)
        for part in _chunks(pairs(path, where), source.data.batch_rows):
            columns = {"item_id": _array([item for item, _ in part], where)}
            for field in fields:
                columns[field] = _array([plain(item.get(field), where) for _, item in part], where)
            yield pa.record_batch(list(columns.values()), names=list(columns))


def _refuse_names(fields: list[str], where: str) -> None:
    if taken := [field for field in fields if field.casefold() in RESERVED]:
        raise DataError(f"has a field {taken[0]!r}, which is a name of ours; rename it", where=where)
    folded = Counter(field.casefold() for field in fields)  # names are compared as DuckDB does
    if alike := [field for field in fields if folded[field.casefold()] > 1]:
        raise DataError(
            "has fields whose names differ only in case; rename them", where=where, examples=alike
        )
    if "" in fields:
        raise DataError("has a field without a name", where=where)
    if damaged := [field for field in fields if "\0" in field]:
        raise DataError("has a field whose name holds NUL", where=where, examples=damaged)


def amazon_events(source: Source) -> Iterator[pa.RecordBatch]:
    """user_id, item_id, and as the timestamp the event's place among the user's events."""
    where = source.interactions_at
    with source.at_hand(where) as path:
        for _ in _checked(path, where, list):
            pass
        for part in _chunks(_numbered(pairs(path, where)), source.data.batch_rows):
            users, items, order = zip(*part, strict=True)
            yield pa.record_batch(
                [
                    _array(users, where),
                    _array([_id(item, where) for item in items], where),
                    pa.array([source.data.order_starts + nth for nth in order], pa.int64()),
                ],
                names=["user_id", "item_id", "timestamp"],
            )


def _numbered(log: Iterator[tuple[str, list[Any]]]) -> Iterator[tuple[str, Any, int]]:
    had: Counter[str] = Counter()  # a user who is named again goes on where the earlier list ended
    for user, items in log:
        for nth, item in enumerate(items, start=had[user] + 1):
            yield user, item, nth
        had[user] += len(items)


def _checked(path: Path, where: str, of: type) -> Iterator[tuple[str, Any]]:
    """The pairs of the file, and at its end an error if some of them are not what they should be.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON, or holds something else.
    """
    repeated, wrong = _Tally(), _Tally()
    found = 0
    for key, value in pairs(path, where):
        found += 1
        if not isinstance(value, of):
            wrong.add(key)
            continue
        if isinstance(value, Fields) and value.repeated:
            repeated.add(key)
        yield key, value
    for tally, says, remedy in (
        (wrong, f"has values that are not a JSON {'object' if of is dict else 'array'}", ""),
        (
            repeated,
            "has items that name a field twice",
            "Only one of the two texts could be kept: give each field one value.",
        ),
    ):
        if tally.count:
            raise DataError(
                says, where=where, count=(tally.count, found), examples=tally.examples, remedy=remedy
            )


class _Tally:
    """How many, and the first few of them."""

    def __init__(self) -> None:
        self.count, self.examples = 0, list[str]()

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < 3:
            self.examples.append(example)


def _chunks(things: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(things, size)):
        yield part


def _array(values: Sequence[str | None], where: str) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        broken = [value for value in values if value is not None and is_broken(value)]
    raise DataError(
        "has texts that hold half a character (a lone surrogate such as \\ud83d)",
        where=where,
        count=(len(broken), len(values)),
        examples=broken,
        remedy="Something cut a text in the middle of an emoji: cut by characters, not by UTF-16 units.",
    )


def _id(value: Any, where: str) -> str | None:
    if value is None or type(value) is str:
        return value
    if type(value) is not Number:
        kind = {bool: "true or false", list: "an array", Fields: "an object"}[type(value)]
        raise DataError(f"holds {kind} where an item's id is expected", where=where, remedy=AS_TEXT)
    return value if value.isdecimal() else number_id(value, where)


def number_id(number: Number, where: str) -> str:
    """The id that a JSON number is: 100000.0 and 1e5 are 100000.

    Raises:
        DataError: it has a fraction, or may have lost digits.
    """
    try:
        return whole(number)
    except Lost:
        what = "holds ids as floating point numbers whose last digits may be lost"
    except ValueError:
        what = "holds numbers that are not whole, not ids"
    raise DataError(what, where=where, examples=[str(number)], remedy=AS_TEXT)


def plain(value: Any, where: str, depth: int = 0) -> str | None:
    """A field's text: parts of an array are joined by commas.

    Raises:
        DataError: arrays and objects lie too deep within each other.
    """
    if value is None or isinstance(value, str):
        return value
    if depth > DEEPEST:
        raise DataError(f"has values that are nested more than {DEEPEST} deep", where=where)
    if isinstance(value, list):
        said = [plain(part, where, depth + 1) for part in value]
        return ", ".join(part for part in said if part is not None)
    if isinstance(value, dict):
        pairs = ((name, plain(part, where, depth + 1)) for name, part in value.items())
        return ", ".join(f"{name}: {part}" for name, part in pairs if part is not None)
    return str(value)
