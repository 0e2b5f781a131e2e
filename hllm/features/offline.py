"""Vectors into the offline store: one Parquet file (or PostgreSQL table) per view, whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.errors import DataError
from hllm.features.export import Batch, Entity, Vectors
from hllm.features.store import connect_postgres
from hllm.features.views import CREATED, EVENT_TIME, offline_file, offline_relation, offline_source
from hllm.settings import Settings
from hllm.work.objects import delete_objects, is_s3, list_objects, open_object, upload

BATCH_ROWS = 20_000

_PART = re.compile(r"(?:[a-z]+-[\w-]+\.)?parquet")
"""What stands behind the view's name in the file of its publication or of a refresh: nothing else is
removed."""


def write_offline(
    settings: Settings,
    vectors: Vectors,
    entity: Entity,
    *,
    version: int,
    at: datetime,
    scratch: Path,
    part: str = "",
) -> None:
    """Write every row with the moment from which ranking models can read it: the publication's table, or
    beside it the named part of a refresh.

    Written from the beginning each time: it takes a small part of what the online store takes."""
    tables = (offline_table(batch, version, at) for batch in vectors.batches(entity, BATCH_ROWS))
    if settings.feast.offline == "postgres":
        name = offline_relation(settings, entity, version)
        if part:
            _append_postgres(settings, name, tables, at)
        else:
            _write_postgres(settings, name, tables)
        return
    target = offline_file(settings, entity, version, part)
    local = scratch / Path(target).name if is_s3(target) else Path(target)
    local.parent.mkdir(parents=True, exist_ok=True)
    partial = local.with_name(f".{local.name}.part")
    first = next(tables)
    with parquet.ParquetWriter(partial, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, local)
    if is_s3(target):
        upload(local, target)
        local.unlink()


def offline_table(batch: Batch, version: int, at: datetime) -> pa.Table:
    entity, rows = batch.entity, len(batch.ids)
    moment = pa.array([at] * rows, pa.timestamp("us", "UTC"))
    offsets = pa.array(
        range(0, (rows + 1) * batch.vectors_ND.shape[1], batch.vectors_ND.shape[1]), pa.int32()
    )
    return pa.table(
        {
            entity.join_key: pa.array(batch.ids, pa.string()),
            entity.vector: pa.ListArray.from_arrays(offsets, pa.array(batch.vectors_ND.reshape(-1))),
            entity.model_version: pa.array([str(version)] * rows, pa.string()),
            **{feature: pa.array(values, pa.int64()) for feature, values in batch.values.items()},
            EVENT_TIME: moment,
            CREATED: moment,
        }
    )


def count_offline(settings: Settings, entity: Entity, version: int, at: datetime, part: str = "") -> int:
    """Rows of the offline table, or of the named part of it, with this event time; 0 when there is none."""
    if settings.feast.offline == "postgres":
        return _count_postgres(settings, offline_relation(settings, entity, version), at)
    target = offline_file(settings, entity, version, part)
    try:
        with open_object(target) if is_s3(target) else open(target, "rb") as file:
            return parquet.ParquetFile(file).metadata.num_rows  # of S3, only the end of the file is fetched
    except (DataError, FileNotFoundError):
        return 0


def remove_offline(settings: Settings, entity: Entity, version: int) -> int:
    """Delete everything behind a view; returns how many files or tables there were."""
    if settings.feast.offline == "postgres":
        return _drop_postgres(settings, offline_relation(settings, entity, version))
    pattern = offline_source(settings, entity, version)
    prefix = pattern.removesuffix("*parquet")
    if is_s3(pattern):
        found = [place for place in list_objects(prefix) if _PART.fullmatch(place.removeprefix(prefix))]
        delete_objects(found)
        return len(found)
    folder, start = Path(prefix).parent, Path(prefix).name
    names = os.listdir(folder) if folder.is_dir() else []
    paths = [
        folder / name
        for name in names
        if name.startswith(start) and _PART.fullmatch(name.removeprefix(start))
    ]
    for path in paths:
        path.unlink()
    return len(paths)


def _write_postgres(settings: Settings, name: str, tables: Iterator[pa.Table]) -> None:
    """One transaction: the table appears with all of its rows."""
    from psycopg import sql

    kinds = {pa.string(): "text", pa.int64(): "bigint", pa.timestamp("us", "UTC"): "timestamptz"}
    table = sql.Identifier(name)
    with connect_postgres(settings, "feast.offline_path") as connection, connection.cursor() as cursor:
        first = next(tables)
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(field.name), sql.SQL(kinds.get(field.type, "real[]")))
            for field in first.schema
        )
        cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(table, columns))
        _copy(cursor, table, _with(first, tables))
        keys = sql.SQL(", ").join([sql.Identifier(first.schema.names[0]), sql.Identifier(EVENT_TIME)])
        cursor.execute(sql.SQL("CREATE INDEX ON {} ({})").format(table, keys))


def _append_postgres(settings: Settings, name: str, tables: Iterator[pa.Table], at: datetime) -> None:
    """One transaction; rows that an earlier attempt wrote with this event time are replaced."""
    from psycopg import sql

    table = sql.Identifier(name)
    with connect_postgres(settings, "feast.offline_path") as connection, connection.cursor() as cursor:
        column = sql.Identifier(EVENT_TIME)
        cursor.execute(sql.SQL("DELETE FROM {} WHERE {} = %s").format(table, column), (at,))
        _copy(cursor, table, tables)


def _drop_postgres(settings: Settings, name: str) -> int:
    from psycopg import sql

    with connect_postgres(settings, "feast.offline_path") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (name,))
        there = cursor.fetchone()[0] is not None
        cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))
        return int(there)


def _copy(cursor: Any, table: Any, tables: Iterator[pa.Table]) -> None:
    from psycopg import sql

    with cursor.copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
        for part in tables:
            for row in zip(*(column.to_pylist() for column in part.columns), strict=True):
                copy.write_row(row)


def _with(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from others


def _count_postgres(settings: Settings, name: str, at: datetime) -> int:
    from psycopg import sql

    with connect_postgres(settings, "feast.offline_path") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (name,))
        if cursor.fetchone()[0] is None:
            return 0
        where = sql.SQL("SELECT count(*) FROM {} WHERE {} = %s")
        cursor.execute(where.format(sql.Identifier(name), sql.Identifier(EVENT_TIME)), (at,))
        return int(cursor.fetchone()[0])
