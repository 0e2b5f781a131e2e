"""Memory stays within a bound, whatever the size of the log."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hllm.data.engine import duck
from hllm.data.schema import conform, interaction_rules, interactions_schema, item_rules
from hllm.data.tables import open_parquet
from hllm.data.validation_view import mark_interactions, mark_items
from hllm.settings import Settings, Validation
from tests.world import TinySource, tiny_settings, write_items

MEASURE = """
import json, re, sys
from pathlib import Path
from hllm.settings import Settings
from tests.world import run_steps

run_steps(Settings.model_validate(json.loads(sys.argv[1])), sys.argv[2])
# Not getrusage: its peak starts from that of the process that started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def log_of(rows: int, folder: Path) -> TinySource:
    folder.mkdir()
    items = [f"item-{n:05d}" for n in range(5_000)]
    with (folder / "log.csv").open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for n in range(rows):
            file.write(f"user-{n * 7919 % 50_021},{items[n * 31 % 5_000]},{1_600_000_000 + n // 2}\n")
    catalogue = write_items(
        folder / "items.parquet", item_id=items, title=[f"Title of {item}" for item in items]
    )
    return TinySource(catalogue, folder / "log.csv", items, [])


def peak_megabytes(settings: Settings, step: str) -> int:
    command = [sys.executable, "-c", MEASURE, json.dumps(settings.model_dump(mode="json")), step]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    return int(done.stdout.splitlines()[-1])


def test_reading_parquet_keeps_nothing_of_what_was_read(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "log.parquet"
    table = pa.table({"n": rng.integers(0, 2**62, 4_000_000)})  # 32 MB that do not compress
    for rows in (200_000, len(table)):  # many row groups, and a single one
        parquet.write_table(table, path, row_group_size=rows)
        before = pa.total_allocated_bytes()
        with open_parquet(path) as file:
            held = [pa.total_allocated_bytes() - before for _ in file.iter_batches(batch_size=50_000)]
        assert max(held) < 16e6, max(held)


def test_a_log_that_is_larger_than_duckdbs_memory_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duck, "MEMORY", "48MB")
    validation, log = Validation(), tmp_path / "interactions.parquet"
    known = [str(n) for n in range(5_000)]
    items = write_items(tmp_path / "items.parquet", item_id=known, title=["a"] * len(known))
    n = np.arange(1_500_000)
    columns = {
        "user_id": pa.array(n * 7919 % 50_021).cast(pa.string()),
        "item_id": pa.array(n * 31 % 5_000).cast(pa.string()),
        "timestamp": pa.array(1_600_000_000 + n // 2),
    }
    events = conform(pa.RecordBatch.from_pydict(columns), interactions_schema())
    parquet.write_table(pa.Table.from_batches([events, events.slice(0, 2)]), log)
    with duck.connect(tmp_path, 1) as db:
        mark_items(db, items, tmp_path / "items_marked.parquet", item_rules(validation))
        rules = interaction_rules(validation, datetime.now(UTC))
        mark_interactions(db, log, tmp_path / "items_marked.parquet", tmp_path / "marked.parquet", rules)
    marked = parquet.read_table(tmp_path / "marked.parquet", columns=["row", "reason"])
    assert (marked["row"].to_numpy() == np.arange(len(n) + 2)).all()
    assert marked["reason"].slice(0, len(n)).null_count == len(n)
    assert marked["reason"].slice(len(n)).to_pylist() == ["duplicate_event"] * 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"ingest": [], "validate": [], "prepare": []}
    for rows in (3_000_000, 9_000_000):  # both files are larger than what Arrow reads ahead (72 MB)
        source = log_of(rows, tmp_path / str(rows))
        settings = tiny_settings(tmp_path / f"run{rows}", source, **{"data.columns": {"texts": ["title"]}})
        for step, found in peaks.items():
            found.append(peak_megabytes(settings, step))
    print(peaks)
    assert peaks["ingest"][1] < 1.2 * peaks["ingest"][0], peaks
    assert peaks["ingest"][1] < 400, peaks
    # DuckDB takes what it may have (512 MB) before it spills; beside it is what the step itself holds.
    assert peaks["validate"][1] < 1_150, peaks
    assert peaks["prepare"][1] < 800, peaks


@pytest.mark.slow
def test_memory_does_not_grow_with_an_amazon_log(tmp_path: Path) -> None:
    peaks = []
    for users in (50_000, 400_000):
        source = tmp_path / str(users)
        source.mkdir()
        with (source / "Toys.inter.json").open("w") as file:
            lists = (f'"user-{n}": {[(n * 31 + k) % 5_000 for k in range(15)]}' for n in range(users))
            file.write("{" + ",\n".join(lists) + "}")
        titles = {str(n): {"title": f"Title of {n}"} for n in range(5_000)}
        (source / "Toys.item.json").write_text(json.dumps(titles))
        settings = Settings.model_validate(
            {
                "run": {"root": str(tmp_path / f"run{users}")},
                "data": {"source": "amazon", "path": str(source)},
            }
        )
        peaks.append(peak_megabytes(settings, "ingest"))
    # One count per user is kept: what a user that is named again continues from.
    assert peaks[1] < peaks[0] + 80, peaks


@pytest.mark.slow
def test_a_million_rows_are_validated_and_prepared_in_little_memory(tmp_path: Path) -> None:
    source = log_of(1_000_000, tmp_path / "source")
    settings = tiny_settings(tmp_path, source, **{"data.columns": {"texts": ["title"]}})
    peaks = {step: peak_megabytes(settings, step) for step in ("ingest", "validate", "prepare")}
    assert peaks["ingest"] < 400, peaks
    assert max(peaks.values()) < 1_000, peaks
