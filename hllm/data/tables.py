"""Files as Arrow record batches: Parquet and delimited text, a bounded number of rows at a time.

Delimited text is read as strings only: what a cell means is decided later, so that one bad cell is one bad
row and not the end of the file. What is wrong with the file itself (a missing column, a cut-off end, bytes
that are not UTF-8) ends here.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hllm.data.json_values import Fields, is_broken, records
from hllm.data.parts import kind_of, require_file
from hllm.data.streams import (
    beginning,
    is_parquet_inside,
    open_text,
    refuse_damaged,
    refuse_foreign,
    refuse_other_encoding,
)
from hllm.errors import ConfigError, DataError
from hllm.work.objects import BLOCK_BYTES as READ_BYTES
from hllm.work.objects import is_s3, open_object

BLOCK_BYTES = 2 << 20
"""Delimited text is parsed this much at a time; no row may be longer. Arrow reads about 36 blocks ahead: that
is the memory which reading a long log takes."""


def read_table(
    path: Path, wanted: Mapping[str, str], batch_rows: int, name: str = ""
) -> Iterator[pa.RecordBatch]:
    """Batches with the `wanted` columns only (column -> the setting that names it), in the file's order.

    Parquet in S3 (`name`) is read there, by ranges; `path` is where everything else lies.

    Raises:
        DataError: the file is missing, empty, damaged, not UTF-8, or lacks a column.
    """
    name = name or str(path)
    kind = kind_of(path.name)
    if is_s3(name) and kind == "parquet":
        return _parquet(open_object(name), wanted, batch_rows, name)
    require_file(path, name)
    if is_parquet_inside(path):
        return _parquet(path, wanted, batch_rows, name)
    refuse_foreign(path, name)
    if kind == "parquet":
        head = beginning(path)
        raise DataError(
            f"cannot be read as Parquet: it begins with {head[:8]!r}",
            where=name,
            remedy="If it is text, name it .csv or .jsonl. If not: is the file complete?",
        )
    if kind == "json":
        return read_records(path, wanted, batch_rows, name)
    if kind == "csv":
        tabs = "tsv" in path.name.lower().split(".")[1:]
        return read_delimited(path, wanted, batch_rows, name, delimiter="\t" if tabs else ",")
    raise ConfigError("is neither .parquet nor .csv nor .tsv nor .jsonl", where=name)


def open_parquet(source: Path | BinaryIO) -> pa.parquet.ParquetFile:
    """A Parquet file whose `iter_batches` holds a few blocks of each column, however long the file and its
    row groups are: by itself it reads ahead, and keeps what it has read until the end."""
    return pa.parquet.ParquetFile(source, pre_buffer=False, buffer_size=READ_BYTES)


def read_delimited(
    path: Path,
    wanted: Mapping[str, str],
    batch_rows: int,
    name: str,
    delimiter: str,
    quote: str | bool = '"',
) -> Iterator[pa.RecordBatch]:
    """Every cell as a string; an empty cell is null. Values may hold newlines when they are quoted.

    Where the header has the wanted columns between semicolons, tabs or bars instead, it is read so.
    """
    require_file(path, name)
    with _readable(path, name, "delimited text"):
        if quote:
            delimiter = _delimiter(path, name, wanted, delimiter)
        parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote, newlines_in_values=bool(quote))
        with _open(path, name, parse, pa.csv.ConvertOptions()) as reader:
            names = reader.schema.names
        _require(wanted, names, name)
        convert = pa.csv.ConvertOptions(
            include_columns=list(wanted),
            column_types=dict.fromkeys(wanted, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        with _open(path, name, parse, convert) as reader:
            for batch in reader:
                yield from _slices(batch, batch_rows)


def _delimiter(path: Path, name: str, wanted: Mapping[str, str], delimiter: str) -> str:
    """The one that has the wanted columns in the header: the expected one, or another."""
    with open_text(path, name) as file:
        head = file.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff\r\n")
    for each in (delimiter, *(other for other in ",;\t|" if other != delimiter)):
        with contextlib.suppress(csv.Error):
            names = next(csv.reader(io.StringIO(head, newline=None), delimiter=each), [])
            if set(wanted) <= set(names):
                return each
    return delimiter


def _open(
    path: Path, name: str, parse: pa.csv.ParseOptions, convert: pa.csv.ConvertOptions
) -> pa.csv.CSVStreamingReader:
    # One thread: the row number in a parse error is only known then.
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    return pa.csv.open_csv(
        open_text(path, name), read_options=read, parse_options=parse, convert_options=convert
    )


def read_records(
    path: Path, wanted: Mapping[str, str], batch_rows: int, name: str
) -> Iterator[pa.RecordBatch]:
    """JSON lines, or one array of objects: every value as the text that the file has for it, an array of
    values as one text with commas between them. A field that a record lacks is null."""
    seen: dict[str, None] = {}
    rows, found = 0, records(path, name)
    while part := list(islice(found, batch_rows)):
        for at, record in enumerate(part, start=rows + 1):
            if not isinstance(record, Fields):
                raise DataError(f"record {at:,} is not a JSON object", where=name, examples=[record])
            if record.repeated:
                raise DataError(f"record {at:,} names a field twice", where=name)
            if not record.keys() <= seen.keys():
                seen.update(dict.fromkeys(record))
        rows += len(part)
        columns = [
            pa.array([_cell(record.get(column), column, name) for record in part], pa.string())
            for column in wanted
        ]
        yield pa.record_batch(columns, names=list(wanted))
    if rows:
        _require(wanted, list(seen), name)


def _cell(value: Any, column: str, name: str) -> str | None:
    if isinstance(value, str):
        if is_broken(value):
            raise DataError(
                "holds half a character (a lone surrogate such as \\ud83d)", where=f"{name}, column {column}"
            )
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        cells = [_cell(part, column, name) for part in value if not isinstance(part, list | dict)]
        if len(cells) == len(value):
            return ", ".join(cell for cell in cells if cell is not None)
    if value is not None:
        kind = "objects" if isinstance(value, dict) else "arrays of arrays or objects"
        raise DataError(f"holds {kind}, not text", where=f"{name}, column {column}")
    return None


def _parquet(
    source: Path | BinaryIO, wanted: Mapping[str, str], batch_rows: int, name: str
) -> Iterator[pa.RecordBatch]:
    with _readable(Path(name), name, "Parquet"), open_parquet(source) as file:
        _require(wanted, file.schema_arrow.names, name)
        rows = 0
        for batch in file.iter_batches(batch_size=batch_rows, columns=list(wanted)):
            batch = batch.select(list(wanted))
            _refuse_invalid(batch, rows, name)
            rows += batch.num_rows
            yield batch


def _refuse_invalid(batch: pa.RecordBatch, rows: int, name: str) -> None:
    """Arrow hands on whatever bytes a file calls a string."""
    for column in batch.schema.names:
        try:
            batch.column(column).validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"is not UTF-8 somewhere in rows {rows + 1:,} to {rows + batch.num_rows:,}: "
                f"{' '.join(str(error).split())[:200]}",
                where=f"{name}, column {column}",
                remedy="Write it again from text that is decoded with its own encoding.",
            ) from None


def _slices(batch: pa.RecordBatch, rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _require(wanted: Mapping[str, str], names: list[str], name: str) -> None:
    for column, setting in wanted.items():
        if names.count(column) > 1:
            raise DataError(f"has {names.count(column)} columns named {column!r}", where=name)
        if column not in names:
            near = _nearest(column, names)
            raise DataError(
                f"has no column {column!r}."
                + (f" Did you mean {' or '.join(map(repr, near))}?" if near else ""),
                where=name,
                remedy=f"{f'Set {setting}. ' if setting else ''}Its columns: {', '.join(names[:30])}.",
            )


def _nearest(column: str, names: list[str]) -> list[str]:
    def folded(name: str) -> str:
        return "".join(letter for letter in name.casefold() if letter.isalnum())

    alike = [name for name in names if folded(name) == folded(column)]
    return alike[:3] or difflib.get_close_matches(column, names, n=3, cutoff=0.5)


class _readable:
    """Arrow's errors about a file, as one sentence about that file."""

    def __init__(self, path: Path, name: str, kind: str) -> None:
        self.path, self.name, self.kind = path, name, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if not isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError):
            return
        message = " ".join(str(error).split())
        if self.kind != "Parquet":
            refuse_damaged(self.path, self.name, error)
            refuse_other_encoding(self.path, self.name)
            if "straddling" in message:
                raise DataError(
                    f"has a row longer than {BLOCK_BYTES >> 20} MiB: probably a quote that is never closed",
                    where=self.name,
                ) from None
        if "Empty CSV" in message:
            raise DataError("has no rows", where=self.name) from None
        remedy = "Is the file complete? Write it again, or copy it again from its source."
        if "Expected" in message:
            remedy = "A value with a delimiter or a line break in it must be quoted, and every quote closed."
        if "ncrypt" in message:
            remedy = "Write it without encryption: no keys are kept here."
        raise DataError(
            f"cannot be read as {self.kind}: {message[:300]}", where=self.name, remedy=remedy
        ) from None
