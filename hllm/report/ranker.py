"""What a report says of ranking: what the vectors gain a reference ranker, beside the champion's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hllm.evaluation.auc import METRICS
from hllm.evaluation.ranker import PART_NAMES, part_name
from hllm.evaluation.segments import FEW_USERS, segment_limit

NAMES = {
    "base": "(a) base features",
    "vectors": "(b) with vectors and affinity",
    "fusion": "(c) with LEARN's fusion as well",
}
LETTERS = {"base": "(a)", "vectors": "(b)", "fusion": "(c)"}


def ranking_section(ranking: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows of the section's tables, figures as they are and gains in points; None without a result."""
    if not ranking:
        return None
    results, champion = ranking["results"], ranking["champion"]
    rows = [
        {"name": NAMES[variant], "cells": [model["parts"]["overall"].get(metric) for metric in METRICS]}
        for variant, model in results["models"].items()
    ]
    gains = [_gain(_over(gain), gain["parts"]["overall"]) for gain in results["gains"]]
    if champion:
        theirs = f"the champion's (version {ranking['version']})"
        gains += [_gain(f"{theirs} {_over(gain)}", gain["parts"]["overall"]) for gain in champion["gains"]]
        gains += [
            _gain(f"candidate less champion, {LETTERS[variant]}", figures)
            for variant, figures in ranking["differences"].items()
        ]
    return {
        "letters": [LETTERS[variant] for variant in results["models"]],
        "metrics": [metric.upper() for metric in METRICS],
        "results": results,
        "rows": rows,
        "gains": gains,
        "champion": champion,
        "comparable": bool(champion and ranking["differences"]),
        "segments": [
            _segment(part, about, results) for part, about in results["parts"].items() if part != "overall"
        ],
    }


def gain_in_words(figure: Mapping[str, float] | None) -> str:
    """`+0.78 points (+0.31 to +1.22)`."""
    if not figure:
        return "unknown"
    value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} points ({low:+.2f} to {high:+.2f})".replace("-", "−")


def _over(gain: Mapping[str, Any]) -> str:
    return f"{LETTERS[gain['of']]} over {LETTERS[gain['over']]}"


def _gain(name: str, figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    auc = figures.get("auc")
    return {
        "name": name,
        "cells": [_points(figures.get(metric)) for metric in METRICS],
        "says": says(auc),
    }


def says(figure: Mapping[str, float] | None) -> str:
    """Better or worse only where the whole interval says so."""
    if not figure:
        return "unknown"
    if figure["low"] > 0:
        return "better"
    return "worse" if figure["high"] < 0 else "no clear difference"


def _segment(part: str, about: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    gains = [gain["parts"][part].get("auc") for gain in results["gains"][:2]]
    few = about["users"] < FEW_USERS
    return {
        "name": part_name(part),
        "limit": _limit(part, results["limits"]),
        "rows": about["rows"],
        "share": about["share"],
        "cells": [model["parts"][part].get("auc") for model in results["models"].values()],
        "gains": [
            {"points": _points(gain), "says": ("too few users to say" if few and gain else says(gain))}
            for gain in gains
        ],
    }


def _limit(part: str, limits: Mapping[str, int]) -> str:
    if part in PART_NAMES:
        return ""
    return segment_limit(part, limits).replace("training events", "events before the test")


def _points(figure: Mapping[str, float] | None) -> dict[str, float] | None:
    return {name: 100 * value for name, value in figure.items()} if figure else None
