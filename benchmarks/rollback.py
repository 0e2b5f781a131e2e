"""How long `hllm rollback` takes to move the alias: the call, and the whole command.

    python benchmarks/rollback.py [--repeats 5]

Two verified versions in a real MLflow (SQLite); the champion goes back and forth between them. What is read
follows within the reader's own cache: `hllm_v6` and `hllm_v7` both stay published, so nothing is copied.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Figures, arguments, print_table

from hllm.settings import Settings

SECONDS = 5.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as name:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{name}/mlflow.db"
        settings = Settings.model_validate({"run": {"root": f"{name}/runs"}})
        two_versions(settings)
        calls = [timed_call(settings, to) for _ in range(repeats) for to in ("1", "2")]
        commands = [timed_command(Path(name), to) for to in ("1", "2")]
    rows = [
        ("the alias moves, audit trail included", calls),
        ("the whole command, imports included", commands),
    ]
    print_table(
        [(what, f"{statistics.median(times):.2f}", f"{max(times):.2f}") for what, times in rows], HEADERS
    )
    figures = Figures("rollback")
    figures.add("hllm rollback, the whole command", f"{statistics.median(commands):.1f} s")
    longest = f"{max(calls):.2f} s at most"
    figures.claim("moving the alias back", longest, f"within {SECONDS:g} s", max(calls) <= SECONDS)
    figures.finish(args.figures)


HEADERS = ("what", "median s", "longest s")


def two_versions(settings: Settings) -> None:
    from hllm.registry.promote import promote
    from hllm.registry.versions import SERVICE_TAG, set_tags
    from hllm.work.mlflow import client

    registry, model = client(settings), settings.mlflow.model_name
    registry.create_registered_model(model)
    for number in (1, 2):
        registry.create_model_version(model, source="nowhere", tags={"gate": "passed"})
        set_tags(settings, number, {"publication": "verified", SERVICE_TAG: f"hllm_v{number}"})
        with contextlib.redirect_stdout(io.StringIO()):
            promote(settings, str(number), by="a benchmark")


def timed_call(settings: Settings, to: str) -> float:
    from hllm.registry.promote import rollback
    from hllm.registry.versions import serving_version

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        rollback(settings, to, by="a benchmark")
    seconds = time.perf_counter() - began
    serving = serving_version(settings)
    if serving is None or str(serving.version) != to:
        sys.exit(f"version {to} does not serve")
    return seconds


def timed_command(folder: Path, to: str) -> float:
    hllm = str(Path(sys.executable).with_name("hllm"))
    command = [hllm, "rollback", "--to", to, "--by", "a benchmark"]
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
