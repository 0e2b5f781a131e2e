"""Our numbers against an independent library."""

from __future__ import annotations

import numpy as np
import pytest

from hllm.evaluation.metrics import evaluate_ranks
from hllm.models.common.ranking import HeldOut, rank_by_vectors
from tests.evaluation.world import prepare, random_histories, unit

CUTOFFS = (1, 5, 10, 40)


@pytest.mark.parametrize("filter_history", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recall_and_ndcg_agree_with_ranx(tmp_path, seed, filter_history):
    from ranx import Qrels, Run, evaluate

    rng = np.random.default_rng(seed)
    prepared = prepare(tmp_path, random_histories(rng, users=50, items=45), items=45, test=2)
    held_out = HeldOut.of(prepared, "test")
    users, items = unit(rng, len(held_out), 8), unit(rng, 45, 8)
    ranks = rank_by_vectors(users, items, held_out).choose(filter_history)
    ours = evaluate_ranks(ranks, held_out.users_R, CUTOFFS, samples=10, confidence=0.95, seed=0)

    scores = users.astype(np.float64) @ items.T.astype(np.float64)
    truth, run = {}, {}
    for row, target in enumerate(held_out.targets_R):
        had = set(held_out.event_items[held_out.starts_R[row] : held_out.positions_R[row]].tolist()) - {
            int(target)
        }
        kept = [item for item in range(45) if not (filter_history and item in had)]
        truth[f"q{row}"] = {f"i{target}": 1}
        run[f"q{row}"] = {f"i{item}": float(scores[row, item]) for item in kept}
    theirs = evaluate(Qrels(truth), Run(run), list(ours), make_comparable=True)
    assert {name: figure["value"] for name, figure in ours.items()} == pytest.approx(dict(theirs), abs=1e-9)
