"""Rows per second into Feast's online store: our writer beside Feast's own `write_to_online_store`.

    python benchmarks/publish.py [--rows 50000] [--width 64] [--batch 5000]

The same rows, the same SQLite store, the same batches; each in a process of its own, so that peak memory is
its own too. Both start from the exported Parquet file. At the end both stores are compared byte by byte.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from measure import Figures, arguments, forget_peak, peak, resident
from tabulate import tabulate

from hllm.artifacts import Manifest
from hllm.features.export import ITEM, Export
from hllm.settings import Settings

AT = datetime(2026, 1, 1, tzinfo=UTC)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats = 500, 1
    if args.only:
        print(json.dumps(measure(args.only, args.folder, args.batch)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_export(folder / "export", args.rows, args.width)
        runs: dict[str, list[dict[str, float]]] = {writer: [] for writer in WRITERS}
        for _ in range(args.repeats):
            for writer in WRITERS:
                for old in folder.glob(f"{writer}*.db"):
                    old.unlink()
                runs[writer].append(measured_apart(writer, folder, args.batch))
        same = stored(folder / "ours.db") == stored(folder / "feast.db")
    found = {
        writer: {figure: statistics.median(run[figure] for run in done) for figure in done[0]}
        for writer, done in runs.items()
    }
    table = [
        (
            LABELS[writer],
            f"{args.rows / run['seconds']:,.0f}",
            f"{run['seconds']:.2f}",
            f"{run['cpu']:.2f}",
            f"{run['peak_mb']:,.0f}",
            f"{run['before_mb']:,.0f}",
        )
        for writer, run in found.items()
    ]
    print(f"{args.rows:,} vectors of {args.width} float32 into SQLite, {args.batch:,} rows a batch")
    print(
        tabulate(
            table,
            ("writer", "rows/s", "seconds", "CPU seconds", "peak MiB", "MiB before it began"),
            disable_numparse=True,
        )
    )
    ratio = found["feast"]["seconds"] / found["ours"]["seconds"]
    cpu = found["feast"]["cpu"] / found["ours"]["cpu"]
    print(f"ours is {ratio:.1f} times as fast ({cpu:.1f} times by CPU); same bytes stored: {same}")
    if not same:
        sys.exit("the two writers stored different bytes")
    figures = Figures("publishing")
    for writer, run in found.items():
        figures.add(
            LABELS[writer], f"{args.rows / run['seconds']:,.0f} rows/s; peak {run['peak_mb']:,.0f} MiB"
        )
    figures.claim(
        "our writer against Feast's own", f"{ratio:.1f} times as fast", "at least equal", ratio >= 1
    )
    figures.finish(args.figures)
    print("Most of what is left is Feast's SQLite writer, which is below both.")


def measured_apart(writer: str, folder: Path, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", writer, "--folder", str(folder), "--batch", str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(writer: str, folder: Path, batch: int) -> dict[str, float]:
    from hllm.features.store import open_store
    from hllm.features.views import views_of

    place = {
        "registry": f"{folder}/{writer}-registry.db",
        "online_url": f"{folder}/{writer}.db",
        "offline_path": str(folder),
    }
    store = open_store(Settings.model_validate({"feast": place}))
    views = views_of(Settings.model_validate({"feast": place}), 1, {})
    store.apply([*views.entities, views.users, views.items])
    export = Export.open(folder / "export")
    forget_peak()
    before, started, cpu = resident(), time.perf_counter(), time.process_time()
    WRITERS[writer](store, views.items, export, batch)
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak_mb": peak(),
        "before_mb": before,
    }


def ours(store, view, export: Export, batch: int) -> None:
    from hllm.features.online import write_online

    write_online(
        store, view, export, ITEM, version=1, at=AT, batch_rows=batch, start=0, written=lambda rows: None
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


WRITERS = {"feast": feasts_own, "ours": ours}
LABELS = {"feast": "Feast's write_to_online_store", "ours": "hllm publish"}


def write_export(folder: Path, rows: int, width: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder.mkdir()
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    parquet.write_table(
        pa.table({"item_id": [f"item-{row}" for row in range(rows)], "vector": column}),
        folder / "items.parquet",
    )
    Manifest("export", "key", "", "", "", 0.0, "", facts={"width": width}).write(folder)


def stored(database: Path) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return list(
            connection.execute(
                'SELECT entity_key, feature_name, value FROM "hllm_hllm_item_v1" ORDER BY 1, 2'
            )
        )


if __name__ == "__main__":
    main()
