"""The whole pipeline through the real commands, each in a process of its own, killed and run again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hllm import settings as settings_module
from hllm.models.family import untrained
from hllm.pipeline import keys, steps
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store
from tests.world import TinySource, tiny_settings, toml

REPOSITORY = Path(__file__).parents[1]
HLLM = str(Path(sys.executable).parent / "hllm")
HEAVY = {"torch", "mlflow", "feast", "transformers", "great_expectations", "airflow", "pandas", "duckdb"}
LONG = 120.0
"""Seconds after which something hangs, whatever the machine."""


class World:
    """A settings file, and commands that use it."""

    def __init__(self, folder: Path, source: TinySource, **sets: Any) -> None:
        self.folder, self.source = folder, source
        self.config = folder / "hllm.toml"
        settings = tiny_settings(folder, source, **{"feast.repo": str(REPOSITORY / "feature_repo"), **sets})
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(toml(settings.model_dump(mode="json")))
        self.settings: Settings = settings_module.load(self.config, environ={})
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HLLM", "MLFLOW", "FEAST"))
        } | {"OMP_NUM_THREADS": "1", "HLLM_TERMINATION_LOG": str(folder / "termination-log")}

    def start(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [HLLM, *argv, "--config", str(self.config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )

    def run(self, *argv: str, code: int = 0) -> str:
        process = self.start(*argv)
        output, _ = process.communicate(timeout=LONG)
        assert process.returncode == code, f"hllm {' '.join(argv)} ended with {process.returncode}:\n{output}"
        return output

    def output(self, step: str) -> Path:
        return Store(self.settings.run.root).folder(step, keys(self.settings)[step])

    def manifest(self, step: str) -> Manifest:
        found = Manifest.read(self.output(step))
        assert found, f"{step} has no manifest"
        return found

    def interrupt(self, how: signal.Signals, when: Callable[[], bool], *argv: str) -> tuple[int, str]:
        """Start a command, send it a signal as soon as `when()`; (exit code, what it said)."""
        process = self.start(*argv)
        deadline = time.monotonic() + LONG
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(how)
        output, _ = process.communicate(timeout=LONG)
        return process.returncode, output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_source: TinySource) -> World:
    """Everything up to the evaluation, once: nothing interrupts it."""
    one = World(tmp_path_factory.mktemp("pipeline"), tiny_source, **INTERRUPTED)
    for step in steps(one.settings).values():
        said = one.run(*step.argv)
        assert said.splitlines()[-1].startswith(f"{step.name}: done in "), said
    return one


UNSEEN_PLAN = ["plan", "--set", "run.seed=99"]
"""Of a pipeline that was never registered: about another, MLflow would be asked."""

INTERRUPTED: dict[str, Any] = {
    "hllm.stage1.steps": 60,
    "hllm.stage1.checkpoint_minutes": 1e-6,  # after every step
    "hllm.stage1.evaluate_every": 20,
    "gate.min_vs_champion": 0.0,
    "embed.shard_items": 2,
    "embed.shard_users": 2,
    "embed.tokens_per_batch": 64,
}
"""Steps that take long enough to be met half-way, and leave traces of how far they are; any version may
follow another."""


def test_every_step_ran_and_the_second_time_is_reused(world: World):
    manifests = {name: world.manifest(name) for name in steps(world.settings)}
    assert manifests["evaluate"].rows["models"] == 3 + len(untrained())
    assert manifests["embed-hllm-3"].rows == {"items": 60, "users": 40}
    for name, step in steps(world.settings).items():
        assert world.run(*step.argv).splitlines()[-1].startswith(f"{name}: reused, "), name
    assert {name: world.manifest(name) for name in manifests} == manifests
    plan = world.run("plan")
    assert "to do" not in plan
    assert plan.count("done ") == len(manifests)


def test_a_stage_that_a_family_lacks_is_no_error(world: World):
    said = world.run("train", "--family", "sasrec", "--stage", "2")
    assert said == "train: sasrec has no stage 2 (its stages: 1); nothing to do\n"
    assert "is not a model family" in world.run("train", "--family", "word2vec", code=64)


def test_a_version_is_registered_published_verified_and_promoted(world: World):
    said = world.run("register").splitlines()[-1]
    assert said.startswith("register: hllm version 1, gate passed")
    assert Path(said.rpartition(" -> ")[2]).is_file()  # the report
    assert "is not fully published" in world.run("promote", "--by", "a tester", code=66)
    world.run("publish")
    world.run("verify")
    promoted = world.run("promote", "--by", "a tester", "--note", "the first")
    assert "champion of hllm moved to version 1 (service hllm_v1), decided by a tester" in promoted
    assert "no earlier champion to go back to" in world.run("rollback", "--by", "a tester", code=64)
    assert_recommendations(world)


def assert_recommendations(world: World) -> None:
    """Ten items with their titles, none of which the user had; the same for a history typed by hand."""
    had = {item for user, item, _ in world.source.events if user == "u5"}
    lines = world.run("recommend", "--user", "u5").splitlines()
    assert lines[0] == f"hllm version 1, user u5, {len(had)} events"
    shown = [line.split(maxsplit=1)[1] for line in lines[4:]]
    assert len(shown) == 10
    assert all(" of " in line for line in shown)  # "Title 7 of romance"
    assert not {line.split("  ")[0] for line in shown} & had
    typed = world.run("recommend", "--history", 'item20, "naïve,comma"', "-k", "3")
    assert len(typed.splitlines()) == 7  # a heading, the latest items, a head of two lines
    assert "item20 " not in typed
    assert "(1 of 2) (e.g. 'item999')" in world.run("recommend", "--history", "item20,item999", code=65)


@pytest.mark.slow
def test_a_second_version_is_promoted_and_rolled_back(world: World):
    for command in ("register", "publish", "verify", "promote"):
        world.run(command)
    other = ("--set", "hllm.stage2.steps=6")
    for step in ("train-hllm-2", "embed-hllm-3", "evaluate"):
        assert "done in" in world.run(*steps(world.settings)[step].argv, *other)
    for command in ("register", "publish", "verify"):
        assert "version 2" in world.run(command, *other)
    assert "moved from version 1 to version 2" in world.run("promote", "--by", "a tester", *other)
    back = world.run("rollback", "--by", "a tester", "--note", "it was worse")
    assert "moved from version 2 to version 1 (service hllm_v1)" in back


def test_training_stopped_then_killed_ends_with_the_same_digest(
    world: World, tmp_path: Path, tiny_source: TinySource
):
    step = "train-hllm-1"
    other = copy_of(world, tmp_path, tiny_source, without=step)
    folder, argv = other.output(step), steps(other.settings)[step].argv
    work = folder / "work"

    code, said = other.interrupt(signal.SIGTERM, lambda: (work / "step-000000010").exists(), *argv)
    assert (code, "Traceback" in said) == (143, False)
    assert "the same command continues from the last checkpoint" in said
    assert "stopped by SIGTERM" in (other.folder / "termination-log").read_text()
    reached = latest(work)
    assert 10 <= reached < 60

    code, said = other.interrupt(signal.SIGKILL, lambda: latest(work) > reached + 5, *argv)
    assert code == -signal.SIGKILL
    assert f"continues from step {reached} of 60" in said
    assert Manifest.read(folder) is None

    assert f"continues from step {latest(work)} of 60" in other.run(*argv)
    assert other.manifest(step).files == world.manifest(step).files
    assert other.manifest(step).digest == world.manifest(step).digest
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "trace"),
    [
        ("train-hllm-1", "curves.jsonl"),
        ("train-hllm-1", "model.json"),
        ("embed-hllm-1", "vectors-00009.npy"),
        ("embed-hllm-3", "users-00009.parquet"),
        ("evaluate", "examples.json"),
        ("evaluate", "metrics.json"),
    ],
)
def test_a_killed_step_run_again_ends_with_the_same_digest(
    world: World, tmp_path: Path, tiny_source: TinySource, step: str, trace: str
):
    killed = copy_of(world, tmp_path, tiny_source, without=step)
    folder, argv = killed.output(step), steps(killed.settings)[step].argv
    code, said = killed.interrupt(signal.SIGKILL, lambda: (folder / trace).exists(), *argv)
    assert code == -signal.SIGKILL, said
    assert Manifest.read(folder) is None
    killed.run(*argv)
    assert killed.manifest(step).files == world.manifest(step).files
    assert killed.manifest(step).digest == world.manifest(step).digest


@pytest.mark.slow
def test_the_other_family_from_log_to_export(tmp_path: Path, tiny_source: TinySource):
    other = World(tmp_path, tiny_source, **{"model.family": "sasrec"})
    for name, step in steps(other.settings).items():
        assert f"{name}: done" in other.run(*step.argv)
    assert other.manifest("embed-sasrec-3").facts["family"] == "sasrec"
    metrics = json.loads((other.output("evaluate") / "metrics.json").read_text())
    assert metrics["candidate"] == "sasrec-1"


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        UNSEEN_PLAN,
        ["ingest"],
        ["train", "--family", "sasrec", "--stage", "2"],
    ],
    ids=" ".join,
)
def test_a_command_that_has_nothing_to_do_imports_nothing_heavy(world: World, argv: list[str]):
    script = (
        "import atexit, sys; from hllm.cli import main\n"
        f"atexit.register(lambda: print('heavy:', sorted({HEAVY!r} & set(sys.modules))))\n"
        f"sys.argv = {['hllm', *argv]!r}; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**world.environment, "HLLM_CONFIG": str(world.config)},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "heavy: []"


def latest(work: Path) -> int:
    """The step of the newest checkpoint; 0 when there is none."""
    return max((int(path.name.removeprefix("step-")) for path in work.glob("step-*")), default=0)


def copy_of(world: World, folder: Path, source: TinySource, without: str) -> World:
    """The same outputs under another root, but for one step's and what follows from it."""
    later = list(steps(world.settings))
    later = later[later.index(without) :]
    ignored = shutil.ignore_patterns(*later)
    shutil.copytree(world.settings.run.root, folder / "runs", ignore=ignored)
    shutil.copy(world.folder / "mlflow.db", folder)
    return World(folder, source, **INTERRUPTED)
