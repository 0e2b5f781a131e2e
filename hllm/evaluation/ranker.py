"""AUC, UAUC and WUAUC of every variant of the ranker, and gains, overall and by segment.

Laid out as tables 6 and 7 of LEARN (arXiv 2405.03988); gains have paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.evaluation.auc import METRICS, Aucs, aucs, intervals, less
from hllm.evaluation.segments import split
from hllm.settings import Settings

# R test impressions, K seeds

Ints = npt.NDArray[np.int64]
VARIANT_NAMES = {
    "base": "(a) base features",
    "vectors": "(b) + vectors and affinity",
    "fusion": "(c) + LEARN's fusion",
}
PART_NAMES = {"vector:found": "user vector found", "vector:missing": "no user vector yet"}
GAINS = (("vectors", "base"), ("fusion", "vectors"), ("fusion", "base"))


def measure(
    settings: Settings,
    labels_R: Ints,
    users_R: Ints,
    user_events_R: Ints,
    item_events_R: Ints,
    affinity_R: npt.NDArray[np.float64],
    scores: Mapping[str, Sequence[npt.NDArray[np.float64]]],
) -> dict[str, Any]:
    """Models and gains for ranking.json; `scores`: variant -> one (R,) per seed. `affinity_R`, nan where
    there is no vector, is also measured alone: does it know of likes at all?

    A figure is the mean over the seeds, and so is every bootstrap sample of it: the interval says how much it
    hangs on these users, `seeds` how much on the start of the training."""
    limits, read_R = settings.evaluation, np.isfinite(affinity_R)
    parts = {
        "overall": np.ones(len(labels_R), bool),
        "vector:found": read_R,
        "vector:missing": ~read_R,
        **split("user", user_events_R, limits.cold_user_events, limits.long_tail_user_events),
        **split("item", item_events_R, limits.cold_item_events, limits.long_tail_item_events),
    }
    found = {
        variant: {
            part: [
                aucs(labels_R[chosen], of_seed[chosen], users_R[chosen], limits.bootstrap, settings.run.seed)
                for of_seed in of_seeds
            ]
            for part, chosen in parts.items()
        }
        for variant, of_seeds in scores.items()
    }
    means = {variant: {part: _mean(each) for part, each in of.items()} for variant, of in found.items()}
    level = limits.confidence
    alone = aucs(labels_R[read_R], affinity_R[read_R], users_R[read_R], limits.bootstrap, settings.run.seed)
    return {
        "affinity_alone": intervals(alone, level),
        "confidence": level,
        "limits": {
            f"{kind}:{name}": getattr(limits, f"{name}_{kind}_events")
            for kind in ("user", "item")
            for name in ("cold", "long_tail")
        },
        "parts": {
            part: {
                "rows": int(chosen.sum()),
                "share": float(chosen.mean()),
                "users": len(np.unique(users_R[chosen])),
            }
            for part, chosen in parts.items()
        },
        "models": {
            variant: {
                "parts": {part: intervals(mean, level) for part, mean in of.items()},
                "seeds": {
                    metric: [float(each.values_3[place]) for each in found[variant]["overall"]]
                    for place, metric in enumerate(METRICS)
                },
            }
            for variant, of in means.items()
        },
        "gains": [
            {
                "of": of,
                "over": over,
                "parts": {part: intervals(less(means[of][part], means[over][part]), level) for part in parts},
            }
            for of, over in GAINS
            if of in means and over in means
        ],
    }


def _mean(found: Sequence[Aucs]) -> Aucs:
    return Aucs(
        np.mean([each.values_3 for each in found], axis=0), np.mean([each.draws_B3 for each in found], axis=0)
    )


def part_name(part: str) -> str:
    from hllm.evaluation.segments import segment_name

    return PART_NAMES.get(part) or segment_name(part)


def tables(results: Mapping[str, Any]) -> str:
    """Markdown, for `hllm rank` and for documents."""
    return "\n\n".join([_about(results), _overall(results), _by_segment(results)])


def _about(results: Mapping[str, Any]) -> str:
    rows, seen = results["rows"], results["with_user_vector"]
    seeds, users = len(results["models"]["base"]["seeds"]["auc"]), results["parts"]["overall"]["users"]
    alone = results["affinity_alone"]
    return (
        f"{rows['train']:,} impressions train, {rows['valid']:,} choose the epoch, {rows['test']:,} of "
        f"{users:,} users test ({results['like_rate']:.1%} liked). A user vector could be read for "
        f"{seen['train']:.0%} of the first and {seen['test']:.0%} of the last, refreshed every "
        f"{results['refresh_hours']:g} h. Means of {seeds} seeds; in brackets {results['confidence']:.0%} "
        "intervals from resampling users; gains are paired, in points (x100). Where there are vectors, the "
        f"affinity alone has AUC {_figure(alone.get('auc'))}, UAUC {_figure(alone.get('uauc'))}."
    )


def _overall(results: Mapping[str, Any]) -> str:
    lines = ["| | AUC | UAUC | WUAUC | AUC by seed |", "|---|---|---|---|---|"]
    for variant, model in results["models"].items():
        cells = [_figure(model["parts"]["overall"].get(metric)) for metric in METRICS]
        seeds = model["seeds"]["auc"]
        lines.append(
            f"| {VARIANT_NAMES[variant]} | {' | '.join(cells)} | {min(seeds):.4f} to {max(seeds):.4f} |"
        )
    for gain in results["gains"]:
        cells = [_points(gain["parts"]["overall"].get(metric)) for metric in METRICS]
        lines.append(f"| {_named(gain)} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _by_segment(results: Mapping[str, Any]) -> str:
    names = [VARIANT_NAMES[variant] for variant in results["models"]]
    gains = [gain for gain in results["gains"] if (gain["of"], gain["over"]) in GAINS[:2]]
    head = ["AUC", "share", *names, *(_named(gain) for gain in gains)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for part, about in results["parts"].items():
        if part == "overall":
            continue
        cells = [f"{about['share']:.1%}"]
        cells += [_value(model["parts"][part].get("auc")) for model in results["models"].values()]
        cells += [_points(gain["parts"][part].get("auc")) for gain in gains]
        lines.append(f"| {part_name(part)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _named(gain: Mapping[str, Any]) -> str:
    letters = {"base": "a", "vectors": "b", "fusion": "c"}
    return f"gain of ({letters[gain['of']]}) over ({letters[gain['over']]})"


def _figure(figure: Mapping[str, float] | None) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" if figure else "-"


def _value(figure: Mapping[str, float] | None) -> str:
    return f"{figure['value']:.4f}" if figure else "-"


def _points(figure: Mapping[str, float] | None) -> str:
    if not figure:
        return "-"
    value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
