from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hllm.errors import DataError
from hllm.models.common.ranking import HeldOut, rank_by_popularity, rank_by_vectors, training_counts
from tests.evaluation.world import prepare, random_histories, unit


def by_hand(users_RD, items_ID, held_out):
    """Ranks as one would explain them, one event at a time."""
    filtered, unfiltered = [], []
    for row, target in enumerate(held_out.targets_R):
        scores = (items_ID.astype(np.float64) * users_RD[row].astype(np.float64)).sum(axis=1)
        ahead = {item for item in range(len(scores)) if item != target and scores[item] >= scores[target]}
        had = set(held_out.event_items[held_out.starts_R[row] : held_out.positions_R[row]].tolist()) - {
            target
        }
        unfiltered.append(1 + len(ahead))
        filtered.append(1 + len(ahead - had))
    return filtered, unfiltered


@pytest.fixture
def world(tmp_path):
    rng = np.random.default_rng(3)
    prepared = prepare(tmp_path, random_histories(rng, users=40, items=60), items=60, test=2)
    held_out = HeldOut.of(prepared, "test")
    return rng, prepared, held_out


def test_ranks_are_those_of_a_plain_loop(world):
    rng, _, held_out = world
    users, items = unit(rng, len(held_out), 16), unit(rng, 60, 16)
    items[30:45] = items[:15]  # items with the same text have the same vector
    ranks = rank_by_vectors(users, items, held_out)
    filtered, unfiltered = by_hand(users, items, held_out)
    assert ranks.filtered_R.tolist() == filtered
    assert ranks.unfiltered_R.tolist() == unfiltered


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block_users=st.integers(1, 90),
    block_items=st.integers(1, 70),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_the_block_size_never_changes_a_rank(world, block_users, block_items, width, seed):
    _, _, held_out = world
    rng = np.random.default_rng(seed)
    users, items = unit(rng, len(held_out), width), unit(rng, 60, width)
    items[rng.integers(0, 60, 10)] = items[rng.integers(0, 60, 10)]
    whole = rank_by_vectors(users, items, held_out)
    blocks = rank_by_vectors(users, items, held_out, block_users=block_users, block_items=block_items)
    assert blocks.filtered_R.tolist() == whole.filtered_R.tolist()
    assert blocks.unfiltered_R.tolist() == whole.unfiltered_R.tolist()


def test_a_model_that_says_the_same_of_every_item_ranks_everything_last(world):
    _, _, held_out = world
    users, items = np.ones((len(held_out), 8), np.float32), np.full((60, 8), 0.3, np.float32)
    ranks = rank_by_vectors(users, items, held_out)
    assert set(ranks.unfiltered_R.tolist()) == {60}
    had = np.array([len(held_out.seen(slice(row, row + 1))[1]) for row in range(len(held_out))])
    assert (ranks.filtered_R == 60 - had).all()


def test_a_target_that_the_user_had_before_is_still_ranked(tmp_path):
    held_out = HeldOut.of(prepare(tmp_path, [[2, 1, 0, 1]], items=3), "test")
    users, items = np.array([[1, 0]], np.float32), np.array([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2]], np.float32)
    ranks = rank_by_vectors(users, items, held_out)
    assert (ranks.unfiltered_R[0], ranks.filtered_R[0]) == (3, 1)


def test_only_what_came_before_the_event_is_filtered(tmp_path):
    held_out = HeldOut.of(prepare(tmp_path, [[0, 1, 2, 3]], items=4, test=2), "test")
    seen = [held_out.seen(slice(row, row + 1))[1].tolist() for row in range(2)]
    assert seen == [[0, 1], [0, 1, 2]]


def test_events_without_a_history_are_counted_and_left_out(tmp_path):
    held_out = HeldOut.of(prepare(tmp_path, [[0], [1, 2, 0]], items=3), "test")
    assert held_out.users_R.tolist() == [1]
    assert held_out.without_history == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e30])
def test_damaged_vectors_are_an_error_and_never_a_rank(world, value):
    rng, _, held_out = world
    users, items = unit(rng, len(held_out), 4), unit(rng, 60, 4)
    items[17] = value
    with pytest.raises(DataError, match=r"sasrec-1: item vectors: vectors are zero.*\(1 of 60\).*row 17"):
        rank_by_vectors(users, items, held_out, "sasrec-1")


def test_vectors_of_another_catalogue_are_an_error(world):
    rng, _, held_out = world
    with pytest.raises(DataError, match="do not fit"):
        rank_by_vectors(unit(rng, len(held_out), 4), unit(rng, 59, 4), held_out)


def test_popularity_counts_training_events_only_and_breaks_ties_in_catalogue_order(tmp_path):
    prepared = prepare(tmp_path, [[3, 3, 2, 0], [3, 1, 1, 1]], items=5)
    assert training_counts(prepared).tolist() == [0, 1, 0, 3, 0]
    held_out = HeldOut.of(prepared, "test")  # order of the catalogue: 3, 1, 0, 2, 4; targets 0 and 1
    ranks = rank_by_popularity(training_counts(prepared), held_out)
    assert ranks.unfiltered_R.tolist() == [3, 2]
    assert ranks.filtered_R.tolist() == [2, 1]


def test_popularity_agrees_with_ranking_its_scores(world):
    _, prepared, held_out = world
    order = np.argsort(-training_counts(prepared), kind="stable")
    scores = np.empty((60, 1), np.float32)
    scores[order, 0] = np.arange(60, 0, -1)
    expected = rank_by_vectors(np.ones((len(held_out), 1), np.float32), scores, held_out)
    ranks = rank_by_popularity(training_counts(prepared), held_out)
    assert ranks.filtered_R.tolist() == expected.filtered_R.tolist()
    assert ranks.unfiltered_R.tolist() == expected.unfiltered_R.tolist()
