"""Progress of long work: a bar on a terminal, one key=value line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from hllm.work.ranks import place

T = TypeVar("T")
LOG_SECONDS = 10.0


class Progress:
    """`with Progress("train", total=300, unit="step") as progress: progress.advance(1, loss=2.3)`.

    A total of 0 is an unknown one: then there is no bar and no time left.
    """

    def __init__(self, what: str, total: int, unit: str = "row", start: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.first = start
        self.started = self.spoke = time.monotonic()
        self.values: dict[str, float] = {}
        self.tty = sys.stderr.isatty() and place().first

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.tty:
            self._draw()
            sys.stderr.write("\n")
        elif error[0] is None:
            self._line()

    def advance(self, count: int = 1, **values: float) -> None:
        self.done = min(self.done + count, self.total) if self.total else self.done + count
        self.values.update(values)
        now = time.monotonic()
        if self.tty and now - self.spoke > 0.1:
            self._draw()
            self.spoke = now
        elif not self.tty and now - self.spoke >= LOG_SECONDS:
            self._line()
            self.spoke = now

    def _figures(self) -> tuple[float, float]:
        rate = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        return rate, (self.total - self.done) / rate if rate else 0.0

    def _draw(self) -> None:
        rate, left = self._figures()
        if not self.total:
            sys.stderr.write(f"\r{self.what} {self.done:,} {self.unit}s, {rate:,.1f}/s\033[K")
            sys.stderr.flush()
            return
        filled = int(24 * self.done / max(self.total, 1))
        values = " ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        bar = "#" * filled + "-" * (24 - filled)
        sys.stderr.write(
            f"\r{self.what} [{bar}] {self.done:,}/{self.total:,} {rate:,.1f} {self.unit}/s "
            f"{left:,.0f} s left {values}\033[K"
        )
        sys.stderr.flush()

    def _line(self) -> None:
        if not place().first:
            return
        rate, left = self._figures()
        values = "".join(f" {name}={value:.4g}" for name, value in self.values.items())
        ends = f" total={self.total} seconds_left={left:.0f}" if self.total else ""
        line = f"what={self.what} done={self.done} unit={self.unit} per_second={rate:.1f}{ends}{values}"
        print(line, file=sys.stderr, flush=True)


def track(what: str, things: Iterable[T], total: int, unit: str = "row") -> Iterator[T]:
    with Progress(what, total, unit) as progress:
        for thing in things:
            yield thing
            progress.advance()
