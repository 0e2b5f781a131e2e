"""Vectors into the online store, in batches, resumable: Redis directly, others through Feast's writer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hllm.features.export import ENTITIES, Batch, Entity, Vectors
from hllm.features.store import connect_postgres, online_path
from hllm.features.stores.messages import messages, stored_bytes
from hllm.features.stores.redis import Rows, claim, connect, require_room
from hllm.features.views import view_name
from hllm.settings import Settings
from hllm.work.progress import Progress

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView


def write_online(
    settings: Settings,
    store: FeatureStore,
    view: FeatureView,
    vectors: Vectors,
    entity: Entity,
    *,
    version: int,
    at: datetime,
    start: int,
    written: Callable[[int], None],
) -> None:
    """Write every row from `start` on; `written(rows)` after each batch that the store has confirmed."""
    batches = vectors.batches(entity, settings.feast.write_batch_rows, start)
    if settings.feast.online == "redis":
        done = rows_of(settings, entity, version).write(connect(settings), batches, version, at)
    else:
        done = _through_feast(store, view, batches, version, at)
    with _no_cycle_search(), Progress(f"publish {view.name}", vectors.rows(entity), start=start) as progress:
        for batch in done:
            written(batch.first + len(batch.ids))
            progress.advance(len(batch.ids))


def rows_of(settings: Settings, entity: Entity, version: int) -> Rows:
    """Where Redis keeps the rows of a version's view."""
    return Rows(settings.feast.project, entity, view_name(entity, version))


def kept_until(settings: Settings, vectors: Vectors, entity: Entity, version: int, end: int) -> int:
    """How many of the first `end` rows the online store still has, from the first on without a gap.

    A Redis that was restarted may have lost rows it had confirmed; the others confirm what is on disk."""
    if settings.feast.online != "redis" or not end:
        return end
    redis, rows = connect(settings), rows_of(settings, entity, version)
    whole = stored_bytes(vectors.width)
    for batch in vectors.batches(entity, settings.feast.write_batch_rows):
        if batch.first >= end:
            break
        lengths = rows.vector_lengths(redis, batch.ids[: end - batch.first])
        if any(length != whole for length in lengths):
            return batch.first
    return end


def missing_online(
    settings: Settings, vectors: Vectors, entity: Entity, version: int
) -> tuple[int, list[str]]:
    """Rows whose vector is not in the online store at its full width: how many, and three of them where the
    store says which. Reads no vector, so every row can be asked for."""
    whole, count = stored_bytes(vectors.width), 0
    if settings.feast.online != "redis":
        found = _count_in_database(settings, entity, version, whole)
        return max(vectors.rows(entity) - found, 0), []  # more, when new ids came with a refresh
    redis, rows = connect(settings), rows_of(settings, entity, version)
    examples: list[str] = []
    for batch in vectors.batches(entity, settings.feast.write_batch_rows):
        lengths = rows.vector_lengths(redis, batch.ids)
        missing = [name for name, length in zip(batch.ids, lengths, strict=True) if length != whole]
        count, examples = count + len(missing), (examples + missing)[:3]
    return count, examples


def _count_in_database(settings: Settings, entity: Entity, version: int, whole: int) -> int:
    """Vectors of so many bytes in Feast's own table of a view."""
    table = f"{settings.feast.project}_{view_name(entity, version)}"
    if settings.feast.online == "sqlite":
        import sqlite3

        name = '"' + table.replace('"', '""') + '"'
        query = f"SELECT count(*) FROM {name} WHERE feature_name = ? AND length(value) = ?"
        with contextlib.closing(sqlite3.connect(online_path(settings))) as database:
            return int(database.execute(query, (entity.vector, whole)).fetchone()[0])
    from psycopg import sql

    asked = sql.SQL("SELECT count(*) FROM {} WHERE feature_name = %s AND octet_length(value) = %s")
    with connect_postgres(settings, "feast.online_url") as connection, connection.cursor() as cursor:
        cursor.execute(asked.format(sql.Identifier(table)), (entity.vector, whole))
        return int(cursor.fetchone()[0])


@contextlib.contextmanager
def publisher(settings: Settings, version: int) -> Iterator[Callable[[], None]]:
    """The only writer of a version's online rows, on whatever machine. Yields what says "still here".

    Redis knows who it is; writers of the other stores are kept apart by the lock on their output folder.

    Raises:
        InfraError: there is another one.
    """
    if settings.feast.online != "redis":
        yield lambda: None
        return
    with claim(connect(settings), settings.feast.project, version) as held:
        yield held.hold


def require_room_for(settings: Settings, vectors: Vectors, version: int) -> None:
    """Redis holds everything in memory: is there enough for all rows that are not there yet?

    Raises:
        ConfigError, InfraError: no.
    """
    if settings.feast.online != "redis":
        return
    redis, now = connect(settings), datetime.now(UTC)
    for entity in ENTITIES:
        rows = rows_of(settings, entity, version)
        first = next(vectors.batches(entity, 100))
        if sum(map(bool, rows.vector_lengths(redis, first.ids))) < len(first.ids):
            # In a hash that is not kept compact, a row takes about twice its content.
            each = 2 * len(rows.commands(first, version, now)) // len(first.ids)
            require_room(redis, vectors.rows(entity), each, f"redis {settings.feast.online_url}")


def _through_feast(
    store: FeatureStore, view: FeatureView, batches: Iterator[Batch], version: int, at: datetime
) -> Iterator[Batch]:
    """Feast's `write_to_online_store` takes a pandas frame with one Python list per vector and infers every
    value's type. The store below it takes messages; the vectors are already in a message's own layout."""
    for batch in batches:
        store.provider.online_write_batch(store.config, view, messages(batch, version, at), None)
        yield batch


@contextlib.contextmanager
def _no_cycle_search() -> Iterator[None]:
    """Millions of small messages set off Python's search for reference cycles again and again, over all that
    is loaded. Messages have no cycles: their memory is freed without it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
