"""Every benchmark runs, agrees with its peer, and writes its figures. Nothing here looks at a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def figures_of(benchmark: str, folder: Path, *arguments: str) -> list[dict[str, str]]:
    found = folder / "figures.json"
    script = [sys.executable, str(FOLDER / f"{benchmark}.py"), "--quick", "--threads", "1"]
    done = subprocess.run([*script, "--figures", str(found), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(found.read_text("utf-8"))


def test_publishing_writes_the_same_bytes_as_feast(tmp_path: Path) -> None:
    rows = figures_of("publish", tmp_path)
    assert [row["claim"][:4] in ("PASS", "FAIL") for row in rows] == [False, False, True] * 2


def test_the_approximate_index_is_measured_against_the_exact_one(tmp_path: Path) -> None:
    rows = figures_of("retrieval", tmp_path)
    assert [row["what"].rpartition(": ")[2] for row in rows] == [
        "exact",
        "approximate, effort 64",
        "with the most effort",
    ]
    assert rows[-1]["claim"].startswith("PASS"), rows


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["latency", "rollback", "plan"])
def test_reading_and_rolling_back_are_measured(benchmark: str, tmp_path: Path) -> None:
    """The first ends with an error when Feast and the straight reader read different vectors."""
    assert any(row["claim"] for row in figures_of(benchmark, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["stage1_step", "encode", "stage2_step", "ranking"])
def test_both_sides_compute_the_same(benchmark: str, tmp_path: Path) -> None:
    """The benchmarks end with an error when losses, gradients or vectors of the two sides differ."""
    rows = figures_of(benchmark, tmp_path)
    assert any("times as fast" in row["figure"] for row in rows)


@pytest.mark.slow
def test_the_cost_of_everything_is_measured_along_its_axis(tmp_path: Path) -> None:
    rows = figures_of("cost", tmp_path)
    exponents = {row["what"]: float(row["figure"]) for row in rows if row["what"].endswith("exponent")}
    assert len(exponents) == 6
    assert exponents["ranking of 500 users against catalogue size: exponent"] > 0


@pytest.mark.slow
def test_pretrained_weights_change_the_first_loss(tmp_path: Path) -> None:
    first = figures_of("pretrained", tmp_path)[0]
    assert first["claim"].startswith("PASS"), first


@pytest.mark.slow
def test_what_a_gpu_is_asked_runs_from_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    """On a GPU it checks and measures what that computes; the figures here mean nothing."""
    results = tmp_path / "RESULTS.md"
    results.write_text("# What was measured\n\nbefore\n\n## On a GPU\n\nolder figures\n", "utf-8")
    rows = figures_of("gpu/all", tmp_path, "--results", str(results))
    assert len(rows) == 7
    assert all(row["claim"].startswith("PASS") for row in rows), rows
    written = results.read_text("utf-8")
    assert "before" in written
    assert "older figures" not in written
    for what in ("stage 1 ", "stage 1, ZeRO 2", "encoding", "stage 2", "with flash attention and without"):
        assert what in written
