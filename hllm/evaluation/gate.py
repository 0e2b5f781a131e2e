"""Is the candidate good enough to be offered to a person? Thresholds from `settings.gate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hllm.errors import ConfigError, DataError
from hllm.evaluation.names import metric_name, model_name
from hllm.settings import Settings

NAMES = {"popular": "most-popular", "sasrec-1": "SASRec", "champion": "the champion"}


@dataclass(frozen=True)
class Rule:
    """One comparison; only reported when its threshold is 0 or there is nothing to compare with."""

    against: str
    outcome: Literal["passed", "failed", "reported"]
    reason: str


@dataclass(frozen=True)
class Verdict:
    passed: bool
    headline: str
    reasons: list[str]
    """One line per rule, with both numbers."""
    rules: tuple[Rule, ...] = ()


def judge(settings: Settings, metrics: Mapping[str, Any], champion: Mapping[str, Any] | None) -> Verdict:
    """Compare the candidate with most-popular, SASRec and the champion.

    Raises:
        ConfigError: `gate.metric` is none of the metrics that were evaluated, or a baseline that the gate
            asks for is not trained.
    """
    gate, candidate = settings.gate, metrics["candidate"]
    mine = _value(metrics["models"].get(candidate), candidate, metrics, gate.metric)
    if not math.isfinite(mine):
        raise DataError(f"{gate.metric} of {candidate} is not a finite number", where="gate")
    thresholds = {
        "popular": gate.min_vs_popular,
        "sasrec-1": gate.min_vs_sasrec,
        "champion": gate.min_vs_champion,
    }
    models = {**metrics["models"], "champion": champion}
    comparisons = {**metrics.get("comparisons", {}), "champion": (champion or {}).get("comparison")}
    rules = []
    for label, threshold in thresholds.items():
        if label == candidate:
            rules.append(
                Rule(label, "reported", f"{NAMES[label]} is the candidate itself: nothing to compare")
            )
        elif label == "champion" and champion is None:
            rules.append(Rule(label, "reported", "there is no champion yet: nothing to compare"))
        elif label == "sasrec-1" and "sasrec" not in settings.model.baselines:
            if threshold:
                raise ConfigError(
                    "asks for a comparison with SASRec, which is not among model.baselines",
                    where="gate.min_vs_sasrec",
                    remedy='Add "sasrec" to model.baselines, or set gate.min_vs_sasrec = 0.',
                )
            rules.append(Rule(label, "reported", "SASRec was not trained beside it: nothing to compare"))
        else:
            other = _value(models.get(label), label, metrics, gate.metric)
            ratio = _ratio(comparisons.get(label), metrics, gate.metric)
            rules.append(_rule(label, threshold, mine, other, gate.metric, ratio))
    passed = all(rule.outcome != "failed" for rule in rules)
    return Verdict(
        passed,
        _headline(passed, rules, mine, gate.metric, metrics),
        [rule.reason for rule in rules],
        tuple(rules),
    )


def _rule(label: str, threshold: float, mine: float, other: float, metric: str, ratio: str) -> Rule:
    name, shown = NAMES[label], metric_name(metric)
    if not threshold:
        return Rule(
            label, "reported", f"{shown} {mine:.4f}, {name} {other:.4f}{ratio}: reported, not required"
        )
    required = threshold * other
    if mine > required:
        return Rule(
            label, "passed", f"{shown} {mine:.4f} exceeds {threshold:g} x {name}'s {other:.4f}{ratio}"
        )
    return Rule(
        label, "failed", f"{shown} {mine:.4f} does not exceed {threshold:g} x {name}'s {other:.4f}{ratio}"
    )


def _ratio(paired: Mapping[str, Any] | None, metrics: Mapping[str, Any], metric: str) -> str:
    """`, ratio 1.80 (95 % interval 1.52 to 2.10)` where it is known."""
    found = (paired or {}).get(metrics["headline"], {}).get(metric, {}).get("ratio")
    if not found:
        return ""
    level = 100 * metrics.get("confidence", 0.95)
    return f", ratio {found['value']:.2f} ({level:g} % interval {found['low']:.2f} to {found['high']:.2f})"


def _value(model: Mapping[str, Any] | None, label: str, metrics: Mapping[str, Any], metric: str) -> float:
    if model is None:
        raise DataError(f"{label} has not been evaluated", where="gate", remedy="Run `hllm evaluate` again.")
    figures = model["overall"][metrics["headline"]]
    if metric not in figures:
        raise ConfigError(
            f"{metric} is not among the evaluated metrics",
            where="gate.metric",
            remedy=f"There are {', '.join(figures)}.",
        )
    return float(figures[metric]["value"])


def _headline(passed: bool, rules: list[Rule], mine: float, metric: str, metrics: Mapping[str, Any]) -> str:
    name = model_name(metrics["candidate"])
    measured = f"{metric_name(metric)} {mine:.4f} on {metrics['rows']:,} held-out events"
    if passed:
        return f"{name} passed the gate: {measured}"
    against = " and ".join(NAMES[rule.against] for rule in rules if rule.outcome == "failed")
    return f"{name} failed the gate against {against}: {measured}"
