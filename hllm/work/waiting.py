"""Saying what is waited for: nobody watches a command that is silent for a minute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 4.0
"""A wait that is longer is said aloud."""
_said: set[str] = set()


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Around a request to a service: when the answer takes long, one line on standard error names the
    service, once in each process."""
    if what in _said:
        yield
        return
    timer = threading.Timer(SECONDS, _say, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str) -> None:
    if what not in _said:
        _said.add(what)
        print(f"waiting for {what}: no answer for {SECONDS:.0f} s", file=sys.stderr, flush=True)
