"""A short run of the suite: the first commands of a pipeline and a release, a few tries of each kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.chaos.compare import differences

SHORT = ["--world", "local", "--until", "prepare", "--kinds", "kill", "term", "rot", "--tries", "3"]


def test_what_is_killed_or_rots_is_mended_by_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *SHORT, "--only", "ingest", "validate", "prepare"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "3 of 3" in done.stdout


def test_only_what_two_undisturbed_runs_have_in_common_is_compared():
    table = {"columns": ["id", "at"], "rows": [["1", "5"], ["2", "6"]]}
    again = {"columns": ["id", "at"], "rows": [["2", "7"], ["1", "8"]]}
    first, second = {"a": 1, "at": "x", "rows": table}, {"a": 1, "at": "y", "rows": again}
    assert differences(first, second, {"a": 1, "at": "z", "rows": again}) == []
    lost = {"columns": ["id", "at"], "rows": [["1", "5"], ["1", "5"]]}
    assert differences(first, second, {"a": 2, "b": 3, "rows": lost}) == [
        "differs: a: 2, uninterrupted 1",
        "missing: at",
        "rows differ: rows (2 rows, uninterrupted 2)",
        "left over: b",
    ]
