"""A comparison file: models by name, each a few settings on top of one settings file, the same seeds for all.

    config = "../scientific.toml"        # beside this file; what all models share
    seeds = [17, 18, 19]
    metrics = ["ndcg@10", "item:cold recall@50"]

    [budget]                             # the same for all: no model may change it
    hllm.stage1.steps = 200

    [models."[ITEM]"]
    hllm.item_vector = "item_token"

    [models."mean"]
    hllm.item_vector = "mean"
    label = "hllm-1"                     # which of its trained models counts; the last stage if left out

The first model is the one that the others are compared with, unless `reference` names another. `axis` names a
setting that differs between models: their figures are then also drawn over it, with a fitted power law.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hllm import settings as settings_module
from hllm.errors import ConfigError
from hllm.evaluation.metrics import metric_names
from hllm.evaluation.names import metric_name
from hllm.evaluation.segments import SEGMENTS, segment_name
from hllm.settings import Settings, read_toml

SEEDS = (17, 18, 19)
METRICS = ("ndcg@10", "recall@10", "recall@50", "item:cold recall@50")
LOSS = "loss"
JUDGED = ("auc", "uauc", "wuauc")
"""Metrics of held-out events with a label; models that rank only are judged by the score they rank with."""


@dataclass(frozen=True)
class Metric:
    """A metric over all held-out events, or over a segment of them (`item:cold`)."""

    name: str
    segment: str = ""

    @classmethod
    def of(cls, text: str) -> Metric:
        segment, _, name = text.rpartition(" ")
        return cls(name, segment)

    def __str__(self) -> str:
        return f"{self.segment} {self.name}".strip()

    @property
    def title(self) -> str:
        return metric_name(self.name) + (f", {segment_name(self.segment)}" if self.segment else "")

    @property
    def lower_is_better(self) -> bool:
        return self.name == LOSS


@dataclass(frozen=True)
class Entry:
    """One model of a comparison: which of the trained models counts, and the settings that make it."""

    name: str
    label: str
    sets: tuple[str, ...]
    """As `--set` takes them."""


@dataclass(frozen=True)
class Comparison:
    name: str
    config: Path
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    entries: tuple[Entry, ...]
    reference: str
    axis: str = ""
    title: str = ""

    def sets(self, entry: Entry, seed: int) -> list[str]:
        """What makes this model with this seed out of the settings file: `--set` options of any command."""
        return [*entry.sets, f"run.seed={seed}"]

    def settings(self, entry: Entry, seed: int) -> Settings:
        return settings_module.load(self.config, self.sets(entry, seed))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    config: str
    title: str = ""
    seeds: tuple[int, ...] = Field(SEEDS, min_length=1)
    metrics: tuple[str, ...] = Field(METRICS, min_length=1)
    budget: dict[str, Any] = {}
    models: dict[str, dict[str, Any]] = Field(min_length=1)
    reference: str = ""
    axis: str = ""


def read(path: Path, overrides: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> Comparison:
    """The comparison that a file describes; `overrides` (`a.b=c`) go to every model and win, `seeds` replace
    the file's.

    Raises:
        ConfigError: the file is missing or says something else than a comparison, a model changes the budget,
            or the settings of a model do not load.
    """
    try:
        found = _File.model_validate(read_toml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{place}: {first['msg'].lower()}", where=path, remedy=_REMEDY) from None
    config, budget = path.parent / found.config, dict(_leaves(found.budget))
    entries = []
    for name, tree in found.models.items():
        label = tree.pop("label", "")
        own = dict(_leaves(tree))
        _refuse_another_budget(path, name, own, budget)
        said = (*_as_sets({"model.baselines": [], **own, **budget}), *overrides)
        sets = tuple({value.partition("=")[0]: value for value in said}.values())  # the last one counts
        settings = settings_module.load(config, sets)
        entries.append(Entry(name, label or _last_label(settings), sets))
        _refuse_unknown_label(path, entries[-1], settings)
    comparison = Comparison(
        path.stem,
        config,
        seeds or found.seeds,
        tuple(map(Metric.of, found.metrics)),
        tuple(entries),
        found.reference or entries[0].name,
        found.axis,
        found.title or path.stem,
    )
    _check(path, comparison)
    return comparison


def _last_label(settings: Settings) -> str:
    from hllm.pipeline import candidate

    return candidate(settings).label


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _as_sets(values: Mapping[str, Any]) -> list[str]:
    """Strings, numbers, truth values and lists of them are written in TOML as in JSON."""
    return [f"{dotted}={json.dumps(value, ensure_ascii=False)}" for dotted, value in values.items()]


def _refuse_another_budget(path: Path, name: str, own: Mapping[str, Any], budget: Mapping[str, Any]) -> None:
    changed = sorted(own.keys() & budget.keys())
    if changed:
        raise ConfigError(
            f"the model {name} changes the budget, which is the same for all",
            where=path,
            examples=changed,
            remedy="Take the setting out of [budget], or out of the model.",
        )


def _refuse_unknown_label(path: Path, entry: Entry, settings: Settings) -> None:
    from hllm.pipeline import trained_models

    models = trained_models(settings)
    known = [one.label for one in models if one.family.name == settings.model.family]
    if entry.label not in known:
        raise ConfigError(
            f"the model {entry.name} has no {entry.label}",
            where=path,
            remedy=f"It trains {', '.join(known)}.",
        )


def _check(path: Path, comparison: Comparison) -> None:
    if len(set(comparison.seeds)) < len(comparison.seeds):
        raise ConfigError("a seed is there twice", where=path, examples=comparison.seeds)
    names = [entry.name for entry in comparison.entries]
    if comparison.reference not in names:
        raise ConfigError(
            f"the reference {comparison.reference} is none of the models", where=path, examples=names
        )
    segments = {f"{kind}:{name}" for kind in ("item", "user") for name in SEGMENTS}
    for entry in comparison.entries:
        settings = comparison.settings(entry, comparison.seeds[0])
        cutoffs = metric_names(settings.evaluation.cutoffs)
        unknown = [
            str(metric)
            for metric in comparison.metrics
            if metric.name not in {*cutoffs, LOSS, *JUDGED}
            or (metric.segment and (metric.segment not in segments or metric.name in JUDGED))
        ]
        if unknown:
            raise ConfigError(
                f"{entry.name} is not evaluated by these metrics",
                where=path,
                examples=unknown,
                remedy="Metrics are auc, uauc, wuauc, loss, and recall@K and ndcg@K for the K of "
                "evaluation.cutoffs. Before the last three a segment (item:cold, item:long_tail, user:other, "
                "...) and a space may stand.",
            )
        if comparison.axis and not isinstance(_at(settings, comparison.axis, path), (int, float)):
            raise ConfigError(f"axis = {comparison.axis} is not a number", where=path)


def _at(settings: Settings, dotted: str, path: Path) -> Any:
    try:
        return settings.at(dotted)
    except AttributeError:
        raise ConfigError(f"axis = {dotted} is not a setting", where=path) from None


_REMEDY = (
    "A comparison file has config, models, and perhaps title, seeds, metrics, budget, reference and axis."
)
