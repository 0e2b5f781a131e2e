"""Every benchmark, one after another, and one table of what they found (`make bench`).

    python benchmarks/all.py [--quick]

Ends with 1 when a benchmark breaks or a claim does not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import arguments, machine, print_table

BENCHMARKS = (
    *("stage1_step", "encode", "stage2_step", "ranking", "cost"),
    *("publish", "latency", "retrieval", "rollback", "plan", "pretrained"),
)


def main() -> None:
    args = arguments(__doc__).parse_args()
    print(machine(args.threads))
    rows, broken, started = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        for benchmark in BENCHMARKS:
            print(f"\n== {benchmark}", flush=True)
            figures = Path(name) / f"{benchmark}.json"
            script = Path(__file__).with_name(f"{benchmark}.py")
            command = [sys.executable, str(script), "--figures", str(figures), "--threads", str(args.threads)]
            if subprocess.run(command + ["--quick"] * args.quick).returncode:
                broken.append(benchmark)
            else:
                rows += json.loads(figures.read_text("utf-8"))
    print(f"\n== all, after {time.monotonic() - started:.0f} s")
    print_table(
        [(row["benchmark"], row["what"], row["figure"], row["claim"]) for row in rows],
        ("", "what", "figure", "claim"),
    )
    if args.figures:
        args.figures.write_text(json.dumps(rows), "utf-8")
    failed = [row["what"] for row in rows if row["claim"].startswith("FAIL")]
    if broken:
        sys.exit(f"broken: {', '.join(broken)}")
    if failed and not args.quick:
        sys.exit(f"these claims do not hold here: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
