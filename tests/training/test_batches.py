"""Batches: every event is learned from, nothing held out leaks in, negatives are never the user's own."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.data.prepared import Prepared
from hllm.training.batches import Batches, numbered_texts, training_users
from tests.training.world import prepared_of


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    window=st.integers(2, 9),
    batch=st.integers(1, 5),
)
def test_an_epoch_predicts_every_training_event_but_the_first_exactly_once(
    tmp_path_factory, lengths, window, batch
):
    prepared = prepared_of(tmp_path_factory.mktemp("prepared"), lengths, items=40)
    batches = Batches(prepared, window, batch, 5, seed=1)
    predicted = Counter(
        target for step in range(batches.steps_per_epoch) for target in batches[step].targets_T.tolist()
    )
    expected: Counter[int] = Counter()
    for start, end in zip(prepared.user_offsets[:-1], prepared.train_ends, strict=True):
        expected.update(np.asarray(prepared.event_items[start + 1 : end]).tolist())
    assert predicted == expected


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return prepared_of(tmp_path, [12, 3, 7, 20], items=30)


def test_the_target_is_the_event_after_the_history(prepared: Prepared):
    batch = Batches(prepared, 4, 3, 5, seed=1)[0]
    inside = np.diff(batch.history.packing.sequence_T) == 0
    np.testing.assert_array_equal(batch.history.items_T[1:][inside], batch.targets_T[:-1][inside])


def test_own_training_items_are_marked_and_held_out_ones_are_not(prepared: Prepared):
    batches = Batches(prepared, 50, 4, 30, seed=1)
    own_SN = batches._own(np.arange(4), np.arange(30))
    for user in range(4):
        trained = set(
            np.asarray(prepared.event_items[prepared.user_offsets[user] : prepared.train_ends[user]]).tolist()
        )
        assert set(np.flatnonzero(own_SN[user]).tolist()) == trained


def test_batches_depend_on_seed_and_step_alone(prepared: Prepared):
    one, other = Batches(prepared, 4, 3, 5, seed=1), Batches(prepared, 4, 3, 5, seed=1)
    one[0], one[5]
    for step in (7, 2):
        np.testing.assert_array_equal(one[step].history.items_T, other[step].history.items_T)
        np.testing.assert_array_equal(one[step].negatives_N, other[step].negatives_N)
    different = Batches(prepared, 4, 3, 5, seed=2)
    assert any(one[step].negatives_N.tolist() != different[step].negatives_N.tolist() for step in range(4))


def test_negatives_are_distinct_and_at_most_the_catalogue(prepared: Prepared):
    assert sorted(Batches(prepared, 4, 3, 10_000, seed=1)[0].negatives_N) == list(range(30))
    assert len(set(Batches(prepared, 4, 3, 20, seed=1)[3].negatives_N.tolist())) == 20


def test_items_that_read_the_same_share_a_number(tmp_path: Path):
    prepared = prepared_of(tmp_path, [9], items=12)
    tokens = np.array(prepared.token_ids).reshape(12, 4)
    tokens[7], tokens[11] = tokens[2], tokens[2]
    tokens[5] = np.roll(tokens[2], 1)  # the same words in another order are another text
    twins = dataclasses.replace(prepared, token_ids=tokens.reshape(-1))
    assert numbered_texts(twins).tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 8, 9, 10, 2]


def test_a_share_of_the_users_trains_on_their_events_alone(tmp_path: Path):
    prepared = prepared_of(tmp_path, [5, 9, 3, 7, 4, 8, 6, 2], items=40)
    half, quarter = (training_users(prepared.users, share, seed=3) for share in (0.5, 0.25))
    assert half is not None
    assert quarter is not None
    assert (half.sum(), quarter.sum()) == (4, 2)
    assert not (quarter & ~half).any()  # what a smaller share learns, a larger one learns too
    batches = Batches(prepared, 4, 3, 5, seed=1, users=half)
    assert set(batches.users.tolist()) == set(np.flatnonzero(half).tolist())
    learned = np.concatenate([batches[step].targets_T for step in range(batches.steps_per_epoch)])
    targets = np.maximum(np.asarray(prepared.train_ends) - np.asarray(prepared.user_offsets[:-1]) - 1, 0)
    assert len(learned) == int(targets[half].sum())
    assert training_users(8, 1.0, seed=3) is None


def test_an_item_without_a_training_event_is_no_negative(prepared: Prepared):
    trained = np.concatenate(
        [
            np.asarray(prepared.event_items[start:end])
            for start, end in zip(prepared.train_starts, prepared.train_ends, strict=True)
        ]
    )
    fewer = dataclasses.replace(
        prepared, event_items=np.where(prepared.event_items == trained[0], trained[1], prepared.event_items)
    )  # nobody had this item
    for negatives in (5, 10_000):
        batches = Batches(fewer, 4, 3, negatives, seed=1, cold_negatives=False)
        drawn = {item for step in range(40) for item in batches[step].negatives_N.tolist()}
        assert trained[0] not in drawn
        assert drawn <= set(trained.tolist())
    assert trained[0] in Batches(fewer, 4, 3, 10_000, seed=1)[0].negatives_N
