"""Is the candidate good enough to be offered to a person? Thresholds from `settings.gate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hllm.errors import ConfigError, DataError
from hllm.evaluation.names import CHAMPION, in_sentence, metric_name, model_name
from hllm.models.family import TrainedModel, families
from hllm.settings import Settings

AGAIN = "Run `hllm evaluate` again."


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
    """Compare the candidate with every other family that was evaluated, and with the champion.

    Raises:
        ConfigError: `gate.metric` is none of the metrics that were evaluated, or a baseline that the gate
            asks for is not trained.
    """
    gate, candidate = settings.gate, metrics["candidate"]
    figures, comparisons = _with_labelled(metrics, champion)
    mine = _value(figures.get(candidate), candidate, gate.metric)
    if not math.isfinite(mine):
        raise DataError(f"{gate.metric} of {candidate} is not a finite number", where="gate")
    rules = []
    own = TrainedModel.of(candidate)
    for name in families():
        label, threshold = _label(name, metrics), gate.min_vs.get(name, 0.0)
        if own and own.family.name == name:
            if threshold:
                rules.append(Rule(candidate, "reported", f"{own.family.title} is the candidate itself"))
            continue
        if label is None and name in settings.model.baselines:
            raise DataError(f"{name} has not been evaluated", where="gate", remedy=AGAIN)
        if label is None and threshold:
            raise ConfigError(
                f"asks for a comparison with {families()[name].title}, which was not evaluated",
                where=f"gate.min_vs.{name}",
                remedy=f'Add "{name}" to model.baselines, or set gate.min_vs.{name} = 0.',
            )
        if label is not None:
            other = _value(figures.get(label), label, gate.metric)
            gap = _gap(comparisons.get(label), metrics, gate.metric)
            rules.append(_rule(label, threshold, mine, other, gate.metric, gap))
    if champion is None:
        rules.append(Rule(CHAMPION, "reported", "there is no champion yet: nothing to compare"))
    else:
        other = _value(figures.get(CHAMPION), CHAMPION, gate.metric)
        gap = _gap(comparisons.get(CHAMPION), metrics, gate.metric)
        rules.append(_rule(CHAMPION, gate.min_vs_champion, mine, other, gate.metric, gap))
    passed = all(rule.outcome != "failed" for rule in rules)
    return Verdict(
        passed,
        _headline(passed, rules, mine, gate.metric, metrics),
        [rule.reason for rule in rules],
        tuple(rules),
    )


def _label(name: str, metrics: Mapping[str, Any]) -> str | None:
    """The evaluated model of a family: its last stage; None where it was not evaluated."""
    labels = [label for label in metrics["models"] if name in (label, label.rpartition("-")[0])]
    return max(labels, default=None)


def _rule(label: str, threshold: float, mine: float, other: float, metric: str, gap: str) -> Rule:
    name, shown = name_of(label), metric_name(metric)
    if not threshold:
        return Rule(label, "reported", f"{shown} {mine:.4f}, {name} {other:.4f}{gap}: reported, not required")
    required = threshold * other
    if mine > required:
        return Rule(label, "passed", f"{shown} {mine:.4f} exceeds {threshold:g} x {name}'s {other:.4f}{gap}")
    return Rule(
        label, "failed", f"{shown} {mine:.4f} does not exceed {threshold:g} x {name}'s {other:.4f}{gap}"
    )


def _gap(paired: Mapping[str, Any] | None, metrics: Mapping[str, Any], metric: str) -> str:
    """`, ratio 1.80 (95 % interval 1.52 to 2.10)`, of an AUC the difference, where it is known."""
    found = (paired or {}).get(metrics["headline"], {}).get(metric, {})
    level = f"{100 * metrics.get('confidence', 0.95):g} % interval"
    if found.get("ratio"):
        ratio = found["ratio"]
        return f", ratio {ratio['value']:.2f} ({level} {ratio['low']:.2f} to {ratio['high']:.2f})"
    if "low" in found:
        bounds = f"{found['low']:+.4f} to {found['high']:+.4f}"
        return f", difference {found['value']:+.4f} ({level} {bounds})"
    return ""


def _with_labelled(
    metrics: Mapping[str, Any], champion: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of every model, and the candidate's against each, those of labelled events among the others."""
    mode = metrics["headline"]
    figures = {label: dict(model["overall"][mode]) for label, model in metrics["models"].items()}
    compared = metrics.get("comparisons", {})
    against = {label: {mode: dict(found.get(mode, {}))} for label, found in compared.items()}
    labelled = metrics.get("labelled", {"models": {}, "differences": {}})
    for label, found in labelled["models"].items():
        figures.setdefault(label, {}).update(found)
    for label, found in labelled["differences"].items():
        against.setdefault(label, {mode: {}})[mode].update(found)
    if champion is not None:
        theirs = champion.get("labelled", {})
        figures["champion"] = dict(champion["overall"][mode]) | theirs.get("figures", {})
        paired = (champion.get("comparison") or {}).get(mode, {})
        against["champion"] = {mode: dict(paired) | theirs.get("difference", {})}
    return figures, against


def _value(figures: Mapping[str, Any] | None, label: str, metric: str) -> float:
    if figures is None:
        raise DataError(f"{label} has not been evaluated", where="gate", remedy=AGAIN)
    if metric not in figures:
        raise ConfigError(
            f"{metric} is not among the evaluated metrics",
            where="gate.metric",
            remedy=f"There are {', '.join(figures)}.",
        )
    return float(figures[metric]["value"])


def _headline(passed: bool, rules: list[Rule], mine: float, metric: str, metrics: Mapping[str, Any]) -> str:
    name = model_name(metrics["candidate"])
    of_labelled = "@" not in metric
    rows = (metrics["labelled"] if of_labelled else metrics)["rows"]
    events = f"{rows:,} {'labelled ' if of_labelled else ''}held-out events"
    measured = f"{metric_name(metric)} {mine:.4f} on {events}"
    if passed:
        return f"{name} passed the gate: {measured}"
    against = " and ".join(name_of(rule.against) for rule in rules if rule.outcome == "failed")
    return f"{name} failed the gate against {against}: {measured}"


def name_of(label: str) -> str:
    return "the champion" if label == CHAMPION else in_sentence(label)
