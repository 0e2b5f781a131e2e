"""How long `hllm plan` takes over a large log: first, when it is read, and again, when it is not.

    python benchmarks/plan.py [--gigabytes 10]

The log is one sparse file: its bytes are read and digested like any others. Beside it stands `sha256sum` over
the same file, which is what every command would cost again if nothing were remembered.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Figures, arguments

SECONDS = 2.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    args = parser.parse_args()
    size = int((0.05 if args.quick else args.gigabytes) * 1e9)
    figures = Figures("plan")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "items.csv").write_text("item_id,title\na,A\n")
        with (folder / "log.csv").open("wb") as file:
            file.write(b"user_id,item_id,timestamp\n")
            file.truncate(size)
        time.sleep(2.5)  # what changed this very moment is not remembered
        peer = timed(["sha256sum", str(folder / "log.csv")], folder)
        hllm = [str(Path(sys.executable).with_name("hllm")), "plan"]
        hllm += ["--set", f"data.interactions={folder}/log.csv", "--set", f"data.items={folder}/items.csv"]
        first, second = (timed(hllm, folder) for _ in range(2))
    shown = f"{second:.1f} s (the first time {first:.1f} s; sha256sum of the log {peer:.1f} s)"
    figures.claim(
        f"`hllm plan` over a log of {size / 1e9:g} GB, again", shown, f"under {SECONDS:g} s", second < SECONDS
    )
    figures.add("... beside sha256sum of the log", f"{second / peer:.2f} times its time")
    figures.finish(args.figures)


def timed(command: list[str], folder: Path) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
