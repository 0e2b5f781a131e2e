"""What a report says about the work: training curves, and time and cost of every step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hllm.artifacts import Manifest
from hllm.evaluation.names import metric_name, model_name
from hllm.evaluation.report.charts import lines, short_count
from hllm.evaluation.report.words import duration
from hllm.settings import Settings

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
    """Seconds and money per step, in the order in which they ran."""
    if not manifests:
        return None
    total = sum(manifest.seconds for manifest in manifests.values())
    price = settings.report.price_per_hour
    rows = [
        {
            "step": step,
            "time": duration(manifest.seconds),
            "share": manifest.seconds / total if total else 0.0,
            "cost": _money(manifest.seconds, price),
            "memory": f"{manifest.facts['peak_memory_mb']:,.0f}"
            if "peak_memory_mb" in manifest.facts
            else "",
            "what": _facts(manifest),
        }
        for step, manifest in manifests.items()
    ]
    return {
        "rows": rows,
        "time": duration(total),
        "cost": _money(total, price),
        "price": f"{price:g}",
        "currency": settings.report.currency,
        "memory": any(row["memory"] for row in rows),
    }


def _money(seconds: float, price: float) -> str:
    return f"{seconds / 3600 * price:.4f}" if price else ""


def _facts(manifest: Manifest) -> str:
    """What the step worked on, shortly."""
    shown = [f"{count:,} {name.replace('_', ' ')}" for name, count in manifest.rows.items()]
    for name in ("parameters", "steps"):
        if isinstance(manifest.facts.get(name), int | float):
            shown.append(f"{short_count(float(f'{manifest.facts[name]:.3g}'))} {name}")
    if {"first_loss", "last_loss"} <= manifest.facts.keys():
        shown.append(f"loss {manifest.facts['first_loss']:.3f} to {manifest.facts['last_loss']:.3f}")
    return ", ".join(shown)
