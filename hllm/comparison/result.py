"""A finished comparison: the figures of every model, what it cost, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hllm.comparison.figures import Figures, figures, ranked
from hllm.comparison.file import Comparison, Entry
from hllm.comparison.scaling import Law, laws
from hllm.comparison.work import Pipeline
from hllm.evaluation.metrics import Interval
from hllm.models.family import untrained
from hllm.work.costs import MEMORY


@dataclass(frozen=True)
class Effort:
    """What a model cost, and how large it is: means over the seeds."""

    parameters: int
    seconds: float
    """Of training: all stages up to the one that counts, item cache between them included."""
    steps: tuple[int, ...]
    """Optimizer steps of each stage."""
    memory_mb: int
    """The highest of any of its training processes."""


@dataclass(frozen=True)
class Result:
    """A finished comparison."""

    comparison: Comparison
    figures: Figures
    efforts: dict[str, Effort]
    settings: dict[str, str]
    """What each model's settings add to the common ones."""
    laws: list[Law]
    """How the figures follow `axis`; none without one."""
    confidence: float
    held_out: str
    """A sentence about the events that all models were asked about."""


def result_of(comparison: Comparison, found: Sequence[Pipeline]) -> Result:
    settings, ranks = found[0].settings, ranked(comparison, found)
    names = [*(entry.name for entry in comparison.entries), *(each.title for each in untrained())]
    measured = figures(
        comparison.metrics,
        names,
        comparison.seeds,
        comparison.reference,
        ranks,
        settings.evaluation.bootstrap,
        settings.evaluation.confidence,
        seed=comparison.seeds[0],
    )
    items = found[0].finished("prepare").rows["items"]
    left_out = ", items the user already has left out" if settings.evaluation.filter_history else ""
    return Result(
        comparison,
        measured,
        {entry.name: _effort(entry, found) for entry in comparison.entries},
        {entry.name: _own_settings(comparison, entry) for entry in comparison.entries},
        laws(comparison, measured, settings.evaluation.confidence),
        settings.evaluation.confidence,
        f"{len(ranks.users_R):,} held-out events, each ranked among all {items:,} items{left_out}",
    )


def _own_settings(comparison: Comparison, entry: Entry) -> str:
    """What sets this model apart: what all of them say is left out."""
    shared = set.intersection(*(set(other.sets) for other in comparison.entries))
    return ", ".join(value for value in entry.sets if value not in shared) or "the settings file as it is"


def _effort(entry: Entry, found: Sequence[Pipeline]) -> Effort:
    own = [pipeline for pipeline in found if pipeline.entry is entry]
    family, _, last = entry.label.rpartition("-")
    stages = range(1, int(last) + 1)
    needed = [f"train-{family}-{stage}" for stage in stages] + [f"embed-{family}-1"] * (int(last) > 1)
    manifests = {step: [pipeline.finished(step) for pipeline in own] for step in needed}
    trained = [manifests[f"train-{family}-{stage}"] for stage in stages]
    return Effort(
        # Stage 2 holds no Item LLM any more: stage 1 knows the whole model.
        parameters=int(trained[0][0].facts["parameters"]),
        # A training that was stopped and went on knows how long all of it took.
        seconds=sum(
            manifest.facts.get("train_seconds", manifest.seconds)
            for all_seeds in manifests.values()
            for manifest in all_seeds
        )
        / len(own),
        steps=tuple(all_seeds[0].rows["steps"] for all_seeds in trained),
        memory_mb=max(int(manifest.usage.get(MEMORY, 0)) for stage in trained for manifest in stage),
    )


def as_numbers(result: Result) -> dict[str, Any]:
    """Everything on the page as numbers."""

    def plain(values: Any) -> dict[str, dict[str, Interval]]:
        return {name: dict(entry) for name, entry in values.items()}

    return {
        "title": result.comparison.title,
        "seeds": list(result.comparison.seeds),
        "reference": result.comparison.reference,
        "held_out": result.held_out,
        "confidence": result.confidence,
        "events": dict(result.figures.events),
        "models": plain(result.figures.found),
        "differences": plain(result.figures.differences),
        "ratios": plain(result.figures.ratios),
        "laws": [
            {
                "metric": str(law.metric),
                "family": law.kind,
                "axis": result.comparison.axis,
                "places": list(law.places),
                "factor": law.factor,
                "exponent": law.exponent,
            }
            for law in result.laws
        ],
        "efforts": {name: vars(effort) for name, effort in result.efforts.items()},
        "settings": result.settings,
    }
