"""A comparison as one self-contained page: the table, the intervals side by side, curves along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hllm import report
from hllm.comparison import scaling
from hllm.comparison.result import Result
from hllm.comparison.table import effort, heading
from hllm.comparison.work import Pipeline
from hllm.evaluation.names import mark_of
from hllm.report.charts import STYLES, Group, Point, forest

FEW_EVENTS = 100


def page(result: Result, found: Sequence[Pipeline]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(report.__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparison = result.comparison
    shared = set.intersection(*(set(entry.sets) for entry in comparison.entries))
    values = {
        "title": comparison.title,
        "heading": heading(result),
        "made": found[-1].finished("evaluate").created_at,
        "code_version": found[-1].finished("evaluate").code_version,
        "config": comparison.config.name,
        "columns": [metric.title for metric in comparison.metrics],
        "ratio": f"{comparison.metrics[0].title}, ratio",
        "took": ["parameters", "steps", "trained for"],
        "rows": _rows(result),
        "few": _few(result),
        "charts": _charts(result),
        "axis": comparison.axis,
        "curves": scaling.charts(comparison.axis, result.laws),
        "fitted": scaling.sentence(result.laws),
        "settings": result.settings,
        "shared": ", ".join(value for value in comparison.entries[0].sets if value in shared),
    }
    return environment.get_template("page.html").render(values)


def _rows(result: Result) -> list[dict[str, Any]]:
    found, first = result.figures.found, str(result.comparison.metrics[0])
    names = [str(metric) for metric in result.comparison.metrics]
    best = {
        str(metric): (min if metric.lower_is_better else max)(
            (figures[str(metric)]["value"] for figures in found.values() if str(metric) in figures),
            default=0.0,
        )
        for metric in result.comparison.metrics
    }
    return [
        {
            "name": model,
            "reference": model == result.comparison.reference,
            "cells": [
                {**figures[name], "best": figures[name]["value"] == best[name] > 0}
                if name in figures
                else None
                for name in names
            ],
            "ratio": result.figures.ratios.get(model, {}).get(first),
            "effort": _effort(result, model),
        }
        for model, figures in found.items()
    ]


def _effort(result: Result, model: str) -> list[tuple[str, str]]:
    """Of each column what stands in it, and what stands below that."""
    found = result.efforts.get(model)
    if found is None:
        return [("–", "")] * 3
    *others, seconds = effort(found)
    return [*((value, "") for value in others), (seconds, f"at most {found.memory_mb:,} MB")]


def _few(result: Result) -> str:
    return ", ".join(
        f"{metric.title} ({result.figures.events[str(metric)]:,})"
        for metric in result.comparison.metrics
        if result.figures.events[str(metric)] < FEW_EVENTS
    )


def _charts(result: Result) -> list[Markup]:
    kinds = {entry.name: STYLES[mark_of(entry.label)] for entry in result.comparison.entries}
    charts = []
    for metric in result.comparison.metrics:
        points = [
            Point(name, kinds.get(name, "untrained"), **figures[str(metric)])
            for name, figures in result.figures.found.items()
            if str(metric) in figures
        ]
        if points:
            title = metric.title
            says = "nats, lower is better" if metric.lower_is_better else "0 to 1, higher is better"
            charts.append(forest(title, f"{title} ({says})", [Group("", "", points)]))
    return charts
