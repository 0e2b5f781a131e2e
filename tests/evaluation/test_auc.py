from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hllm.errors import DataError
from hllm.evaluation.auc import aucs, compare_scores, evaluate_scores

BOOT = {"samples": 300, "confidence": 0.95, "seed": 1}


def impressions(rng: np.random.Generator, rows: int = 600, users: int = 50, grid: int = 0):
    """Labels, scores that know something of them, users; with `grid`, scores have ties."""
    labels = rng.integers(0, 2, rows)
    scores = labels + rng.normal(size=rows) * 1.5
    return labels, np.round(scores * grid) / grid if grid else scores, rng.integers(0, users, rows)


def by_users(labels, scores, users):
    """UAUC and WUAUC through scikit-learn, user by user."""
    found = [
        (roc_auc_score(labels[mine], scores[mine]), mine.sum())
        for mine in (users == user for user in np.unique(users))
        if 0 < labels[mine].sum() < mine.sum()
    ]
    own, rows = np.array([auc for auc, _ in found]), np.array([count for _, count in found])
    return own.mean(), (own * rows).sum() / rows.sum()


@pytest.mark.parametrize("grid", [0, 2])
def test_all_three_are_what_scikit_learn_finds(grid):
    labels, scores, users = impressions(np.random.default_rng(3), grid=grid)
    found = evaluate_scores(labels, scores, users, **BOOT)
    uauc, wuauc = by_users(labels, scores, users)
    assert found["auc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["uauc"]["value"] == pytest.approx(uauc)
    assert found["wuauc"]["value"] == pytest.approx(wuauc)
    assert all(figure["low"] < figure["value"] < figure["high"] for figure in found.values())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=40
    )
)
def test_any_few_rows_agree_with_scikit_learn_or_have_no_figure(rows):
    labels, scores, users = (np.array(column) for column in zip(*rows, strict=True))
    found = aucs(labels, scores, users, samples=5, seed=0).values_3
    if 0 < labels.sum() < len(labels):
        assert found[0] == pytest.approx(roc_auc_score(labels, scores))
    else:
        assert np.isnan(found).all()
    mixed = [user for user in users if 0 < labels[users == user].sum() < (users == user).sum()]
    if mixed:
        assert found[1:] == pytest.approx(by_users(labels, scores, users))
    else:
        assert np.isnan(found[1:]).all()


def test_a_draw_of_users_is_the_auc_of_their_rows_together():
    labels, scores, users = impressions(np.random.default_rng(5), rows=200, users=20, grid=3)
    draws = aucs(labels, scores, users, samples=8, seed=4).draws_B3
    times = np.random.default_rng(4).multinomial(20, np.full(20, 1 / 20), size=8)
    for drawn, found in zip(times, draws, strict=True):
        copies = np.repeat(np.arange(200), drawn[users])
        assert found[0] == pytest.approx(roc_auc_score(labels[copies], scores[copies]))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(7), 0
    truth = 0.760249938906523  # P(N(1, 1) > N(0, 1))
    for repeat in range(150):
        labels = rng.integers(0, 2, 400)
        found = evaluate_scores(labels, labels + rng.normal(size=400), np.arange(400), 200, 0.95, repeat)
        covered += found["auc"]["low"] <= truth <= found["auc"]["high"]
    assert 0.90 <= covered / 150 <= 0.99


def test_a_paired_difference_is_narrower_than_two_separate_ones_and_turns_its_sign():
    rng = np.random.default_rng(0)
    labels, scores, users = impressions(rng)
    worse = scores + rng.normal(size=len(scores)) * 0.3
    found = compare_scores(labels, scores, worse, users, **BOOT)["auc"]
    back = compare_scores(labels, worse, scores, users, **BOOT)["auc"]
    alone = evaluate_scores(labels, scores, users, **BOOT)["auc"]
    assert found["value"] == pytest.approx(-back["value"])
    assert found["low"] == pytest.approx(-back["high"])
    assert found["high"] - found["low"] < (alone["high"] - alone["low"]) / 2


def test_order_of_rows_and_scale_of_scores_change_nothing():
    labels, scores, users = impressions(np.random.default_rng(2), grid=4)
    order = np.random.default_rng(1).permutation(len(labels))
    first = evaluate_scores(labels, scores, users, **BOOT)
    again = evaluate_scores(labels[order], 3 * scores[order] + 7, users[order], **BOOT)
    for name, figure in first.items():
        assert again[name] == pytest.approx(figure)


def test_what_is_no_score_and_no_label_is_refused():
    with pytest.raises(DataError, match=r"scores are not finite \(1 of 3\) \(e.g. 'row 1'\)"):
        evaluate_scores(np.array([0, 1, 1]), np.array([0.0, np.nan, 1.0]), np.arange(3), **BOOT)
    with pytest.raises(DataError, match="labels are not 0 or 1"):
        evaluate_scores(np.array([0, -1, 1]), np.zeros(3), np.arange(3), **BOOT)
    with pytest.raises(DataError, match="do not belong together"):
        evaluate_scores(np.array([0, 1]), np.zeros(3), np.arange(3), **BOOT)
    assert evaluate_scores(np.array([], int), np.array([]), np.array([]), **BOOT) == {}
