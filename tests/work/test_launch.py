"""The same command, in two processes: the outputs of one, and endings that schedulers understand."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from hllm.errors import InfraError
from hllm.pipeline import steps
from hllm.settings import Runner, Settings
from hllm.work.artifacts import Manifest
from hllm.work.launch import machines, run, wanted
from tests.conftest import free_port
from tests.test_pipeline import World, latest
from tests.world import TinySource, run_steps

TWO = ("--set", "run.processes=2")
SETS: dict[str, Any] = {
    "model.baselines": [],
    "hllm.stage1.steps": 30,
    "hllm.stage1.evaluate_every": 10,
    "hllm.stage1.checkpoint_minutes": 1e-6,
    "hllm.stage1.precision": "fp32",
    "embed.shard_items": 25,
    "embed.tokens_per_batch": 256,
    "gate.min_vs_champion": 0.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_source: TinySource) -> World:
    one = World(tmp_path_factory.mktemp("processes"), tiny_source, **SETS)
    run_steps(one.settings, "ingest", "validate", "prepare")
    return one


@pytest.mark.slow
def test_steps_in_two_processes_are_stopped_continued_and_leave_one_output(world: World, tmp_path: Path):
    train, embed = (steps(world.settings)[name].argv for name in ("train-hllm-1", "embed-hllm-1"))
    work = world.output("train-hllm-1") / "work"
    code, said = world.interrupt(signal.SIGTERM, lambda: latest(work) >= 5, *train, *TWO)
    assert code == 143, said
    assert "stopped by SIGTERM" in (world.folder / "termination-log").read_text()
    assert Manifest.read(world.output("train-hllm-1")) is None
    reached = latest(work)
    assert reached >= 5

    said = world.run(*train, *TWO)
    assert f"train-hllm-1: continues from step {reached} of 30" in said
    assert said.splitlines()[-1].startswith("train-hllm-1: done in ")
    assert world.manifest("train-hllm-1").facts["processes"] == 2
    assert "done in" in world.run(*embed, *TWO)
    together = world.output("embed-hllm-1")
    vectors = np.concatenate([np.load(path) for path in sorted(together.glob("vectors-*.npy"))])

    alone = world.settings.model_copy(
        update={"run": world.settings.run.model_copy(update={"root": str(tmp_path / "alone")})}
    )
    run_steps(alone, "ingest", "validate", "prepare")
    trained = run_steps(alone, "train-hllm-1")
    for name in ("item.safetensors", "user.safetensors"):
        mine, whole = load_file(world.output("train-hllm-1") / name), load_file(trained / name)
        assert mine.keys() == whole.keys()
    other = run_steps(alone, "embed-hllm-1")
    expected = np.concatenate([np.load(path) for path in sorted(other.glob("vectors-*.npy"))])
    assert vectors.shape == expected.shape
    assert np.einsum("id,id->i", vectors, expected).min() > 0.99


@pytest.mark.slow
def test_the_error_of_one_process_is_the_error_of_the_command(world: World):
    """Weights that are no numbers: every process finds it out, and one line says so."""
    said = world.run(
        *steps(world.settings)["train-hllm-1"].argv, *TWO, "--set", "hllm.stage1.lr=1e30", code=65
    )
    last = (world.folder / "termination-log").read_text()
    assert "at step" in last, said
    assert last.startswith("process ")


@pytest.mark.slow
def test_of_a_process_that_is_killed_the_command_says_so_and_the_others_do_not_hide_it(
    tiny_source: TinySource, tmp_path: Path
):
    world = World(tmp_path, tiny_source, **SETS)
    run_steps(world.settings, "ingest", "validate", "prepare")
    command = world.start(*steps(world.settings)["train-hllm-1"].argv, *TWO)
    work = world.output("train-hllm-1") / "work"
    while latest(work) < 3:
        assert command.poll() is None
    (second,) = (
        child for child in psutil.Process(command.pid).children() if child.environ().get("RANK") == "1"
    )
    second.kill()
    said, _ = command.communicate(timeout=100)
    assert command.returncode == 137, said
    assert (world.folder / "termination-log").read_text().startswith("process 1 of 2: it left no message")
    assert "continues from step" in world.run(*steps(world.settings)["train-hllm-1"].argv, *TWO)


@pytest.mark.slow
def test_the_rest_of_the_pipeline_in_two_processes_ranks_as_one_does(world: World, tmp_path: Path):
    for step in steps(world.settings).values():
        world.run(*step.argv, *TWO)
    together = (world.output("evaluate") / "metrics.json").read_bytes()
    assert "done in" in world.run("evaluate", "--force")
    assert (world.output("evaluate") / "metrics.json").read_bytes() == together


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"PET_NNODES": "4"}, 4),
        ({"PET_NNODES": "1:4"}, 4),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "first"}, 2),
    ],
)
def test_how_many_machines_there_are(environment: dict[str, str], expected: int):
    assert machines(environment) == expected


def test_a_process_that_torchrun_has_started_starts_no_others(monkeypatch: pytest.MonkeyPatch):
    settings = Settings.model_validate({"run": {"processes": 2}})
    assert wanted(settings) == 2
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert wanted(settings) == 0


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        ("0", {"PET_NNODES": "2", "PET_NODE_RANK": "{rank}", "PET_MASTER_ADDR": "127.0.0.1"}),
        ("1", {"WORLD_SIZE": "2", "RANK": "{rank}", "MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_a_machine_that_never_comes_is_worth_another_try(
    rank: str, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in {**told, "PET_MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value.format(rank=rank))
    monkeypatch.setenv("MASTER_PORT", os.environ["PET_MASTER_PORT"])
    began, handler = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(InfraError, match="the 2 machines of this step did not meet") as raised:
        run(1, ["train"], Runner(start_minutes=0.02))
    assert time.monotonic() - began < 30, "it does not wait for torchrun's quarter of an hour"
    assert "\n" not in raised.value.first_line
    assert signal.getsignal(signal.SIGTERM) is handler


def test_whoever_waits_for_another_machine_hears_sigterm():
    program = (
        "import signal; from hllm.cli import terminate; signal.signal(signal.SIGTERM, terminate);"
        "from hllm.work.launch import run; from hllm.settings import Runner; run(1, ['train'], Runner())"
    )
    port = free_port()
    first = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    told = {**os.environ, **first, "PET_MASTER_PORT": str(port)}
    waiting = subprocess.Popen([sys.executable, "-c", program], env=told)
    try:
        while True:
            assert waiting.poll() is None
            with socket.socket() as asking:
                if asking.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        waiting.terminate()
        assert waiting.wait(30) == -signal.SIGTERM
    finally:
        waiting.kill()
        waiting.wait()
