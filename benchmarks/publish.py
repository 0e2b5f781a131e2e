"""Rows per second into Feast's online stores: our writer beside Feast's own `write_to_online_store`.

    python benchmarks/publish.py [--rows 50000] [--width 64] [--batch 5000] [--large 1000000]

The same rows, the same store (SQLite, and a real Redis on loopback), the same batches; each writer in a
process of its own, so that peak memory is its own too. Both start from the exported Parquet file. At the end
what the two have stored is compared byte by byte. `--large` writes that many rows with our writer alone, as
users (two integers beside the vector): does it stay as fast, and its memory as small?
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from measure import Figures, Redis, arguments, forget_peak, peak, print_table, resident

from hllm.features.export import ITEM, USER, Export
from hllm.settings import Settings
from hllm.work.artifacts import Manifest

AT = datetime(2026, 1, 1, tzinfo=UTC)
WANTED = {"sqlite": 1.0, "redis": 5.0}
LABELS = {"feast": "Feast's write_to_online_store", "ours": "hllm publish"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=5_000)
    parser.add_argument("--large", type=int, default=0, help="rows of one more run, ours alone, into Redis")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats = 500, 1
    if args.only:
        print(json.dumps(measure(args.only, args.folder, args.place, args.batch)))
        return
    figures = Figures("publishing")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(Redis(folder))
        write_export(folder / "export" / "key", "item", args.rows, args.width)
        for store in WANTED:
            compare(store, folder, redis, args, figures)
        if args.large:
            redis.client.flushall()
            write_export(folder / "large" / "key", "user", args.large, args.width)
            large(folder, redis, args, figures)
    figures.finish(args.figures)


def compare(store: str, folder: Path, redis: Redis, args: argparse.Namespace, figures: Figures) -> None:
    runs: dict[str, list[dict[str, float]]] = {writer: [] for writer in LABELS}
    for _ in range(args.repeats):
        for database, writer in enumerate(LABELS):
            place = f"{redis.place},db={database}" if store == "redis" else f"{folder}/{writer}.db"
            forget(store, place, redis, database)
            runs[writer].append(measured_apart(f"{store}-{writer}", folder, place, args.batch))
    if store == "redis":
        contents = [list(redis_content(redis, database)) for database in range(len(LABELS))]
    else:
        contents = [list(sqlite_content(folder / f"{writer}.db")) for writer in LABELS]
    same = contents[0] == contents[1] and len(contents[0]) >= args.rows
    found = {
        writer: {figure: statistics.median(run[figure] for run in done) for figure in done[0]}
        for writer, done in runs.items()
    }
    print(f"\n{args.rows:,} vectors of {args.width} float32 into {store}, {args.batch:,} rows a batch")
    print_table([(LABELS[writer], *figures_of(run, args.rows)) for writer, run in found.items()], HEADERS)
    cpu = found["feast"]["cpu"] / found["ours"]["cpu"]
    print(f"{cpu:.1f} times by the CPU seconds of the writer; same bytes stored: {same}")
    if not same:
        sys.exit(f"the two writers stored different bytes in {store}")
    for writer, run in found.items():
        rate = f"{args.rows / run['seconds']:,.0f} rows/s; peak {run['peak_mb']:,.0f} MiB"
        figures.add(f"{store}: {LABELS[writer]}", rate)
    ratio = found["feast"]["seconds"] / found["ours"]["seconds"]
    figures.claim(
        f"{store}: our writer against Feast's own",
        f"{ratio:.1f} times as fast",
        f"at least {WANTED[store]:g}",
        ratio >= WANTED[store],
    )


def large(folder: Path, redis: Redis, args: argparse.Namespace, figures: Figures) -> None:
    """Once with Redis as it comes, once with hashes of such rows kept compact."""
    (folder / "export").rename(folder / "small")
    (folder / "large").rename(folder / "export")
    compact = 4 * args.width + 16
    for longest in (64, compact):
        redis.client.flushall()
        redis.client.config_set("hash-max-ziplist-value", longest)
        empty = redis.client.info("memory")["used_memory"]
        run = measured_apart("redis-users", folder, redis.place, args.batch)
        each = (redis.client.info("memory")["used_memory"] - empty) / args.large
        setting = f"hash-max-ziplist-value {longest}"
        print(f"\n{args.large:,} users, vectors of {args.width} float32, into redis, ours alone, {setting}")
        print_table([(LABELS["ours"], *figures_of(run, args.large))], HEADERS)
        print(f"Redis holds {each:,.0f} bytes a row, {each * args.large / 2**30:.2f} GiB")
        figures.add(
            f"redis: {args.large:,} users, {setting}",
            f"{args.large / run['seconds']:,.0f} rows/s; peak {run['peak_mb']:,.0f} MiB; "
            f"{each:,.0f} bytes a row in Redis",
        )


HEADERS = ("writer", "rows/s", "seconds", "CPU seconds", "peak MiB", "MiB before it began")


def figures_of(run: dict[str, float], rows: int) -> tuple[str, ...]:
    return (
        f"{rows / run['seconds']:,.0f}",
        f"{run['seconds']:.2f}",
        f"{run['cpu']:.2f}",
        f"{run['peak_mb']:,.0f}",
        f"{run['before_mb']:,.0f}",
    )


def measured_apart(what: str, folder: Path, place: str, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", what, "--folder", str(folder), "--place", place]
    done = subprocess.run([*command, "--batch", str(batch)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, folder: Path, place: str, batch: int) -> dict[str, float]:
    from hllm.features.store import open_store
    from hllm.features.views import views_of

    store_kind, writer = what.split("-")
    settings = Settings.model_validate(
        {
            "feast": {
                "registry": f"{folder}/{what}-registry.db",
                "online": store_kind,
                "online_url": place,
                "offline_path": str(folder),
                "write_batch_rows": batch,
            }
        }
    )
    store = open_store(settings)
    views = views_of(settings, 1, {})
    store.apply([*views.entities, views.users, views.items])
    export = Export.open(folder / "export" / "key")
    forget_peak()
    before, started, cpu = resident(), time.perf_counter(), time.process_time()
    if writer == "feast":
        feasts_own(store, views.items, export, batch)
    else:
        ours(settings, store, views, export, USER if writer == "users" else ITEM)
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak_mb": peak(),
        "before_mb": before,
    }


def ours(settings: Settings, store, views, export: Export, entity) -> None:
    from hllm.features.online import write_online

    write_online(
        settings,
        store,
        views.of(entity),
        export,
        entity,
        version=1,
        at=AT,
        start=0,
        written=lambda rows: None,
    )


def feasts_own(store, view, export: Export, batch: int) -> None:
    import pandas as pd

    for arrow in parquet.ParquetFile(export.folder / "items.parquet").iter_batches(batch_size=batch):
        columns = {
            "item_id": arrow.column("item_id").to_pandas(),
            "item_vector": arrow.column("vector").to_pandas(),
        }
        frame = pd.DataFrame({**columns, "item_model_version": "1", "event_timestamp": AT, "created": AT})
        store.write_to_online_store(view.name, frame)


def write_export(folder: Path, kind: str, rows: int, width: int, part: int = 50_000) -> None:
    """Vectors of unit length, written in parts: the benchmark's own memory is bounded too."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    path = folder / ("items.parquet" if kind == "item" else "users-00000.parquet")
    writer = None
    for start in range(0, rows, part):
        count = min(part, rows - start)
        vectors = random.normal(size=(count, width)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns = {
            f"{kind}_id": [f"{kind}-{start + row}" for row in range(count)],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width),
        }
        if kind == "user":
            columns["events"] = pa.array(random.integers(1, 500, count), pa.int64())
            times = random.integers(1_600_000_000, 1_700_000_000, count)
            columns["last_event_time"] = pa.array(times, pa.int64())
        table = pa.table(columns)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
    step = "export" if folder.name == "key" else folder.parent.name  # where it is read from
    Manifest(step, folder.name, "", "", "", 0.0, "", facts={"width": width}).write(folder)


def forget(store: str, place: str, redis: Redis, database: int) -> None:
    if store == "redis":
        redis.connection(database).flushdb()
    else:
        Path(place).unlink(missing_ok=True)


def redis_content(redis: Redis, database: int) -> Iterator[tuple[bytes, str]]:
    """Every key with a digest of its fields and values."""
    connection = redis.connection(database)
    for key in sorted(connection.scan_iter(count=1000)):
        yield key, hashlib.sha256(repr(sorted(connection.hgetall(key).items())).encode()).hexdigest()


def sqlite_content(database: Path) -> Iterator[tuple]:
    with sqlite3.connect(database) as connection:
        yield from connection.execute(
            'SELECT entity_key, feature_name, value FROM "hllm_hllm_item_v1" ORDER BY 1, 2'
        )


if __name__ == "__main__":
    main()
