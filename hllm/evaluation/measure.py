"""What the ranks of several models say: metrics overall and by segment, and one model against another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hllm.data.prepared import Prepared
from hllm.evaluation.metrics import compare_ranks, evaluate_ranks
from hllm.evaluation.segments import segments
from hllm.models.common.ranking import HeldOut, Ranks
from hllm.settings import Settings

PART = "test"
Parts = Mapping[str, np.ndarray]
"""Segment -> which held-out events belong to it."""
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
            label: compare(settings, held_out, parts, ranks[candidate], model)
            for label, model in ranks.items()
            if label != candidate and candidate in ranks
        },
    }


def entry(settings: Settings, held_out: HeldOut, parts: Parts, ranks: Ranks) -> dict[str, Any]:
    """One model's metrics, overall and by segment."""

    def figures(name: str, chosen: np.ndarray | slice) -> dict[str, Any]:
        chosen_ranks = ranks.choose(name == FILTERS[0])[chosen]
        return evaluate_ranks(chosen_ranks, held_out.users_R[chosen], **_sampling(settings))

    return {
        "overall": {name: figures(name, slice(None)) for name in FILTERS},
        "segments": {
            segment: {"rows": int(chosen.sum()), **{name: figures(name, chosen) for name in FILTERS}}
            for segment, chosen in parts.items()
        },
    }


def compare(settings: Settings, held_out: HeldOut, parts: Parts, mine: Ranks, other: Ranks) -> dict[str, Any]:
    """Differences and ratios on the same events with paired intervals, overall and by segment."""

    def figures(name: str, chosen: np.ndarray | slice) -> dict[str, Any]:
        my_ranks, other_ranks = (ranks.choose(name == FILTERS[0])[chosen] for ranks in (mine, other))
        return compare_ranks(my_ranks, other_ranks, held_out.users_R[chosen], **_sampling(settings))

    return {
        **{name: figures(name, slice(None)) for name in FILTERS},
        "segments": {
            segment: {
                "users": len(np.unique(held_out.users_R[chosen])),
                **{name: figures(name, chosen) for name in FILTERS},
            }
            for segment, chosen in parts.items()
        },
    }


def _sampling(settings: Settings) -> dict[str, Any]:
    return {
        "cutoffs": settings.evaluation.cutoffs,
        "samples": settings.evaluation.bootstrap,
        "confidence": settings.evaluation.confidence,
        "seed": settings.run.seed,
    }
