"""How a command ends: SIGTERM, and what it says last, printed for people and left where whoever started it
finds it.

That is the container's termination message, Kubernetes' way to hand on a few words (Airflow's local runner
does the same): one line, and perhaps one of JSON for the tasks that follow.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import typer

from hllm.errors import Terminated

AGAIN_SECONDS = 5.0
"""A second SIGTERM interrupts again only after so long: the first one's clean-up may be under way."""
_asked: list[float] = []


def terminate(*_: object) -> None:
    """The SIGTERM handler of commands: note it, unwind, release locks, exit 143. A library may make any error
    of what is raised here, or none: `was_terminated` still knows."""
    now = time.monotonic()
    soon = bool(_asked) and now - _asked[-1] < AGAIN_SECONDS
    _asked.append(now)
    if not soon:
        raise Terminated


_interrupted: list[bool] = []


def interrupt(*_: object) -> None:
    """The SIGINT handler of commands, likewise: DuckDB makes an error of its own of a KeyboardInterrupt."""
    _interrupted.append(True)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed."""
    return bool(_interrupted)


def was_terminated() -> bool:
    """Whether SIGTERM has come to this process."""
    return bool(_asked)


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that came from elsewhere (ids, notes), fit for a log and a terminal: control characters are
    written out, line breaks stay."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def say(line: str) -> None:
    """How it went, in one line; what is said later takes its place."""
    line = printable(line).replace("\n", "\\n")
    typer.echo(line)
    leave(line)


def leave(line: str, result: object = None) -> None:
    """Without printing it."""
    log = Path(os.environ.get("HLLM_TERMINATION_LOG", "/dev/termination-log"))
    if "HLLM_LAUNCHED" in os.environ:  # for whoever started us, who chooses among several
        log = log.with_name(f"{log.name}.{os.environ['RANK']}")
    if log.exists() or "HLLM_TERMINATION_LOG" in os.environ:
        with contextlib.suppress(OSError):
            log.write_text(line + "\n" + (json.dumps(result) + "\n" if result is not None else ""), "utf-8")
