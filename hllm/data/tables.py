"""Files as Arrow record batches: Parquet and delimited text, a bounded number of rows at a time.

Delimited text is read as strings only: what a cell means is decided later, so that one bad cell is one bad
row and not the end of the file. What is wrong with the file itself (a missing column, a cut-off end, bytes
that are not UTF-8) ends here.
"""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

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
    suffixes = path.name.lower().split(".")[1:]
    if is_s3(name) and "parquet" in suffixes:
        return _parquet(open_object(name), wanted, batch_rows, name)
    if not path.is_file():
        raise DataError("is a folder, not a file" if path.is_dir() else "no such file", where=name)
    if path.stat().st_size == 0:
        raise DataError("is an empty file", where=name)
    if "parquet" in suffixes:
        return _parquet(path, wanted, batch_rows, name)
    if "csv" in suffixes or "tsv" in suffixes:
        return read_delimited(path, wanted, batch_rows, name, delimiter="\t" if "tsv" in suffixes else ",")
    raise ConfigError("is neither .parquet nor .csv nor .tsv", where=name)


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
    """Every cell as a string; an empty cell is null. Values may hold newlines when they are quoted."""
    parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote, newlines_in_values=bool(quote))
    with _readable(path, name, "delimited text"):
        names = _open(path, parse, pa.csv.ConvertOptions()).schema.names
        _require(wanted, names, name)
        convert = pa.csv.ConvertOptions(
            include_columns=list(wanted),
            column_types=dict.fromkeys(wanted, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        for batch in _open(path, parse, convert):
            yield from _slices(batch, batch_rows)


def _open(
    path: Path, parse: pa.csv.ParseOptions, convert: pa.csv.ConvertOptions
) -> pa.csv.CSVStreamingReader:
    # One thread: the row number in a parse error is only known then.
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    return pa.csv.open_csv(str(path), read_options=read, parse_options=parse, convert_options=convert)


def _parquet(
    source: Path | BinaryIO, wanted: Mapping[str, str], batch_rows: int, name: str
) -> Iterator[pa.RecordBatch]:
    with _readable(Path(name), name, "Parquet"), open_parquet(source) as file:
        _require(wanted, file.schema_arrow.names, name)
        for batch in file.iter_batches(batch_size=batch_rows, columns=list(wanted)):
            yield batch.select(list(wanted))


def _slices(batch: pa.RecordBatch, rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _require(wanted: Mapping[str, str], names: list[str], name: str) -> None:
    for column, setting in wanted.items():
        if names.count(column) > 1:
            raise DataError(f"has {names.count(column)} columns named {column!r}", where=name)
        if column not in names:
            near = difflib.get_close_matches(column, names, n=3, cutoff=0.5)
            raise DataError(
                f"has no column {column!r}."
                + (f" Did you mean {' or '.join(map(repr, near))}?" if near else ""),
                where=name,
                remedy=f"{f'Set {setting}. ' if setting else ''}Its columns: {', '.join(names[:30])}.",
            )


class _readable:
    """Arrow's errors about a file, as one sentence about that file."""

    def __init__(self, path: Path, name: str, kind: str) -> None:
        self.path, self.name, self.kind = path, name, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if not isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError) or isinstance(
            error, DataError
        ):
            return
        message = " ".join(str(error).split())
        if self.kind != "Parquet":
            bad_byte = _first_byte_not_utf8(self.path)
            if bad_byte:
                line, byte = bad_byte
                raise DataError(
                    f"is not UTF-8: line {line:,} holds the byte 0x{byte:02x}",
                    where=self.name,
                    remedy=f"Convert it, for example: iconv -f LATIN1 -t UTF-8 {self.path.name}",
                ) from None
            if "straddling" in message:
                raise DataError(
                    f"has a row longer than {BLOCK_BYTES >> 20} MiB: probably a quote that is never closed",
                    where=self.name,
                ) from None
        remedy = "Is the file complete? Write it again, or copy it again from its source."
        if "Expected" in message:
            remedy = "A value with a delimiter or a line break in it must be quoted, and every quote closed."
        raise DataError(
            f"cannot be read as {self.kind}: {message[:300]}", where=self.name, remedy=remedy
        ) from None


def _first_byte_not_utf8(path: Path) -> tuple[int, int] | None:
    """(line number, byte) of the first byte that breaks UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with pa.input_stream(str(path)) as file:
        while chunk := file.read(1 << 20):
            pending = decoder.getstate()[0]
            try:
                line += decoder.decode(chunk).count("\n")
            except UnicodeDecodeError as error:
                whole = pending + chunk
                return line + whole[: error.start].count(b"\n"), whole[error.start]
    return None
