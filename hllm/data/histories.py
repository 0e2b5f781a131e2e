"""Users' histories: numbered, filtered to the k-core, sorted by time; equal times keep the file's order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hllm.data.engine import duck
from hllm.data.prepared import ARRAYS, array_file, write_arrays

if TYPE_CHECKING:
    import duckdb

FETCH_ROWS = 1 << 18


def number_and_sort(
    db: duckdb.DuckDBPyConnection, items: Path, interactions: Path, k_core: int
) -> dict[str, int]:
    """Tables `items` (numbered as in the catalogue), `users` (numbered by first appearance) and `events`.

    Every item of the catalogue keeps its number, also without events: it can still be recommended.
    """
    db.execute(
        f"CREATE TABLE items AS SELECT row::INTEGER AS item_index, item_id FROM {duck.numbered(items)}"
    )
    db.execute(
        f"""
        CREATE TABLE log AS
        SELECT log.row, log.user_id, items.item_index, log.timestamp, coalesce(log.nanos, 0) AS nanos,
            coalesce(log.label, -1)::TINYINT AS label
        FROM {duck.numbered(interactions)} AS log JOIN items USING (item_id)
        """
    )
    _keep_core(db, k_core)
    db.execute(
        """
        CREATE TABLE users AS
        SELECT (row_number() OVER (ORDER BY min(row)) - 1)::INTEGER AS user_index, user_id, count(*) AS events
        FROM log GROUP BY user_id
        """
    )
    db.execute(
        """
        CREATE TABLE events AS
        SELECT users.user_index, log.item_index, log.timestamp, log.nanos, log.label, log.row
        FROM log JOIN users USING (user_id)
        ORDER BY users.user_index, log.timestamp, log.nanos, log.row
        """
    )
    db.execute("DROP TABLE log")
    return {table: _count(db, table) for table in ("items", "users", "events")}


def _keep_core(db: duckdb.DuckDBPyConnection, k: int) -> None:
    """Dropping a user takes events from items and the other way round: go on until nothing changes."""
    before = -1
    while k > 1 and before != (before := _count(db, "log")):
        for column in ("user_id", "item_index"):
            few = f"SELECT {column} FROM log GROUP BY {column} HAVING count(*) < {int(k)}"
            db.execute(f"DELETE FROM log WHERE {column} IN ({few})")


def write_events(db: duckdb.DuckDBPyConnection, output: Path, events: int) -> None:
    """event_items, event_times, event_labels and user_offsets; read from DuckDB and written in parts."""
    columns = {"event_items": "item_index", "event_times": "timestamp", "event_labels": "label"}
    query = "SELECT item_index, timestamp, label FROM events ORDER BY user_index, timestamp, nanos, row"
    with ExitStack() as stack:
        files = {name: stack.enter_context(array_file(output, name, events)) for name in columns}
        for batch in db.sql(query).to_arrow_reader(FETCH_ROWS):
            for name, column in columns.items():
                part = batch.column(column).to_numpy(zero_copy_only=False)
                files[name].write(part.astype(ARRAYS[name], copy=False).tobytes())
    counts = db.execute("SELECT events FROM users ORDER BY user_index").fetchnumpy()["events"]
    write_arrays(output, user_offsets=np.concatenate([[0], np.cumsum(counts)]))


def _count(db: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(db.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])
