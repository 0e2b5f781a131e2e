"""Memory stays within a bound, whatever the size of the log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hllm.settings import Settings
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    peaks = []
    for rows in (3_000_000, 9_000_000):  # both files are larger than what Arrow reads ahead (72 MB)
        source = log_of(rows, tmp_path / str(rows))
        settings = tiny_settings(tmp_path / f"run{rows}", source, **{"data.columns": {"texts": ["title"]}})
        peaks.append(peak_megabytes(settings, "ingest"))
    assert peaks[1] < 1.2 * peaks[0], peaks
    assert peaks[1] < 400, peaks


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
