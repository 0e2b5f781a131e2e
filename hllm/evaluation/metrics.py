"""Recall@K and NDCG@K from ranks, with bootstrap intervals.

R held-out events, U users, M metrics, G groups of equal users, B bootstrap samples.

Every held-out event has one relevant item, so Recall@K is the share of events whose item ranks among the
first K, and NDCG@K is the mean of 1 / log2(rank + 1) over the same events (0 beyond K).

Intervals come from drawing users, not events, with replacement: the events of one user are not independent.
Users whose figures are the same are drawn together by one multinomial draw, which is the same distribution
and makes a thousand samples of a million users cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SAMPLES_AT_ONCE = 4_000_000


class Interval(TypedDict):
    value: float
    low: float
    high: float


def metric_names(cutoffs: Sequence[int]) -> list[str]:
    return [f"{kind}@{cutoff}" for kind in ("recall", "ndcg") for cutoff in cutoffs]


def gains(ranks_R: Ints, cutoffs: Sequence[int]) -> Floats:
    """What each event adds to each metric: (R,) -> (R, M), columns as `metric_names`."""
    ranks = ranks_R[:, None]
    hits = (ranks <= np.asarray(cutoffs)).astype(np.float64)
    return np.concatenate([hits, hits / np.log2(ranks + 1.0)], axis=1)


def evaluate_ranks(
    ranks_R: Ints, users_R: Ints, cutoffs: Sequence[int], samples: int, confidence: float, seed: int
) -> dict[str, Interval]:
    """Every metric with its interval; of no events at all, no metric."""
    if not len(ranks_R):
        return {}
    gains_RM = gains(ranks_R, cutoffs)
    means_BM = resampled_means(gains_RM, users_R, samples, seed)
    low, high = _bounds(means_BM, confidence)
    return {
        name: {"value": float(value), "low": float(low[column]), "high": float(high[column])}
        for column, (name, value) in enumerate(zip(metric_names(cutoffs), gains_RM.mean(axis=0), strict=True))
    }


def compare_ranks(
    ranks_R: Ints,
    other_R: Ints,
    users_R: Ints,
    cutoffs: Sequence[int],
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, dict[str, Interval | None]]:
    """Difference and ratio of every metric between two models on the same events, resampled together.
    A ratio to nothing is None."""
    if not len(ranks_R):
        return {}
    pair = np.concatenate([gains(ranks_R, cutoffs), gains(other_R, cutoffs)], axis=1)
    means_BM = resampled_means(pair, users_R, samples, seed)
    half = pair.shape[1] // 2
    found: dict[str, dict[str, Interval | None]] = {}
    for column, name in enumerate(metric_names(cutoffs)):
        mine, other = pair[:, column].mean(), pair[:, column + half].mean()
        mine_B, other_B = means_BM[:, column], means_BM[:, column + half]
        found[name] = {
            "difference": _interval(mine - other, mine_B - other_B, confidence),
            "ratio": _interval(mine / other, mine_B / other_B, confidence)
            if other > 0 and (other_B > 0).all()
            else None,
        }
    return found


def resampled_means(values_RM: Floats, users_R: Ints, samples: int, seed: int) -> Floats:
    """Means over the events of `samples` draws of the users with replacement: (B, M)."""
    _, user_R = np.unique(users_R, return_inverse=True)
    events_U = np.bincount(user_R).astype(np.float64)
    sums_UM = np.stack([np.bincount(user_R, weights=column) for column in values_RM.T], axis=1)
    figures_G, counts_G = np.unique(np.column_stack([events_U, sums_UM]), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty((samples, values_RM.shape[1]))
    at_once = max(1, SAMPLES_AT_ONCE // len(counts_G))
    for start in range(0, samples, at_once):
        part = slice(start, min(start + at_once, samples))
        drawn_BG = rng.multinomial(len(events_U), counts_G / len(events_U), size=part.stop - part.start)
        totals = drawn_BG.astype(np.float64) @ figures_G
        means[part] = totals[:, 1:] / totals[:, :1]
    return means


def _bounds(means_BM: Floats, confidence: float) -> tuple[Floats, Floats]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means_BM, [tail, 1 - tail], axis=0)
    return low, high


def _interval(value: float, values_B: Floats, confidence: float) -> Interval:
    low, high = _bounds(values_B[:, None], confidence)
    return {"value": float(value), "low": float(low[0]), "high": float(high[0])}
