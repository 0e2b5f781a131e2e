"""What a report says about the work: training curves, and time and cost of every step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hllm.evaluation.names import metric_name, model_name
from hllm.report.charts import lines, short_count
from hllm.report.words import duration
from hllm.settings import Settings
from hllm.work import costs
from hllm.work.artifacts import Manifest

POINTS = 400


def training_curves(folders: Mapping[str, Path]) -> list[Markup]:
    """The loss of every trained model, then the validation metrics where they were looked at."""
    losses, looks = [], []
    for step, folder in folders.items():
        path = folder / "curves.jsonl"
        if not step.startswith("train-") or not path.exists():
            continue
        name = model_name(step.removeprefix("train-"))
        for curve, points in read_curves(path).items():
            if curve == "loss":
                losses.append(_chart(f"{name}: training loss", "loss (nats)", points, noisy=True))
            elif curve.startswith("valid"):
                metric = metric_name(curve.removeprefix("valid_"))
                looks.append(_chart(f"{name}: {metric} on validation events", metric, points, noisy=False))
    return losses + looks


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value). A step that was repeated after a kill counts once, the last time."""
    curves: dict[str, dict[float, float]] = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut off
            continue
        for name, value in row.items():
            if name != "at" and value == value and abs(value) != float("inf"):
                curves.setdefault(name, {})[row["at"]] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def _chart(title: str, y_axis: str, points: list[tuple[float, float]], noisy: bool) -> Markup:
    shown = points[:: max(1, len(points) // POINTS)]
    if shown[-1] != points[-1]:
        shown.append(points[-1])
    steps, values = [step for step, _ in shown], [value for _, value in shown]
    return lines(title, "optimizer step", y_axis, steps, values, smooth=noisy)


def cost_table(settings: Settings, manifests: Mapping[str, Manifest]) -> dict[str, Any] | None:
    """Time, processors, GPUs, memory and money per step, in the order in which they ran."""
    if not manifests:
        return None
    report, whole = settings.report, costs.total(settings.report, manifests.values())
    rows = [
        {
            "step": step,
            "time": duration(manifest.seconds),
            "share": manifest.seconds / whole["seconds"] if whole["seconds"] else 0.0,
            "cpu": _number(manifest.usage.get(costs.CPU)),
            "gpu": _number(manifest.usage.get(costs.GPU)),
            "cost": f"{costs.cost(report, manifest):.4f}",
            "memory": _number(manifest.usage.get(costs.MEMORY)),
            "what": _facts(manifest),
        }
        for step, manifest in manifests.items()
    ]
    prices = [f"{report.price_per_hour:g} {report.currency} per machine hour (report.price_per_hour)"]
    if report.price_per_gpu_hour:
        prices.append(f"{report.price_per_gpu_hour:g} per GPU hour (report.price_per_gpu_hour)")
    priced = bool(report.price_per_hour or report.price_per_gpu_hour)
    return {
        "rows": rows,
        "time": duration(whole["seconds"]),
        "cost": f"{whole['cost']:.4f}" if priced else "",
        "prices": " and ".join(prices),
        "currency": report.currency,
        "cpu": any(row["cpu"] for row in rows),
        "gpu": whole[costs.GPU] > 0,
        "memory": any(row["memory"] for row in rows),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _facts(manifest: Manifest) -> str:
    """What the step worked on, shortly."""
    shown = [f"{count:,} {name.replace('_', ' ')}" for name, count in manifest.rows.items()]
    for name in ("parameters", "steps"):
        if isinstance(manifest.facts.get(name), int | float):
            shown.append(f"{short_count(float(f'{manifest.facts[name]:.3g}'))} {name}")
    if {"first_loss", "last_loss"} <= manifest.facts.keys():
        shown.append(f"loss {manifest.facts['first_loss']:.3f} to {manifest.facts['last_loss']:.3f}")
    return ", ".join(shown)
