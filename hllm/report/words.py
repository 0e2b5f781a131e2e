"""What the numbers of a report mean, in sentences: names of models and metrics, and points to weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hllm.evaluation.names import metric_name
from hllm.evaluation.segments import segment_limit, segment_name
from hllm.models.family import TrainedModel, family
from hllm.settings import Settings
from hllm.work.artifacts import Manifest


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def advice(
    settings: Settings,
    metrics: Mapping[str, Any],
    against: Sequence[Any],
    validation: Sequence[Mapping[str, Any]],
    manifests: Mapping[str, Manifest],
) -> list[str]:
    """Points to weigh that a single number hides."""
    metric, mode, found = settings.gate.metric, metrics["headline"], []
    for row in against:
        said = row.says(mode, metric)
        if row.role != "untrained" and said == "no clear difference":
            found.append(f"No clear difference from {row.name}: the interval of the ratio includes 1.")
        elif said == "worse":
            found.append(f"Worse than {row.name} in {metric_name(metric)} overall.")
    for row in against:
        if row.role in ("baseline", "champion"):
            for outcome in ("worse", "better"):
                names = row.segments_that_are(outcome, mode, metric)
                if names:
                    described = [
                        f"{segment_name(name)} ({segment_limit(name, metrics['limits'])})" for name in names
                    ]
                    found.append(f"{outcome.capitalize()} than {row.name} for {_listed(described)}.")
    quarantined = manifests["validate"].rows.get("quarantined", 0) if "validate" in manifests else 0
    if quarantined:
        found.append(f"{quarantined:,} rows of the data went to quarantine (see the validation below).")
    failed = [row["name"] for row in validation if not row["passed"]]
    if failed:
        found.append(f"Expectations that failed: {', '.join(failed)}.")
    if metrics.get("rows_without_history"):
        left_out = metrics["rows_without_history"]
        found.append(f"{left_out:,} held-out events were left out: their users had no earlier event.")
    return found + _effort(manifests, metrics["candidate"])


def _effort(manifests: Mapping[str, Manifest], candidate: str) -> list[str]:
    """A comparison is fair when both sides had their time; the reader should see how much that was."""
    spent: dict[str, list[float]] = {}
    for name, manifest in manifests.items():
        trained = TrainedModel.of(name) if name.startswith("train-") else None
        if trained:
            spent.setdefault(trained.family.name, []).append(manifest.seconds)
    own = TrainedModel.of(candidate)
    mine = spent.pop(own.family.name, []) if own else []
    if not mine or not spent:
        return []
    others = ", ".join(f"{family(name).title} for {duration(sum(took))}" for name, took in spent.items())
    return [
        f"Trained for {duration(sum(mine))} in {len(mine)} stage{'s' if len(mine) > 1 else ''}; {others}."
    ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
