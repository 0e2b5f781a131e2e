"""What a command says last: printed for people, and left where whoever started it finds it.

That is the container's termination message, Kubernetes' way to hand on a few words (Airflow's local runner
does the same): one line, and perhaps one of JSON for the tasks that follow.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import typer


def say(line: str) -> None:
    """How it went; what is said later takes its place."""
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
