"""What the ranks of several models say: metrics overall and by segment, and one model against another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hllm.data.prepared import Prepared
from hllm.evaluation.metrics import compare_ranks, evaluate_ranks
from hllm.evaluation.ranking import HeldOut, Ranks
from hllm.evaluation.segments import segments
from hllm.settings import Settings

PART = "test"
FILTERS = ("filtered", "unfiltered")


def measure(
    settings: Settings, prepared: Prepared, held_out: HeldOut, ranks: Mapping[str, Ranks], candidate: str
) -> dict[str, Any]:
    """metrics.json: every model overall and by segment, and the candidate against each other model."""
    parts = segments(prepared, held_out, settings.evaluation)
    return {
        "candidate": candidate,
        "part": PART,
        "headline": FILTERS[0] if settings.evaluation.filter_history else FILTERS[1],
        "rows": len(held_out),
        "users": len(np.unique(held_out.users_R)),
        "rows_without_history": held_out.without_history,
        "catalogue": held_out.items,
        "cutoffs": list(settings.evaluation.cutoffs),
        "confidence": settings.evaluation.confidence,
        "limits": {
            f"{kind}:{name}": getattr(settings.evaluation, f"{name}_{kind}_events")
            for kind in ("item", "user")
            for name in ("cold", "long_tail")
        },
        "models": {label: entry(settings, held_out, parts, model) for label, model in ranks.items()},
        "comparisons": {
            label: compare(settings, held_out, ranks[candidate], model)
            for label, model in ranks.items()
            if label != candidate and candidate in ranks
        },
    }


def entry(
    settings: Settings, held_out: HeldOut, parts: Mapping[str, np.ndarray], ranks: Ranks
) -> dict[str, Any]:
    """One model's metrics, overall and by segment."""

    def figures(chosen: np.ndarray | slice) -> dict[str, Any]:
        users = held_out.users_R[chosen]
        if not len(users):
            return {name: {} for name in FILTERS}
        evaluation = settings.evaluation
        return {
            name: evaluate_ranks(
                ranks.choose(name == "filtered")[chosen],
                users,
                evaluation.cutoffs,
                evaluation.bootstrap,
                evaluation.confidence,
                settings.run.seed,
            )
            for name in FILTERS
        }

    return {
        "overall": figures(slice(None)),
        "segments": {name: {"rows": int(chosen.sum()), **figures(chosen)} for name, chosen in parts.items()},
    }


def compare(settings: Settings, held_out: HeldOut, mine: Ranks, other: Ranks) -> dict[str, Any]:
    """Differences and ratios on the same events, with paired intervals."""
    evaluation = settings.evaluation
    return {
        name: compare_ranks(
            mine.choose(name == "filtered"),
            other.choose(name == "filtered"),
            held_out.users_R,
            evaluation.cutoffs,
            evaluation.bootstrap,
            evaluation.confidence,
            settings.run.seed,
        )
        for name in FILTERS
    }
