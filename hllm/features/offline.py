"""Vectors into the offline store: one Parquet file (or PostgreSQL table) per view, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.features.export import Batch, Entity, Export
from hllm.features.store import PASSWORD, postgres
from hllm.features.views import CREATED, EVENT_TIME, offline_file, offline_relation
from hllm.objects import download, is_s3, upload
from hllm.settings import Settings

BATCH_ROWS = 20_000


def write_offline(
    settings: Settings, export: Export, entity: Entity, *, version: int, at: datetime, scratch: Path
) -> None:
    """Write every row with the moment from which ranking models can read it.

    Written from the beginning each time: it takes a small part of what the online store takes."""
    tables = (offline_table(batch, version, at) for batch in export.batches(entity, BATCH_ROWS))
    if settings.feast.offline == "postgres":
        _write_postgres(settings, offline_relation(settings, entity, version), tables)
        return
    target = offline_file(settings, entity, version)
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


def count_offline(settings: Settings, entity: Entity, version: int, scratch: Path) -> int:
    """Rows of the offline table, 0 when there is none."""
    if settings.feast.offline == "postgres":
        return _count_postgres(settings, offline_relation(settings, entity, version))
    target = offline_file(settings, entity, version)
    path = download(target, scratch / Path(target).name) if is_s3(target) else Path(target)
    return parquet.ParquetFile(path).metadata.num_rows if path.exists() else 0


def _connection(settings: Settings) -> Any:
    import psycopg

    place = postgres(settings.feast.offline_path, os.environ.get(PASSWORD, ""), "feast.offline_path")
    return psycopg.connect(
        host=place["host"],
        port=place["port"],
        dbname=place["database"],
        user=place["user"],
        password=place["password"],
        sslmode=place["sslmode"],
    )


def _write_postgres(settings: Settings, name: str, tables: Iterator[pa.Table]) -> None:
    """One transaction: the table appears with all of its rows."""
    from psycopg import sql

    kinds = {pa.string(): "text", pa.int64(): "bigint", pa.timestamp("us", "UTC"): "timestamptz"}
    table = sql.Identifier(name)
    with _connection(settings) as connection, connection.cursor() as cursor:
        first = next(tables)
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(field.name), sql.SQL(kinds.get(field.type, "real[]")))
            for field in first.schema
        )
        cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(table, columns))
        with cursor.copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
            for part in _with(first, tables):
                for row in zip(*(column.to_pylist() for column in part.columns), strict=True):
                    copy.write_row(row)
        keys = sql.SQL(", ").join([sql.Identifier(first.schema.names[0]), sql.Identifier(EVENT_TIME)])
        cursor.execute(sql.SQL("CREATE INDEX ON {} ({})").format(table, keys))


def _with(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from others


def _count_postgres(settings: Settings, name: str) -> int:
    from psycopg import sql

    with _connection(settings) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (name,))
        if cursor.fetchone()[0] is None:
            return 0
        cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name)))
        return int(cursor.fetchone()[0])
