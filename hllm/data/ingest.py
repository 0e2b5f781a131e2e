"""`hllm ingest`: whatever the source looks like, two canonical tables.

Structure fails here (no such column, a file that is cut off, a column that holds no times at all). Single bad
rows travel on: the validation step puts them in quarantine, with what stood in the cell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from hllm.data.cells import unit_advice
from hllm.data.engine import duck
from hllm.data.ids import AS_TEXT, Spelling, spelled_twice, without_fractions
from hllm.data.readers import Source, has_times, open_source
from hllm.data.schema import conform, interactions_schema, items_schema, window
from hllm.data.tables import open_parquet
from hllm.errors import DataError
from hllm.settings import Validation
from hllm.work.artifacts import clear
from hllm.work.progress import Progress
from hllm.work.step import Context


def ingest(context: Context) -> None:
    """Write items.parquet and interactions.parquet, one batch of the source at a time."""
    clear(context.output)
    source = open_source(context.settings.data, context.work)
    users, items = Spelling("user"), Spelling("item")
    context.rows["items"] = write_items(source, context.output / "items.parquet", items)
    context.rows["interactions"] = write_interactions(
        source, context.settings.validation, context.output / "interactions.parquet", users, items
    )
    for spelling in (users, items):
        settle(spelling, context)
    context.facts["source"] = {"interactions": source.interactions_at, "items": source.items_at}
    if not has_times(source.data):
        first = f"second {source.data.order_starts} + n (data.order_starts)"
        context.facts["times"] = f"made from the order of events: the n-th counts as {first}"
        print(f"ingest: the source has no times; they are {context.facts['times']}", file=sys.stderr)


def settle(spelling: Spelling, context: Context) -> None:
    """Now that every id has been seen: whether "17.0" is the number 17 or a name.

    Raises:
        DataError: digits may be lost, or names and numbers stand beside each other and one number is written
            in two ways.
    """
    spelling.refuse_lost()
    if spelling.are_numbers:
        for path, column in spelling.places:
            _rewrite(path, column)
    elif spelling.places:
        files = {path for path, _ in spelling.places} | set(context.output.glob("*.parquet"))
        column = spelling.places[0][1]
        with duck.connect(context.work, context.settings.run.threads) as db:
            selects = [
                f"SELECT {duck.name(column)} FROM {duck.parquet(path)}"
                for path in sorted(files)
                if column in pa.parquet.read_schema(path).names
            ]
            count, pairs = spelled_twice(db, selects)
        if count:
            raise DataError(
                f"{count:,} {spelling.kind} ids are written in two ways: are they the same?",
                where=column,
                examples=[" and ".join(map(repr, pair)) for pair in pairs],
                remedy=f"Other {spelling.kind} ids are names ({spelling.word!r}). {AS_TEXT}",
            )


def _rewrite(path: Path, column: str) -> None:
    whole = path.with_suffix(".whole")
    with open_parquet(path) as file:
        schema = file.schema_arrow
        at = schema.names.index(column)
        with pa.parquet.ParquetWriter(whole, schema, compression="zstd") as writer:
            for batch in file.iter_batches():
                writer.write_batch(
                    batch.set_column(at, schema.field(at), without_fractions(batch.column(at)))
                )
    whole.replace(path)


def write_items(source: Source, path: Path, ids: Spelling) -> int:
    batches = source.items()
    first = _first(batches, source.items_at)
    schema = items_schema(first.schema.names)
    rows = 0
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _chained(first, batches):
            whole = conform(batch, schema)
            ids.look(whole.column("item_id"), path, "item_id")
            writer.write_batch(whole)
            rows += whole.num_rows
    return rows


def write_interactions(
    source: Source, validation: Validation, path: Path, users: Spelling, items: Spelling
) -> int:
    batches = source.interactions()
    first = _first(batches, source.interactions_at)
    schema = interactions_schema()
    rows = readable = 0
    unreadable: list[str] = []
    with (
        Progress("ingest", total=0, unit="row") as progress,
        pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer,
    ):
        for batch in _chained(first, batches):
            whole = conform(batch, schema)
            users.look(whole.column("user_id"), path, "user_id")
            items.look(whole.column("item_id"), path, "item_id")
            writer.write_batch(whole)
            rows += whole.num_rows
            readable += whole.num_rows - whole.column("timestamp").null_count
            if not readable and len(unreadable) < 3:
                unreadable += pc.unique(whole.column("timestamp_raw").drop_null()).to_pylist()[:3]
            progress.advance(whole.num_rows)
    if not readable:
        _refuse_times(source, validation, rows, unreadable)
    return rows


def _refuse_times(source: Source, validation: Validation, rows: int, unreadable: list[str]) -> None:
    data = source.data
    name = data.columns.timestamp if data.source == "table" else "timestamp"
    earliest, latest = window(validation, datetime.now(UTC))
    remedy = unit_advice("timestamp", data.timestamp_unit, unreadable[:3], earliest, latest)
    what = "holds no timestamp that can be read in any row"
    where = f"{source.interactions_at}, column {name}"
    raise DataError(what, where=where, count=(rows, rows), examples=unreadable, remedy=remedy)


def _first(batches: Iterator[pa.RecordBatch], where: str) -> pa.RecordBatch:
    for batch in batches:
        if batch.num_rows:
            return batch
    raise DataError("has no rows", where=where)


def _chained(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest
