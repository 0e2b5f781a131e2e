"""What a version's frozen model says of today's items and users: only of those that changed.

An item changed when its text did; a user, when the log knows more or newer events of theirs than their last
vector has read. So a late event, or a day that was missed, needs no bookkeeping: the next run finds both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.data.engine import duck
from hllm.data.items import item_texts, write_items
from hllm.data.prepared import Prepared
from hllm.embedding.export import ROW_GROUP, vector_column
from hllm.embedding.histories import Histories
from hllm.embedding.users import vectors_of_histories
from hllm.errors import DataError
from hllm.pipeline import tokenizer_setting
from hllm.settings import Settings
from hllm.work.progress import Progress
from hllm.work.ranks import device

if TYPE_CHECKING:
    import duckdb

# I items, D vector width, U users of a shard


def encode_changed_items(
    settings: Settings, catalogue: Path, known: Sequence[Path], train: Path, output: Path, work: Path
) -> int:
    """items.parquet (item_id, vector, text_digest) of the items that are new, or whose text is another.

    `known`: tables of (item_id, text) or (item_id, text_digest), oldest first. Returns how many items.
    """
    work.mkdir(parents=True, exist_ok=True)
    with duck.connect(work, settings.run.threads) as db:
        changed = _changed_items(db, settings, catalogue, known, work)
    if not changed:
        return 0
    texts = work / "texts"
    texts.mkdir(exist_ok=True)
    tokenizer = tokenizer_setting(settings)
    backbone = settings.at(tokenizer) if tokenizer else ""
    no_events = np.zeros(changed, np.int64)
    rows = settings.data.batch_rows
    write_items(work / "changed.parquet", texts, work, settings.prepare, backbone, no_events, rows)
    vectors_ID = _encode(settings, train, Prepared.of_items(texts), changed)
    digests = parquet.read_table(work / "digests.parquet")
    _write(
        output / "items.parquet",
        {
            "item_id": digests["item_id"].combine_chunks(),
            "vector": vector_column(vectors_ID),
            "text_digest": digests["text_digest"].combine_chunks(),
        },
    )
    return changed


def _changed_items(
    db: duckdb.DuckDBPyConnection, settings: Settings, catalogue: Path, known: Sequence[Path], work: Path
) -> int:
    """changed.parquet (rows of the catalogue) and digests.parquet, in the same order."""
    now = work / "now.parquet"
    with parquet.ParquetWriter(now, pa.schema([("item_id", pa.string()), ("text", pa.string())])) as writer:
        for batch in item_texts(catalogue, settings.prepare):
            writer.write_batch(batch)
    db.execute("CREATE TABLE known (item_id VARCHAR, text_digest VARCHAR, n INTEGER)")
    for n, path in enumerate(known):
        has_text = "text_digest" not in parquet.read_schema(path).names
        digest = "md5(text)" if has_text else "text_digest"
        db.execute(f"INSERT INTO known SELECT item_id, {digest}, {n} FROM {duck.parquet(path)}")
    db.execute(
        f"""
        CREATE TABLE changed AS
        SELECT now.row, now.item_id, md5(now.text) AS text_digest FROM {duck.numbered(now)} AS now
        LEFT JOIN (
            SELECT item_id, arg_max(text_digest, n) AS text_digest FROM known GROUP BY item_id
        ) AS last USING (item_id)
        WHERE last.text_digest IS NULL OR last.text_digest <> md5(now.text)
        """
    )
    for name, query in (
        ("digests", "SELECT item_id, text_digest FROM changed ORDER BY row"),
        (
            "changed",
            f"SELECT items.* EXCLUDE (row) FROM {duck.numbered(catalogue)} AS items "
            "SEMI JOIN changed USING (row) ORDER BY items.row",
        ),
    ):
        db.execute(f"COPY ({query}) TO {duck.text(work / f'{name}.parquet')} (FORMAT parquet)")
    return _count(db, "changed")


def _encode(settings: Settings, train: Path, prepared: Prepared, items: int) -> npt.NDArray[np.float32]:
    """(I, D), unit length."""
    from hllm.embedding.items import _refuse_bad, encoded
    from hllm.models.load import load_item_model

    model = load_item_model(train, prepared).to(device())
    with Progress("refresh items", items, "item") as progress:
        vectors_ID = encoded(model, prepared, 0, items, settings.embed.tokens_per_batch, progress.advance)
    _refuse_bad(vectors_ID, 0)
    return vectors_ID


class Log:
    """Today's log beside what the vectors of a version have read of it.

    `vectors_ID` belongs to `item_ids`: the package's items, with those that were refreshed since. Of a
    user's latest events as many are read as the package reads (`max_history`), not as the settings say now.
    """

    def __init__(
        self,
        db: duckdb.DuckDBPyConnection,
        interactions: Path,
        item_ids: pa.Array,
        vectors_ID: npt.NDArray[np.float32],
        until: int,
        max_history: int,
    ) -> None:
        self.db, self.vectors_ID, self.max_history = db, vectors_ID, max_history
        places = pa.array(np.arange(len(item_ids), dtype=np.int32))
        items = pa.table({"item_id": item_ids, "item_index": places})
        db.register("known_items", items)
        db.execute(
            f"""
            CREATE TABLE log AS
            SELECT row, user_id, item_index, timestamp, coalesce(nanos, 0) AS nanos
            FROM {duck.numbered(interactions)} JOIN known_items USING (item_id) WHERE timestamp <=
            {int(until)}
            """
        )

    def choose_changed(self, published: Sequence[Sequence[Path]]) -> int:
        """Users of whom the log knows more than their last vector; `published`: tables (user_id, events,
        last_event_time) of one publication after another. Returns how many."""
        self.db.execute(
            "CREATE TABLE published (user_id VARCHAR, events BIGINT, last_event_time BIGINT, n INTEGER)"
        )
        for n, paths in enumerate(published):
            for path in paths:
                columns = f"user_id, events, last_event_time, {n}"
                self.db.execute(f"INSERT INTO published SELECT {columns} FROM {duck.parquet(path)}")
        return self._choose(
            """
            SELECT now.* FROM (
                SELECT user_id, count(*) AS events, max(timestamp) AS last_event_time
                FROM log GROUP BY user_id
            ) AS now
            LEFT JOIN (
                SELECT user_id, arg_max(events, n) AS events, arg_max(last_event_time, n) AS last_event_time
                FROM published GROUP BY user_id
            ) AS old USING (user_id)
            WHERE old.user_id IS NULL OR now.events > old.events OR now.last_event_time > old.last_event_time
            """
        )

    def choose_active(self, start: int | None, end: int) -> int:
        """Users with an event in [start, end), or with any before `end`. Returns how many."""
        since = "" if start is None else f"HAVING max(timestamp) >= {int(start)}"
        return self._choose(
            f"""
            SELECT user_id, count(*) AS events, max(timestamp) AS last_event_time FROM log
            WHERE timestamp < {int(end)} GROUP BY user_id {since}
            """
        )

    def write_users(self, settings: Settings, model: Any, output: Path, until: int) -> None:
        """users-00000.parquet ... of the chosen users, from their events up to `until`; a shard that is there
        is not computed again."""
        embed = settings.embed
        count = _count(self.db, "chosen")
        with Progress("refresh users", count, "user") as progress:
            for shard, begin in enumerate(range(0, count, embed.shard_users)):
                path, end = output / f"users-{shard:05d}.parquet", begin + embed.shard_users
                here = f"number >= {begin} AND number < {end}"
                users = self.db.sql(
                    f"SELECT user_id, events, last_event_time FROM chosen WHERE {here} ORDER BY number"
                ).to_arrow_table()
                if path.exists():
                    progress.advance(users.num_rows)
                    continue
                vectors_UD = self._vectors(settings, model, here, begin, users.num_rows, until, progress)
                columns = {name: users[name].combine_chunks() for name in users.column_names}
                _write(path, {**columns, "vector": vector_column(vectors_UD)})

    def _vectors(
        self,
        settings: Settings,
        model: Any,
        here: str,
        begin: int,
        users: int,
        until: int,
        progress: Progress,
    ) -> npt.NDArray[np.float32]:
        events = self.db.execute(
            f"""
            SELECT number, item_index, timestamp FROM (
                SELECT number, item_index, timestamp, nanos, row, row_number() OVER (
                    PARTITION BY number ORDER BY timestamp DESC, nanos DESC, row DESC) AS back
                FROM log JOIN (SELECT number, user_id FROM chosen WHERE {here}) USING (user_id)
                WHERE timestamp <= {int(until)}
            ) WHERE back <= {self.max_history} ORDER BY number, timestamp, nanos, row
            """
        ).fetchnumpy()
        lengths_U = np.bincount(np.asarray(events["number"], np.int64) - begin, minlength=users)
        histories = Histories(
            np.asarray(events["item_index"], np.int64),
            np.asarray(events["timestamp"], np.int64),
            np.cumsum(lengths_U) - lengths_U,
            lengths_U,
            np.full(users, until),
        )
        vectors_UD = vectors_of_histories(
            model,
            self.vectors_ID,
            histories,
            settings.embed.users_per_batch,
            progress.advance,
            published=True,
        )
        if not np.isfinite(vectors_UD).all():
            raise DataError("user vectors are not finite", where="refresh")
        return vectors_UD

    def _choose(self, query: str) -> int:
        self.db.execute(
            f"""
            CREATE OR REPLACE TABLE chosen AS
            SELECT (row_number() OVER (ORDER BY user_id) - 1) AS number, * FROM ({query})
            """
        )
        return _count(self.db, "chosen")


def _count(db: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(db.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])


def _write(path: Path, columns: dict[str, pa.Array]) -> None:
    partial = path.with_name(f".{path.name}")
    parquet.write_table(pa.table(columns), partial, row_group_size=ROW_GROUP)
    os.replace(partial, path)
