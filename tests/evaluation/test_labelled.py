"""What is said of labelled held-out events, against the same figures worked out another way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from sklearn.metrics import roc_auc_score

from hllm.data.prepared import Prepared
from hllm.errors import DataError
from hllm.evaluation.champion import score_package
from hllm.evaluation.labelled import (
    PRIOR_EVENTS,
    cosines,
    item_rates,
    labelled_rows,
    measure_champion,
    measure_labelled,
    one_class_users,
    read_scores,
    untrained_scores,
    write_scores,
)
from hllm.models.common.ranking import HeldOut, training_counts
from hllm.settings import Settings
from tests.evaluation.world import SmallPackage, prepare, random_histories, unit

SETTINGS = Settings.model_validate({"evaluation": {"bootstrap": 50}})


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Four test events for each user, a few without a label."""
    rng = np.random.default_rng(1)
    found = prepare(tmp_path, random_histories(rng, 60, 25), items=25, test=4, valid=1)
    labels = rng.choice([-1, 0, 1], len(found.event_items), p=[0.1, 0.4, 0.5]).astype(np.int8)
    return dataclasses.replace(found, event_labels=labels)


@pytest.fixture
def judged(prepared: Prepared) -> HeldOut:
    held_out = HeldOut.of(prepared, "test")
    return held_out.take(labelled_rows(prepared, held_out))


def test_only_events_with_a_label_are_judged_and_everybody_is_counted(prepared: Prepared, judged: HeldOut):
    labels, users = prepared.event_labels[judged.positions_R], judged.users_R
    assert set(labels.tolist()) == {0, 1}
    assert len(judged) < len(HeldOut.of(prepared, "test"))
    scores = {"hllm-2": np.random.default_rng(0).random(len(judged))}
    scores |= untrained_scores(SETTINGS, prepared, judged)
    found = measure_labelled(SETTINGS, prepared, judged, scores, "hllm-2")
    assert (found["rows"], found["liked"]) == (len(labels), labels.sum())
    both = [user for user in np.unique(users) if len(set(labels[users == user])) == 2]
    assert found["users_with_one_class"] == found["users"] - len(both) > 0
    for label, values in scores.items():
        own = [roc_auc_score(labels[users == user], values[users == user]) for user in both]
        counts = [(users == user).sum() for user in both]
        figures = found["models"][label]
        assert figures["auc"]["value"] == pytest.approx(roc_auc_score(labels, values))
        assert figures["uauc"]["value"] == pytest.approx(np.mean(own))
        assert figures["wuauc"]["value"] == pytest.approx(np.average(own, weights=counts))
    gap = found["differences"]["popular"]["uauc"]["value"]
    assert gap == pytest.approx(
        found["models"]["hllm-2"]["uauc"]["value"] - found["models"]["popular"]["uauc"]["value"]
    )


def test_an_items_share_of_likes_is_of_training_events_alone(prepared: Prepared):
    shown, liked = np.zeros(25), np.zeros(25)
    for user in range(prepared.users):
        for event in range(prepared.user_offsets[user], prepared.train_ends[user]):
            label = prepared.event_labels[event]
            if label >= 0:
                shown[prepared.event_items[event]] += 1
                liked[prepared.event_items[event]] += label
    share = liked.sum() / shown.sum()
    np.testing.assert_allclose(item_rates(prepared), (liked + PRIOR_EVENTS * share) / (shown + PRIOR_EVENTS))


def test_a_first_event_of_the_test_period_is_no_training_event(tmp_path: Path):
    """Of a user who came late nothing is held out before there is a history, and nothing may be learned."""
    found = prepare(tmp_path, [[0, 1, 2, 3], [4, 1]], items=5, test=1, valid=1)
    assert found.train_ends.tolist() == [2, 4]
    users = found.user_table()
    late = users.set_column(users.column_names.index("train_events"), "train_events", [[2, 0]])
    parquet.write_table(late, tmp_path / "users.parquet")
    ends = np.array([2, 5])  # as a split by time has it: the late user's first event begins the history
    labels = np.ones(6, dtype=np.int8)
    labels[4] = 0
    late_too = dataclasses.replace(found, train_ends=ends, event_labels=labels)
    assert item_rates(late_too).tolist() == [1.0] * 5


def test_other_models_are_judged_by_the_score_that_they_rank_with(prepared: Prepared, judged: HeldOut):
    rng = np.random.default_rng(2)
    users, items = unit(rng, len(judged), 8), unit(rng, 25, 8)
    np.testing.assert_allclose(
        cosines(users, items, judged), (users * items[judged.targets_R]).sum(1), atol=1e-6
    )
    assert (
        untrained_scores(SETTINGS, prepared, judged)["popular"].tolist()
        == training_counts(prepared)[judged.targets_R].tolist()
    )


def test_an_earlier_version_is_measured_on_the_same_events(
    tmp_path: Path, prepared: Prepared, judged: HeldOut
):
    rng = np.random.default_rng(3)
    scores = {"hllm-2": rng.random(len(judged)), "popular": rng.random(len(judged))}
    write_scores(tmp_path / "labelled.parquet", judged, scores)
    mine = read_scores(tmp_path / "labelled.parquet", "hllm-2", judged)
    np.testing.assert_array_equal(mine, scores["hllm-2"])
    found = measure_champion(SETTINGS, prepared, judged, scores["popular"], mine)
    expected = measure_labelled(SETTINGS, prepared, judged, scores, "hllm-2")
    assert found["figures"] == expected["models"]["popular"]
    assert found["difference"] == expected["differences"]["popular"]
    with pytest.raises(DataError, match="belong to other held-out events"):
        read_scores(tmp_path / "labelled.parquet", "hllm-2", judged.take(np.arange(5)))


def test_what_an_earlier_version_does_not_know_has_the_mean_of_the_others(
    prepared: Prepared, judged: HeldOut
):
    """Item 24 came after it."""
    rng = np.random.default_rng(4)
    package = SmallPackage([f"i{item}" for item in range(24)], unit(rng, 24, 8))
    scores = score_package(prepared, package, SETTINGS, judged)
    new = judged.targets_R == 24
    assert new.any()
    assert len(set(scores[new])) == 1
    np.testing.assert_allclose(scores[new][0], scores[~new].mean())
    row = int(np.flatnonzero(~new)[0])
    history = prepared.event_items[judged.starts_R[row] : judged.positions_R[row]]
    vector = package.item_vectors[[item for item in history if item < 24]].mean(axis=0)
    assert scores[row] == pytest.approx(float(vector @ package.item_vectors[judged.targets_R[row]]), abs=1e-6)


def test_users_who_like_everything_or_nothing_have_no_auc_of_their_own():
    labels, users = np.array([1, 1, 0, 1, 0, 0]), np.array([5, 5, 7, 7, 9, 9])
    assert one_class_users(labels, users) == 2


def test_without_any_labelled_event_there_are_counts_and_no_figures(prepared: Prepared, judged: HeldOut):
    nobody = judged.take(np.array([], np.int64))
    found = measure_labelled(SETTINGS, prepared, nobody, {"hllm-2": np.array([])}, "hllm-2")
    assert (found["rows"], found["users"], found["models"]) == (0, 0, {"hllm-2": {}})
