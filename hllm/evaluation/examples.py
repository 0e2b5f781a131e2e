"""A few held-out events as a person reads them: what the user had, what was recommended, what they chose."""

from __future__ import annotations

from typing import Any

import numpy as np

from hllm.data.prepared import Prepared
from hllm.models.common.ranking import Floats, HeldOut, Ranks
from hllm.settings import Settings

SHOWN = 5


def examples(
    settings: Settings,
    prepared: Prepared,
    held_out: HeldOut,
    ranks: Ranks,
    users_RD: Floats,
    items_ID: Floats,
) -> list[dict[str, Any]]:
    """Users drawn at random with the run's seed, never picked for their results."""
    evaluation = settings.evaluation
    ids, titles = (prepared.item_table([name])[name].to_pylist() for name in ("item_id", "title"))
    user_ids = prepared.user_table(["user_id"])["user_id"].to_pylist()
    chosen_rank_R = ranks.choose(evaluation.filter_history)

    def named(item: int) -> dict[str, str]:
        return {"item_id": ids[item], "title": titles[item] or ids[item]}

    found = []
    for row in drawn_rows(held_out, evaluation.example_users, settings.run.seed):
        history = held_out.event_items[held_out.starts_R[row] : held_out.positions_R[row]]
        scores_I = items_ID @ users_RD[row]
        if evaluation.filter_history:
            _, seen = held_out.seen(slice(row, row + 1))
            scores_I[seen] = -np.inf
        found.append(
            {
                "user_id": user_ids[held_out.users_R[row]],
                "history": [named(item) for item in history[-SHOWN:]],
                "recommended": [named(item) for item in np.argsort(-scores_I, kind="stable")[:SHOWN]],
                "chosen": named(held_out.targets_R[row]),
                "rank": int(chosen_rank_R[row]),
            }
        )
    return found


def drawn_rows(held_out: HeldOut, count: int, seed: int) -> list[int]:
    """One held-out event of each of `count` users."""
    users, first_rows = np.unique(held_out.users_R, return_index=True)
    drawn = np.random.default_rng(seed).permutation(len(users))[:count]
    return sorted(int(row) for row in first_rows[drawn])
