"""DuckDB as the steps use it: few threads, bounded memory, the rest spills to the step's scratch folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

MEMORY = "512MB"
THREADS = 4
"""At the most. Each needs room of its own before it can spill (DuckDB's advice: 125 MB): with 16 of them in
512 MB, a query over 9 million rows ended out of memory."""


@contextmanager
def connect(scratch: Path, threads: int = 0) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database of its own: temporary tables that outgrow the memory limit go to `scratch`."""
    import duckdb

    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY,
        "temp_directory": str(scratch / "duckdb"),
        "autoinstall_known_extensions": "false",
        "threads": min(threads or os.cpu_count() or 1, THREADS),
    }
    connection = duckdb.connect(config=settings)
    try:
        yield connection
    finally:
        connection.close()


def text(value: object) -> str:
    """A SQL string literal."""
    return "'" + str(value).replace("'", "''") + "'"


def name(column: str) -> str:
    """A SQL identifier."""
    return '"' + column.replace('"', '""') + '"'


def parquet(path: Path) -> str:
    """A Parquet file as a table."""
    return f"read_parquet({text(path)})"


def numbered(path: Path) -> str:
    """A Parquet file as a table, with each row's place in the file as `row`."""
    rows = f"read_parquet({text(path)}, file_row_number = true)"
    return f"(SELECT * EXCLUDE (file_row_number), file_row_number AS row FROM {rows})"
