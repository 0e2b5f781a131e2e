from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.evaluation.metrics import compare_ranks, evaluate_ranks, gains, metric_names, resampled_means

CUTOFFS = (5, 10, 50)
BOOT = {"samples": 400, "confidence": 0.95, "seed": 1}


def test_values_a_person_can_check():
    found = evaluate_ranks(np.array([1, 3, 11, 200]), np.arange(4), CUTOFFS, **BOOT)
    assert found["recall@5"]["value"] == 0.5
    assert found["recall@50"]["value"] == 0.75
    assert found["ndcg@10"]["value"] == pytest.approx((1 + 0.5) / 4)


@settings(max_examples=50, deadline=None)
@given(ranks=st.lists(st.integers(1, 300), min_size=1, max_size=60), users=st.integers(1, 9))
def test_metrics_and_intervals_keep_their_order(ranks, users):
    ranks = np.array(ranks)
    found = evaluate_ranks(ranks, np.arange(len(ranks)) % users, CUTOFFS, samples=50, confidence=0.9, seed=0)
    assert list(found) == metric_names(CUTOFFS)
    for kind in ("recall", "ndcg"):
        values = [found[f"{kind}@{cutoff}"]["value"] for cutoff in CUTOFFS]
        assert values == sorted(values)
    for cutoff in CUTOFFS:
        assert found[f"ndcg@{cutoff}"]["value"] <= found[f"recall@{cutoff}"]["value"] + 1e-12
    assert all(0 <= figure["low"] <= figure["high"] <= 1 + 1e-12 for figure in found.values())
    better = evaluate_ranks(np.maximum(ranks - 1, 1), np.arange(len(ranks)) % users, CUTOFFS, 50, 0.9, 0)
    assert all(better[name]["value"] >= found[name]["value"] for name in found)


def test_the_same_seed_gives_the_same_interval_in_any_order_of_events():
    rng = np.random.default_rng(0)
    ranks, users = rng.integers(1, 100, 300), rng.integers(0, 80, 300)
    order = rng.permutation(300)
    first = evaluate_ranks(ranks, users, CUTOFFS, **BOOT)
    again = evaluate_ranks(ranks[order], users[order], CUTOFFS, **BOOT)
    for name in first:
        assert again[name] == pytest.approx(first[name])
    assert first != evaluate_ranks(ranks, users, CUTOFFS, **{**BOOT, "seed": 2})


def test_grouped_draws_have_the_spread_of_drawing_users_one_by_one():
    rng = np.random.default_rng(5)
    ranks, users = rng.integers(1, 30, 400), rng.integers(0, 150, 400)
    values = gains(ranks, (10,))
    ours = resampled_means(values, users, 4000, seed=0)[:, 1]
    _, user = np.unique(users, return_inverse=True)
    count, total = np.bincount(user), np.bincount(user, weights=values[:, 1])
    drawn = rng.integers(0, len(count), (4000, len(count)))
    plain = total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    assert ours.mean() == pytest.approx(plain.mean(), rel=0.01)
    assert ours.std() == pytest.approx(plain.std(), rel=0.06)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = 0
    for repeat in range(200):
        liking = rng.beta(1, 3, 100)  # users differ, so the events of one user hang together
        hits = rng.random((100, 4)) < liking[:, None]
        ranks = np.where(hits, 1, 99).ravel()
        found = evaluate_ranks(
            ranks, np.repeat(np.arange(100), 4), (10,), samples=300, confidence=0.95, seed=repeat
        )
        covered += found["recall@10"]["low"] <= 0.25 <= found["recall@10"]["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_many_events_of_one_user_are_not_many_witnesses():
    ranks = np.tile([1, 99], 50)
    alone = evaluate_ranks(ranks, np.arange(100), (10,), **BOOT)["recall@10"]
    pairs = evaluate_ranks(np.repeat([1, 99], 50), np.repeat(np.arange(10), 10), (10,), **BOOT)["recall@10"]
    assert pairs["high"] - pairs["low"] > 2 * (alone["high"] - alone["low"])


def test_a_model_compared_with_itself_is_certainly_equal():
    ranks = np.random.default_rng(0).integers(1, 20, 200)
    found = compare_ranks(ranks, ranks, np.arange(200), CUTOFFS, **BOOT)["ndcg@10"]
    assert found["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_paired_interval_is_narrower_than_two_separate_ones():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 30, 500)
    worse = ranks + (rng.random(500) < 0.1)
    paired = compare_ranks(ranks, worse, np.arange(500), (10,), **BOOT)["ndcg@10"]["difference"]
    single = evaluate_ranks(ranks, np.arange(500), (10,), **BOOT)["ndcg@10"]
    assert 0 < paired["low"] <= paired["value"] <= paired["high"]
    assert paired["high"] - paired["low"] < (single["high"] - single["low"]) / 3


def test_a_ratio_to_a_model_without_any_hit_is_none_and_not_infinite():
    found = compare_ranks(np.array([1, 2]), np.array([90, 90]), np.arange(2), (10,), **BOOT)["ndcg@10"]
    assert found["ratio"] is None
    assert found["difference"]["value"] > 0
