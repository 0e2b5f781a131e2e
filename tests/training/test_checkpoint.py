"""Checkpoints outlive the machine that wrote them; damage to the newest costs only what came after the one
before."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hllm.pipeline import keys
from hllm.settings import Settings
from hllm.training.checkpoint import Checkpoints
from hllm.work.artifacts import Store, file_digests
from hllm.work.objects import list_objects, read_object, write_object
from tests.conftest import S3
from tests.world import run_steps

REPOSITORY = Path(__file__).parents[2]
DIE_AFTER_CHECKPOINTS = """
import json, os, signal, sys
from hllm.settings import Settings
from hllm.training.checkpoint import Checkpoints
from tests.world import run_steps
save, left = Checkpoints.save, [int(sys.argv[2])]
def dying(*arguments):
    save(*arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = dying
run_steps(Settings.model_validate(json.loads(sys.argv[1])), "train-hllm-1")
"""


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3,), float(step))}


def reached(checkpoints: Checkpoints) -> int:
    found = checkpoints.newest()
    if found is None:
        return 0
    numbers, tensors = found
    assert torch.equal(tensors["model.weight"], weights(numbers["step"])["model.weight"])
    return int(numbers["step"])


def test_only_the_newest_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(1, 6):
        checkpoints.save(step, weights(step), {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{step:09d}" for step in (3, 4, 5)]
    assert reached(checkpoints) == 5


def test_checkpoints_reach_another_machine_by_s3(s3: S3, tmp_path: Path):
    location = f"{s3.bucket('checkpoints')}/train/key/work"
    curves = tmp_path / "here" / "curves.jsonl"
    here = Checkpoints(tmp_path / "here" / "work", location, 2, (curves,))
    assert here.newest() is None
    for step in (1, 2, 3):
        curves.parent.mkdir(exist_ok=True)
        curves.write_text(f"{step} points")
        here.save(step, weights(step), {"loss": 0.5})
    assert {place.split("/")[-2] for place in list_objects(location)} == {"step-000000002", "step-000000003"}

    elsewhere = tmp_path / "there" / "curves.jsonl"
    there = Checkpoints(tmp_path / "there" / "work", location, 2, (elsewhere,))
    assert reached(there) == 3
    assert elsewhere.read_text() == "3 points"


def test_damage_in_s3_and_here_is_said_and_the_one_before_is_used(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    location = f"{s3.bucket('damaged-checkpoints')}/work"
    here = Checkpoints(tmp_path / "here", location, keep=3)
    for step in (1, 2, 3):
        here.save(step, weights(step), {})
    newest = tmp_path / "here" / "step-000000003" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert reached(here) == 3, "the copy in S3 is whole"
    assert not capsys.readouterr().err

    damaged = f"{location}/step-000000003/tensors.safetensors"
    write_object(damaged, b"noise" + (read_object(damaged) or b"")[5:])
    unfinished = f"{location}/step-000000009/tensors.safetensors"  # its upload was cut short
    write_object(unfinished, b"half")
    assert reached(Checkpoints(tmp_path / "there", location)) == 2
    assert "step-000000003 is damaged (its digest does not match)" in capsys.readouterr().err
    assert not [place for place in list_objects(location) if "step-000000003" in place]


def test_a_killed_training_continues_on_another_machine_and_ends_bit_for_bit_the_same(
    s3: S3,
    tiny_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    sets: dict[str, Any] = {
        "hllm.stage1.steps": 8,
        "hllm.stage1.checkpoint_minutes": 1e-6,
        "hllm.stage1.accumulate": 2,
        "hllm.user_features.time": "hour",
        "hllm.user_features.item_id": True,
        "hllm.item_llm.lora_rank": 2,
        "hllm.user_llm.lora_rank": 2,
        "hllm.whiten": True,
        "hllm.dropout": 0.1,
    }
    local = tiny_settings(**sets)
    whole = file_digests(run_steps(local, "ingest", "validate", "prepare", "train-hllm-1"))

    remote = tiny_settings(**sets, **{"run.root": f"{s3.bucket('killed-trainings')}/run"})
    run_steps(remote, "ingest", "validate", "prepare")
    command = [sys.executable, "-c", DIE_AFTER_CHECKPOINTS, json.dumps(remote.model_dump(mode="json")), "4"]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]

    monkeypatch.setenv("HOME", str(tmp_path / "another-machine"))
    monkeypatch.setattr("hllm.work.lease.STALE_SECONDS", 2.0)  # the dead one's lock
    continued = run_steps(remote, "train-hllm-1")
    assert "train-hllm-1: continues from step 4 of 8" in capsys.readouterr().out
    assert "another-machine" in str(continued)
    assert file_digests(continued) == whole
    key = keys(remote)["train-hllm-1"]
    assert Store(remote.run.root).manifest("train-hllm-1", key) is not None
