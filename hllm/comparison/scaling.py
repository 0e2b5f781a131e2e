"""How figures follow a setting (`axis`): a power law through them, fitted in logarithms.

NDCG and the held-out loss against share of the data or depth of a backbone (HLLM, section 4.3): figure =
factor * axis ** exponent, by least squares on the logarithms of the means; the interval of the exponent from
the same bootstrap samples of users and seeds as everything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from hllm.comparison.figures import Figures
from hllm.comparison.file import Comparison, Metric
from hllm.evaluation.metrics import Interval
from hllm.evaluation.names import mark_of
from hllm.models.family import TrainedModel
from hllm.report.charts import STYLES, Curve, power_laws

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """One kind of model along the axis: its figures, and the power law through them."""

    metric: Metric
    kind: str
    style: str
    """Colour and shape in charts."""
    places: tuple[float, ...]
    values: tuple[Interval, ...]
    factor: float
    exponent: Interval


def laws(comparison: Comparison, figures: Figures, confidence: float) -> list[Law]:
    """For every metric, one law for each family and stage that stands at two places of the axis or more."""
    if not comparison.axis:
        return []
    families: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for entry in comparison.entries:
        place = float(comparison.settings(entry, comparison.seeds[0]).at(comparison.axis))
        families[entry.label].append((place, entry.name))
    return [
        _law(metric, label, sorted(points), figures, confidence)
        for metric in comparison.metrics
        for label, points in families.items()
        if len({place for place, _ in points}) > 1 and _can_be_fitted(points, figures, str(metric))
    ]


def _can_be_fitted(points: Sequence[tuple[float, str]], figures: Figures, metric: str) -> bool:
    return all(
        place > 0 and metric in figures.found[name] and figures.found[name][metric]["value"] > 0
        for place, name in points
    )


def _law(
    metric: Metric, label: str, points: Sequence[tuple[float, str]], figures: Figures, confidence: float
) -> Law:
    name, trained = str(metric), TrainedModel.of(label)
    places = np.array([place for place, _ in points])
    values = [figures.found[model][name] for _, model in points]
    factor, exponent = fit(places, np.array([value["value"] for value in values]))
    tiny = np.finfo(float).tiny
    sampled = np.stack([figures.samples[model][name] for _, model in points], axis=1)
    exponents = [fit(places, np.maximum(row, tiny))[1] for row in sampled]
    tail = (1 - confidence) / 2
    low, high = np.quantile(exponents, [tail, 1 - tail])
    return Law(
        metric,
        trained.family.title if trained else label,
        STYLES[mark_of(label)],
        tuple(places),
        tuple(values),
        factor,
        {"value": exponent, "low": float(low), "high": float(high)},
    )


def fit(places: Floats, values: Floats) -> tuple[float, float]:
    """(factor, exponent) of the power law through positive points, by least squares on logarithms."""
    exponent, logarithm = np.polyfit(np.log(places), np.log(values), 1)
    return float(np.exp(logarithm)), float(exponent)


def sentence(found: Sequence[Law]) -> str:
    """`HLLM, NDCG@10: exponent 0.21 [0.18, 0.25].`"""
    return " ".join(
        f"{law.kind}, {law.metric}: exponent {law.exponent['value']:+.3f} "
        f"[{law.exponent['low']:+.3f}, {law.exponent['high']:+.3f}]."
        for law in found
    )


def charts(axis: str, found: Sequence[Law]) -> list[Markup]:
    """One chart for each metric, all kinds of models in it."""
    drawn = []
    for metric in dict.fromkeys(law.metric for law in found):
        curves = [
            Curve(
                law.kind,
                law.style,
                law.places,
                [(value["value"], value["low"], value["high"]) for value in law.values],
                law.factor,
                law.exponent["value"],
            )
            for law in found
            if law.metric == metric
        ]
        drawn.append(power_laws(metric.title, axis, curves))
    return drawn
