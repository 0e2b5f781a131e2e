"""AUC, UAUC and WUAUC of scored impressions, with bootstrap intervals.

R impressions (a user was shown an item and liked it or not), U users, S distinct scores, B bootstrap samples.

AUC: how often a liked impression scores above one that was not liked; equal scores count half. UAUC: the mean
of the users' own AUCs. WUAUC: the same weighted by the users' impressions (LEARN, arXiv 2405.03988; tables 13
and 14 of HLLM have AUC alone). A user whose impressions are all liked, or none, has no AUC of their own and
counts in AUC only.

Intervals come from drawing users with replacement, as in `hllm.evaluation.metrics`: the impressions of one
user are not independent. The same seed draws the same users, so two models on the same impressions are
compared draw by draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hllm.errors import DataError
from hllm.evaluation.metrics import Interval

Floats = npt.NDArray[np.float64]
METRICS = ("auc", "uauc", "wuauc")
WEIGHTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Aucs:
    """AUC, UAUC and WUAUC, in this order; nan where nobody has both kinds of impressions."""

    values_3: Floats
    draws_B3: Floats
    """Of every bootstrap sample; nan where a sample has no figure."""


def evaluate_scores(
    labels_R: npt.NDArray[np.integer],
    scores_R: npt.NDArray[np.floating],
    users_R: npt.NDArray[np.generic],
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """`auc`, `uauc` and `wuauc` with their intervals; a metric that nobody has is left out.

    Raises:
        DataError: a label is not 0 or 1, a score is not finite, or the three differ in length.
    """
    return intervals(aucs(labels_R, scores_R, users_R, samples, seed), confidence)


def compare_scores(
    labels_R: npt.NDArray[np.integer],
    scores_R: npt.NDArray[np.floating],
    other_R: npt.NDArray[np.floating],
    users_R: npt.NDArray[np.generic],
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """The first model's metrics less the other's on the same impressions, with paired intervals."""
    mine, other = (aucs(labels_R, scores, users_R, samples, seed) for scores in (scores_R, other_R))
    return intervals(less(mine, other), confidence)


def less(mine: Aucs, other: Aucs) -> Aucs:
    """Differences, draw by draw; both must come from the same users and seed."""
    return Aucs(mine.values_3 - other.values_3, mine.draws_B3 - other.draws_B3)


def intervals(found: Aucs, confidence: float) -> dict[str, Interval]:
    tail = (1 - confidence) / 2
    figures: dict[str, Interval] = {}
    for name, value, draws_B in zip(METRICS, found.values_3, found.draws_B3.T, strict=True):
        draws = draws_B[np.isfinite(draws_B)]
        if np.isfinite(value) and len(draws):
            low, high = np.quantile(draws, [tail, 1 - tail])
            figures[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return figures


def aucs(
    labels_R: npt.NDArray[np.integer],
    scores_R: npt.NDArray[np.floating],
    users_R: npt.NDArray[np.generic],
    samples: int,
    seed: int,
) -> Aucs:
    """The three metrics, and what they are in each of `samples` draws of the users with replacement."""
    labels_R, scores_R, users_R = (np.asarray(column) for column in (labels_R, scores_R, users_R))
    _refuse_bad(labels_R, scores_R, users_R)
    nothing = np.full(3, np.nan)
    if not len(labels_R):
        return Aucs(nothing, np.full((samples, 3), np.nan))
    _, user_R = np.unique(users_R, return_inverse=True)
    users = int(user_R.max()) + 1
    own_U, impressions_U = _user_aucs(labels_R, scores_R, user_R)
    order = np.argsort(scores_R, kind="stable")
    starts_S = np.flatnonzero(np.diff(scores_R[order], prepend=-np.inf) > 0)
    liked_R, user_R = labels_R[order].astype(np.float64), user_R[order]

    def metrics(weights_BU: Floats) -> Floats:
        """The metrics where user u counts weights_BU[:, u] times: (B, 3)."""
        of_rows_BR = weights_BU[:, user_R]
        liked_BS = np.add.reduceat(of_rows_BR * liked_R, starts_S, axis=1)
        not_BS = np.add.reduceat(of_rows_BR * (1 - liked_R), starts_S, axis=1)
        beaten_B = (liked_BS * (np.cumsum(not_BS, axis=1) - not_BS / 2)).sum(axis=1)
        some_U = np.isfinite(own_U)
        mine_BU = weights_BU[:, some_U]
        by_rows_BU = mine_BU * impressions_U[some_U]
        return np.stack(
            [
                _ratio(beaten_B, liked_BS.sum(axis=1) * not_BS.sum(axis=1)),
                _ratio(mine_BU @ own_U[some_U], mine_BU.sum(axis=1)),
                _ratio(by_rows_BU @ own_U[some_U], by_rows_BU.sum(axis=1)),
            ],
            axis=1,
        )

    rng, draws_B3 = np.random.default_rng(seed), np.empty((samples, 3))
    at_once = max(1, WEIGHTS_AT_ONCE // len(labels_R))
    for start in range(0, samples, at_once):
        part = slice(start, min(start + at_once, samples))
        drawn_BU = rng.multinomial(users, np.full(users, 1 / users), size=part.stop - part.start)
        draws_B3[part] = metrics(drawn_BU.astype(np.float64))
    return Aucs(metrics(np.ones((1, users)))[0], draws_B3)


def _user_aucs(
    labels_R: npt.NDArray[np.integer], scores_R: npt.NDArray[np.floating], user_R: npt.NDArray[np.integer]
) -> tuple[Floats, Floats]:
    """Every user's own AUC (nan without both kinds of impressions) and number of impressions: (U,), (U,).

    By ranks within the user, ties at their mean: U = sum of the liked ones' ranks - P (P + 1) / 2."""
    order = np.lexsort((scores_R, user_R))
    user, score, liked = user_R[order], scores_R[order], labels_R[order].astype(np.float64)
    new = np.append(True, (np.diff(user) != 0) | (np.diff(score) != 0))
    tie = np.cumsum(new) - 1
    firsts = np.flatnonzero(new)
    lasts = np.append(firsts[1:], len(user)) - 1
    counts_U = np.bincount(user).astype(np.float64)
    before_U = np.cumsum(counts_U) - counts_U
    ranks = ((firsts + lasts) / 2)[tie] + 1 - before_U[user]
    liked_U = np.bincount(user, weights=liked)
    rank_sums_U = np.bincount(user, weights=ranks * liked)
    pairs_U = liked_U * (counts_U - liked_U)
    return _ratio(rank_sums_U - liked_U * (liked_U + 1) / 2, pairs_U), counts_U


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _refuse_bad(
    labels_R: npt.NDArray[np.integer], scores_R: npt.NDArray[np.floating], users_R: npt.NDArray[np.generic]
) -> None:
    if not len(labels_R) == len(scores_R) == len(users_R):
        raise DataError(
            f"{len(labels_R):,} labels, {len(scores_R):,} scores and {len(users_R):,} users "
            "do not belong together",
            where="auc",
        )
    for what, bad in (
        ("labels are not 0 or 1", ~np.isin(labels_R, (0, 1))),
        ("scores are not finite", ~np.isfinite(scores_R)),
    ):
        if bad.any():
            raise DataError(
                what,
                where="auc",
                count=(int(bad.sum()), len(bad)),
                examples=[f"row {row}" for row in np.flatnonzero(bad)[:3]],
            )
