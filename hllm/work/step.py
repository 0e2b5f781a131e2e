"""One piece of work: a command with what decides its output, and what it sees while it runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hllm.settings import Settings
from hllm.work import ranks
from hllm.work.artifacts import WORK, Manifest, Store, write_atomically


@dataclass(frozen=True)
class Step:
    """One command of the pipeline."""

    name: str
    argv: tuple[str, ...]
    title: str
    needs: tuple[str, ...]
    key_settings: tuple[str, ...]
    """Dotted settings that change the output; together with the keys of `needs` they make the output's
    key."""
    run: str
    """`module:function`, imported only when the step really runs: `function(context) -> None`."""
    shared: bool = False
    """Whether several processes can share the work (`run.processes`)."""
    revision: int = 1
    """Raised when the step's code changes what it writes."""
    backbones: tuple[str, ...] = ()
    """Dotted settings of backbones whose files it reads: their fingerprints belong to the key."""


NOT_IN_KEY = {"checkpoint_minutes", "keep_checkpoints", "batch_rows"}
"""How often work is saved, how much of a table is read at a time: whoever continues a run may change them."""



def settings_of(step: Step, settings: Settings) -> dict[str, Any]:
    """The values that decide a step's output."""
    values = {dotted: settings.at(dotted) for dotted in step.key_settings}
    return {
        dotted: value.model_dump(mode="json", exclude=NOT_IN_KEY) if hasattr(value, "model_dump") else value
        for dotted, value in values.items()
    }


@dataclass
class Context:
    """What a running step sees: its settings, its inputs as local folders, and where to write."""

    settings: Settings
    step: Step
    key: str
    inputs: Mapping[str, Path]
    output: Path
    store: Store
    tracker: Any = None
    rows: dict[str, int] = field(default_factory=dict)
    """Row counts for the manifest."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything small a reader of the manifest wants to know."""
    carried: set[str] = field(default_factory=set)
    """Files of the output that are in S3 before it is finished."""

    @property
    def work(self) -> Path:
        """Scratch that survives a kill (checkpoints, partial shards) and is removed when the step is done."""
        folder = self.output / WORK
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has(self, path: Path) -> bool:
        """Whether a part of the output is made already, by this run or an earlier one, here or elsewhere."""
        found = False
        if ranks.place().first and not (found := path.exists()):
            found = self.store.bring(self.step.name, self.key, path.name)
            if found:
                self.carried.add(path.name)
        return ranks.any_of(found)

    def keep(self, path: Path) -> None:
        """A part of the output is whole: in S3 it is safe at once, and the step continues after it."""
        self.store.carry(self.step.name, self.key, path.name)
        self.carried.add(path.name)

    @property
    def work_location(self) -> str:
        """Where scratch outlives this machine: in S3 beside the output, or nowhere ("")."""
        return self.store.work_location(self.step.name, self.key)

    @property
    def curves(self) -> Path:
        return self.output / "curves.jsonl"

    def log(self, values: Mapping[str, float], at: int) -> None:
        """One point of each curve: kept in the output's `curves.jsonl` and sent to MLflow, by the first
        process."""
        if not ranks.place().first:
            return
        with self.curves.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"at": at, **{name: float(value) for name, value in values.items()}}) + "\n"
            )
        if self.tracker:
            self.tracker.log_metrics(values, at)

    def tidy_curves(self) -> None:
        """A killed run logs the steps after its last checkpoint twice: the later point of each is kept."""
        path, points = self.curves, {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a kill can cut the last line
                    point = json.loads(line)
                    points[point["at"], *sorted(point)] = point
            kept = sorted(points.values(), key=lambda point: point["at"])
            write_atomically(path, "".join(json.dumps(point) + "\n" for point in kept).encode())

    @contextlib.contextmanager
    def graceful(self) -> Iterator[threading.Event]:
        """SIGTERM sets the event instead of interrupting: finish the current unit of work, checkpoint, raise
        Terminated."""
        stopping = threading.Event()
        if threading.current_thread() is not threading.main_thread():
            yield stopping
            return
        before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
        try:
            yield stopping
        finally:
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Outcome:
    manifest: Manifest
    reused: bool


def limit_threads(settings: Settings) -> None:
    """OpenMP reads this when torch is first imported: one process must not take more cores than it was
    given."""
    if settings.run.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.run.threads))


def load_function(reference: str) -> Any:
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(module), function)
