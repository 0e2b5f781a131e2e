"""`kill -9` anywhere in a step, then the same step again: the result of an uninterrupted run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hllm.pipeline import keys
from hllm.work.artifacts import Store, file_digests
from tests.world import TinySource, run_steps, tiny_settings

DIE_AT_CALL = """
import json, os, signal, sys
from hllm.settings import Settings
from tests.world import run_steps

settings, step, limit = Settings.model_validate(json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3])
calls = 0
def count(frame, event, _):
    global calls
    if event == "call" and "/hllm/data/" in frame.f_code.co_filename:
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(count)
run_steps(settings, step)
"""


@pytest.mark.parametrize(
    ("step", "share"),
    [
        ("ingest", 0.5),
        ("ingest", 0.95),
        ("validate", 0.6),
        ("validate", 0.97),
        ("prepare", 0.5),
        ("prepare", 0.95),
    ],
)
def test_a_killed_step_run_again_gives_the_same_output(
    tmp_path: Path, tiny_source: TinySource, step: str, share: float
) -> None:
    before = {"ingest": (), "validate": ("ingest",), "prepare": ("ingest", "validate")}[step]
    sets: dict[str, Any] = {"data.batch_rows": 50}
    whole, killed = (tiny_settings(tmp_path / name, tiny_source, **sets) for name in ("whole", "killed"))
    if before:
        run_steps(whole, *before)
        run_steps(killed, *before)
    calls = _count_calls(whole, step)
    expected = _digests(Store(whole.run.root).folder(step, keys(whole)[step]))

    command = [sys.executable, "-c", DIE_AT_CALL, json.dumps(killed.model_dump(mode="json")), step]
    child = subprocess.run(
        [*command, str(int(calls * share))], cwd=Path(__file__).parents[2], capture_output=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-500:]
    output = Store(killed.run.root).folder(step, keys(killed)[step])
    assert any(output.rglob("*"))  # it had begun to write
    assert (
        Store(killed.run.root).manifest(step, keys(killed)[step]) is None
    )  # and nobody takes it for finished

    assert _digests(run_steps(killed, step)) == expected


def _count_calls(settings: Any, step: str) -> int:
    calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and "/hllm/data/" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        run_steps(settings, step)
    finally:
        sys.setprofile(None)
    return calls


def _digests(output: Path) -> dict[str, str]:
    """Of everything but the web pages, which show the time of the validation."""
    return {name: digest for name, digest in file_digests(output).items() if not name.startswith("data_docs")}
