"""The steps of a comparison: what models and seeds have in common is done once, what is done is reused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hllm.comparison.file import Comparison, Entry
from hllm.errors import ConfigError, DataError, HLLMError, InfraError, Terminated
from hllm.pipeline import keys, steps
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store
from hllm.work.step import Context

NEEDED_LAST = "evaluate"


@dataclass(frozen=True)
class Pipeline:
    """One model with one seed: its settings, and the key of every step's output."""

    entry: Entry
    seed: int
    settings: Settings
    keys: dict[str, str]

    @property
    def store(self) -> Store:
        return Store(self.settings.run.root)

    def manifest(self, step: str) -> Manifest | None:
        return self.store.manifest(step, self.keys[step])

    def folder(self, step: str) -> Path:
        return self.store.fetch(step, self.keys[step])

    @property
    def context(self) -> Context:
        """What the evaluation saw, to work out what it did not write."""
        step = steps(self.settings)[NEEDED_LAST]
        inputs = {need: self.folder(need) for need in step.needs}
        return Context(self.settings, step, self.keys[step.name], inputs, self.folder(step.name), self.store)

    def finished(self, step: str) -> Manifest:
        manifest = self.manifest(step)
        if manifest is None:
            where = self.store.location(step, self.keys[step])
            raise DataError(f"{step} has no finished output", where=where)
        return manifest


@dataclass(frozen=True)
class Job:
    """One execution of one step, for the first pipeline that needs it."""

    pipeline: Pipeline
    step: str
    argv: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.step, self.pipeline.keys[self.step]

    def __str__(self) -> str:
        return f"{self.pipeline.entry.name}, seed {self.pipeline.seed}: {self.step}"


def pipelines(comparison: Comparison) -> list[Pipeline]:
    """Seed by seed, so that every model has a first figure before any has its last."""
    found = []
    for seed in comparison.seeds:
        for entry in comparison.entries:
            settings = comparison.settings(entry, seed)
            found.append(Pipeline(entry, seed, settings, keys(settings)))
    return found


def jobs(found: list[Pipeline]) -> Iterator[tuple[Job, Manifest | None]]:
    """Every step once, in an order in which they can run, with its manifest when it is done."""
    seen = set()
    for pipeline in found:
        for name in _needed(pipeline.settings):
            job = Job(pipeline, name, steps(pipeline.settings)[name].argv)
            if job.key not in seen:
                seen.add(job.key)
                yield job, pipeline.manifest(name)


def _needed(settings: Settings) -> list[str]:
    """The evaluation and all it needs: not the export."""
    found = steps(settings)
    needed = {NEEDED_LAST}
    for name in reversed(list(found)):
        if name in needed:
            needed |= set(found[name].needs)
    return [name for name in found if name in needed]


def run(comparison: Comparison, job: Job) -> None:
    """The step as a command of its own, exactly as anybody would run it by hand.

    Raises:
        HLLMError: the step failed; the same kind of error, with the model's name.
        Terminated: SIGTERM arrived; the step has written its checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder) / "last-words"
        process = subprocess.Popen(
            command(comparison, job), env={**os.environ, "HLLM_TERMINATION_LOG": str(last_words)}
        )
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        if code:
            said = last_words.read_text("utf-8").splitlines() if last_words.exists() else []
            _fail(code, job, said[0] if said else f"ended with {code}")


def command(comparison: Comparison, job: Job) -> list[str]:
    sets = comparison.sets(job.pipeline.entry, job.pipeline.seed)
    return [
        str(Path(sys.executable).with_name("hllm")),
        *job.argv,
        "--config",
        str(comparison.config),
        *(argument for value in sets for argument in ("--set", value)),
    ]


def _fail(code: int, job: Job, reason: str) -> None:
    if code == Terminated.exit_code:
        raise Terminated
    kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, InfraError)}
    raise kinds.get(code, HLLMError)(
        reason, where=job, remedy="The same command goes on from here; what is finished is not done again."
    )
