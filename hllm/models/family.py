"""The contract of a model family: one frozen object, found by name. Only a family's own folder names it.

A family is a package with a file `family.py` that defines `FAMILY`. It is found in `hllm.models`, in every
folder that the environment variable HLLM_FAMILIES lists, and by the entry point group `hllm.families`. Its
section of the settings is named like the family, its trainings are `[NAME.stage1]`, `[NAME.stage2]`, ...

What a family does stands in its module `code`, imported only when it runs. A trained family defines

    new_model(settings, prepared) -> Recommender             before its first stage
    next_stage(settings, before, vectors_ID) -> Recommender   a later stage, over cached item vectors
    shape(model) -> dict                                      what `model.json` keeps of it
    load_items(shape, weights, prepared) -> nn.Module         the item side, ready to encode a catalogue
    load_user(shape, weights) -> nn.Module                    the user side, ready for inference

and may define `batches(prepared, stage, seed, users)` where windows with uniform negatives are not its batch,
and `reads_times(shape)`, whether it matters to a trained model when things happened. An untrained family has
no stages and defines

    ranks(settings, prepared, held_out) -> Ranks              where each held-out event's item stands

and may define `scores(settings, prepared, held_out)`, (R,) how likely each event's user likes its item, and
`scorer(settings, prepared)`, a function from histories to scores (B, I), by which it recommends.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import hllm.models
from hllm.errors import ConfigError
from hllm.settings.section import Section

if TYPE_CHECKING:
    from hllm.settings.tree import Settings

GROUP = "hllm.families"
FOLDERS = "HLLM_FAMILIES"
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class TrainingStage:
    """One training of a family."""

    key_settings: tuple[str, ...]
    """Settings of the family's section that decide the weights, beside `run.seed` and the stage's own."""
    cached_items: bool = False
    """Whether it trains over item vectors that the first stage made, instead of making them."""
    revision: int = 1
    """Raised when code changes what the training writes."""


@dataclass(frozen=True)
class Family:
    """One model family."""

    name: str
    """Names its section of the settings, its steps (`train-NAME-1`) and its outputs."""
    title: str
    """What people read."""
    code: str
    """The module that does what the family does."""
    settings: type[Section] = Section
    stages: tuple[TrainingStage, ...] = ()
    """Its trainings, in order; none: the family is untrained and stands in every evaluation."""
    reads: frozenset[Literal["texts", "ids", "times", "labels"]] = frozenset({"ids"})
    bounded_history: bool = False
    """Whether it reads at most as many past events as it learned from (it has a weight for each position)."""
    tokenizer: str = ""
    """The setting of its section that names the backbone whose tokenizer reads the texts."""
    backbones: tuple[str, ...] = ()
    """Settings of its section that are towers (`Decoder`): their files belong to the key of a training."""
    objective: str = ""
    """The setting of its section that says what is learned, where there is a choice; `generative` is which
    item comes next, everything else judges candidates."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Settings by names of earlier releases -> names in its section: recorded by registered versions, and
    refused in a settings file with the new name."""
    mark: Literal["square", "diamond", "triangle", "circle"] = "square"
    """Shape in charts."""

    def at(self, settings: Settings) -> Any:
        """The family's section."""
        return settings.at(self.name)

    def stage_settings(self, settings: Settings, number: int) -> Any:
        """How a stage is trained (`hllm.settings.Stage`)."""
        return settings.at(f"{self.name}.stage{number}")

    def key_settings(self, number: int) -> tuple[str, ...]:
        """Dotted settings that decide the weights of a stage."""
        own = (*self.stages[number - 1].key_settings, f"stage{number}")
        return ("run.seed", *(f"{self.name}.{name}" for name in own))

    def tower_settings(self, number: int) -> tuple[str, ...]:
        """Dotted settings of the backbones that a stage reads from their own files."""
        reads = self.stages[number - 1].key_settings
        return tuple(f"{self.name}.{name}.backbone" for name in self.backbones if name in reads)

    def learns(self, settings: Settings) -> str:
        """What is learned with these settings: `generative`, or an objective that judges candidates."""
        return str(settings.at(f"{self.name}.{self.objective}")) if self.objective else "generative"

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.code)


class TrainedModel(NamedTuple):
    """One trained model: a family after one of its stages."""

    family: Family
    stage: int

    @property
    def label(self) -> str:
        """Its name in tables of ranks and metrics: `hllm-2`."""
        return f"{self.family.name}-{self.stage}"

    @property
    def title(self) -> str:
        """`HLLM stage 2`; a family with one stage does not number it."""
        return f"{self.family.title} stage {self.stage}" if len(self.family.stages) > 1 else self.family.title

    @property
    def train_step(self) -> str:
        return f"train-{self.label}"

    @property
    def embed_step(self) -> str:
        return f"embed-{self.label}"

    @classmethod
    def of(cls, label: str) -> TrainedModel | None:
        """The trained model of a label, or of its step (`train-hllm-2`); None for what is none."""
        name, _, stage = label.removeprefix("train-").removeprefix("embed-").rpartition("-")
        family = families().get(name)
        return cls(family, int(stage)) if family and stage.isdecimal() else None


def family(name: str) -> Family:
    """Raises: ConfigError, there is no such family."""
    found = families()
    if name not in found:
        raise ConfigError(
            f"there is no model family {name}",
            where="model.family",
            remedy=f"There are {', '.join(found)}; {FOLDERS} lists folders with more.",
        )
    return found[name]


def renamed() -> dict[str, list[str]]:
    """Settings by names of earlier releases -> what they are called now, in each family that has them."""
    found: dict[str, list[str]] = {}
    for each in families().values():
        for old, new in each.renamed.items():
            found.setdefault(old, []).append(f"{each.name}.{new}" if new else each.name)
    return found


def untrained() -> list[Family]:
    """The families without a training: they stand in every evaluation."""
    return [each for each in families().values() if not each.stages]


@cache
def families() -> Mapping[str, Family]:
    """Every family by name, those of this package first.

    Raises:
        ConfigError: a folder of HLLM_FAMILIES is not there, or something found there is no family.
    """
    own = list(hllm.models.__path__)
    for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise ConfigError("no such folder", where=f"{FOLDERS}={folder}")
        if str(path) not in hllm.models.__path__:
            hllm.models.__path__.append(str(path))
    found: dict[str, Family] = {}
    for folder in hllm.models.__path__:
        for module in sorted(pkgutil.iter_modules([folder]), key=lambda one: one.name):
            if module.ispkg and (Path(folder) / module.name / "family.py").is_file():
                where = f"{folder}/{module.name}/family.py"
                made = importlib.import_module(f"hllm.models.{module.name}.family")
                _add(found, getattr(made, "FAMILY", None), where, folder in own)
    for entry in entry_points(group=GROUP):
        _add(found, entry.load(), f"entry point {GROUP}: {entry.value}", False)
    return found


def _add(found: dict[str, Family], made: object, where: str, own: bool) -> None:
    if not isinstance(made, Family):
        raise ConfigError("defines no FAMILY of type hllm.models.family.Family", where=where)
    if not NAME.fullmatch(made.name):
        raise ConfigError(
            f"{made.name!r} is no name of a family", where=where, remedy="Small letters, digits and _."
        )
    if made.name in found:
        raise ConfigError(f"there is a model family {made.name} already", where=where)
    found[made.name] = made
