"""Metrics of a report: tables and charts of every model, overall and by segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from hllm.evaluation.names import CHAMPION, in_sentence, metric_name, model_name
from hllm.evaluation.segments import FEW_USERS, segment_limit, segment_name
from hllm.models.family import TrainedModel
from hllm.report.charts import Group, Point, forest
from hllm.settings import Settings

ROLES = ("candidate", "stage", "champion", "baseline", "untrained")


@dataclass(frozen=True)
class Model:
    label: str
    name: str
    kind: str
    """Colour and shape in charts."""
    entry: Mapping[str, Any]


@dataclass(frozen=True)
class Against:
    """The candidate compared with one other model."""

    label: str
    role: str
    """champion, baseline, stage (an earlier one of the candidate's family) or untrained."""
    name: str
    overall: Mapping[str, Any]
    segments: Mapping[str, Any]
    missing: str = ""

    def ratio(self, mode: str, metric: str) -> Mapping[str, float] | None:
        return self.overall.get(mode, {}).get(metric, {}).get("ratio")

    def difference(self, mode: str, metric: str) -> Mapping[str, float] | None:
        return self.overall.get(mode, {}).get(metric, {}).get("difference")

    def says(self, mode: str, metric: str) -> str:
        return _says(self.overall.get(mode, {}).get(metric))

    def segments_that_are(self, outcome: str, mode: str, metric: str) -> list[str]:
        return [name for name in self.segments if self.segment_says(name, mode, metric) == outcome]

    def segment_says(self, segment: str, mode: str, metric: str) -> str:
        figures = self.segments.get(segment, {})
        if figures.get("users", 0) < FEW_USERS:
            return "too few users to say" if figures.get("users") else "no events"
        return _says(figures.get(mode, {}).get(metric))


def _says(compared: Mapping[str, Any] | None) -> str:
    """Better or worse only where the whole interval of the difference says so."""
    if not compared:
        return ""
    difference = compared["difference"]
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "no clear difference"


def models_in_order(metrics: Mapping[str, Any], champion: Mapping[str, Any] | None) -> list[Model]:
    """The candidate, its earlier stages, the champion, the other trained models, the untrained ones."""
    candidate = metrics["candidate"]
    entries = {**metrics["models"], **({CHAMPION: champion} if champion else {})}
    roles = {label: role_of(label, candidate) for label in entries}
    order = sorted(entries, key=lambda label: (ROLES.index(roles[label]), -stage_of(label)))
    return [Model(label, model_name(label), roles[label], entries[label]) for label in order]


def role_of(label: str, candidate: str) -> str:
    """What a model is beside the candidate; names colour and shape in charts."""
    if label in (candidate, CHAMPION):
        return "candidate" if label == candidate else "champion"
    trained, own = TrainedModel.of(label), TrainedModel.of(candidate)
    if trained is None:
        return "untrained"
    return "stage" if own and trained.family is own.family else "baseline"


def stage_of(label: str) -> int:
    trained = TrainedModel.of(label)
    return trained.stage if trained else 0


def comparisons(metrics: Mapping[str, Any], champion: Mapping[str, Any] | None) -> list[Against]:
    """Champion, other trained models, earlier stages, untrained ones; a missing champion says so."""
    found = {label: value for label, value in metrics.get("comparisons", {}).items()}
    if champion and champion.get("comparison"):
        found["champion"] = champion["comparison"]
    candidate, order = metrics["candidate"], ("champion", "baseline", "stage", "untrained")
    labels = sorted({CHAMPION: {}, **found}, key=lambda label: order.index(role_of(label, candidate)))
    rows = []
    for label in labels:
        name = "the champion" if label == CHAMPION else in_sentence(label)
        if label in found:
            value = found[label]
            role = role_of(label, candidate)
            rows.append(Against(label, role, name, value, value.get("segments", {}), "nothing to divide by"))
        elif label == CHAMPION:
            missing = "there is no champion yet" if not champion else "not compared"
            rows.append(Against(label, CHAMPION, name, {}, {}, missing))
    return rows


def figure_table(metrics: Mapping[str, Any], models: Sequence[Model], mode: str) -> dict[str, Any]:
    """Rows are models, columns are metrics; the best value of each column is marked."""
    names = [f"{kind}@{cutoff}" for kind in ("ndcg", "recall") for cutoff in metrics["cutoffs"]]
    best = {name: max(model.entry["overall"][mode][name]["value"] for model in models) for name in names}
    rows = [
        {
            "name": model.name,
            "kind": model.kind,
            "cells": [
                {**figure, "best": figure["value"] == best[name] > 0}
                for name, figure in ((name, model.entry["overall"][mode][name]) for name in names)
            ],
        }
        for model in models
    ]
    return {"columns": [metric_name(name) for name in names], "rows": rows}


def labelled_table(
    metrics: Mapping[str, Any], champion: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """AUC, UAUC and WUAUC of every model, and what the candidate has more than each; None for a candidate
    that was not trained to judge."""
    found = metrics.get("labelled")
    if not found:
        return None
    candidate, models, gaps = metrics["candidate"], dict(found["models"]), dict(found["differences"])
    if champion and "labelled" in champion:
        models["champion"] = champion["labelled"]["figures"]
        gaps["champion"] = champion["labelled"].get("difference", {})
    first = [label for label in (candidate, "champion") if label in models]
    names = list(models[candidate])
    rows = []
    for label in (*first, *(label for label in models if label not in first)):
        cells = [
            {**models[label][name], "gap": gap, "says": _says({"difference": gap} if gap else None)}
            for name in names
            if name in models[label]
            for gap in (gaps.get(label, {}).get(name),)
        ]
        rows.append({"name": model_name(label), "candidate": label == candidate, "cells": cells})
    return {**found, "columns": [metric_name(name) for name in names], "rows_of_models": rows}


def forest_charts(settings: Settings, models: Sequence[Model], metrics: Mapping[str, Any]) -> list[Markup]:
    """The gate's metric and its sibling (Recall for NDCG), every model with its interval."""
    kind, _, cutoff = settings.gate.metric.partition("@")
    mode = metrics["headline"]
    charts = []
    for metric in (settings.gate.metric, f"{'recall' if kind == 'ndcg' else 'ndcg'}@{cutoff}"):
        points = [
            _point(model, model.entry["overall"][mode][metric])
            for model in models
            if metric in model.entry["overall"][mode]
        ]
        if points:
            charts.append(forest(metric_name(metric), _axis(metric), [Group("", "", points)]))
    return charts


def segment_charts(settings: Settings, models: Sequence[Model], metrics: Mapping[str, Any]) -> list[Markup]:
    """By items and by users."""
    metric, mode = settings.gate.metric, metrics["headline"]
    charts = []
    for kind in ("item", "user"):
        groups = []
        for segment, figures in models[0].entry["segments"].items():
            if segment.startswith(f"{kind}:") and figures["rows"]:
                points = [_point(model, model.entry["segments"][segment][mode][metric]) for model in models]
                groups.append(
                    Group(segment_name(segment).capitalize(), f"{figures['rows']:,} events", points)
                )
        if groups:
            charts.append(forest(f"{metric_name(metric)} by {kind}s", _axis(metric), groups))
    return charts


def segment_table(
    settings: Settings, models: Sequence[Model], against: Sequence[Against], metrics: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Who is in each segment, and whether the candidate is better there than the others."""
    metric, mode = settings.gate.metric, metrics["headline"]
    rivals = [row for row in against if row.role != "stage" and row.overall]
    rows = []
    for segment, figures in models[0].entry["segments"].items():
        rows.append(
            {
                "name": segment_name(segment),
                "limit": segment_limit(segment, metrics["limits"]) if "limits" in metrics else "",
                "rows": figures["rows"],
                "value": figures[mode][metric]["value"] if figures["rows"] else None,
                "says": [(rival.name, rival.segment_says(segment, mode, metric)) for rival in rivals],
            }
        )
    return rows


def _point(model: Model, figure: Mapping[str, float]) -> Point:
    return Point(model.name, model.kind, figure["value"], figure["low"], figure["high"])


def _axis(metric: str) -> str:
    return f"{metric_name(metric)} (0 to 1, higher is better)"
