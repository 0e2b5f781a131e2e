"""Neighbours that nobody trained: against plain loops, and against scikit-learn's own cosines."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from hllm.data.prepared import Prepared
from hllm.models.common.neighbours import (
    BACKWARD,
    DECAY,
    WINDOW,
    co_occurrence,
    knn_scorer,
    rank_by_scores,
    sum_scorer,
    text_scorer,
)
from hllm.models.common.ranking import HeldOut, training_counts
from hllm.models.family import untrained
from hllm.recommend import recommend_untrained
from hllm.settings import Settings


@pytest.fixture(scope="module")
def prepared(trained) -> Prepared:  # type: ignore[no-untyped-def]
    return Prepared.open(trained["prepare"])


def plain(prepared: Prepared) -> np.ndarray:
    """(I, I) co-occurrence by loops over users and pairs of their training events."""
    found = np.zeros((prepared.items, prepared.items))
    for start, end in zip(prepared.train_starts, prepared.train_ends, strict=True):
        events = np.asarray(prepared.event_items[start:end])
        for one in range(len(events)):
            for other in range(one + 1, min(one + WINDOW + 1, len(events))):
                found[events[one], events[other]] += 1 / (other - one)
                found[events[other], events[one]] += BACKWARD / (other - one)
    scale = 1 / np.sqrt(training_counts(prepared) + 1)
    return found * scale[:, None] * scale[None, :]


def test_neighbours_in_the_log_are_those_of_plain_loops_and_of_training_events_alone(prepared: Prepared):
    np.testing.assert_allclose(co_occurrence(prepared).toarray(), plain(prepared), rtol=1e-5)


def test_neighbours_by_text_are_scikit_learns_cosines(prepared: Prepared):
    texts = prepared.item_table(["text"])["text"].to_pylist()
    words = TfidfVectorizer(stop_words="english", sublinear_tf=True)  # so few texts: every word counts
    alike = cosine_similarity(words.fit_transform(texts))
    histories = [np.array([3, 5]), np.array([7])]
    expected = np.stack([DECAY * alike[3] + alike[5], alike[7]])
    np.testing.assert_allclose(text_scorer(prepared)(histories), expected, atol=1e-5)


def test_the_sum_is_of_both_over_their_largest(prepared: Prepared):
    histories = [np.asarray(prepared.event_items[prepared.user_offsets[9] : prepared.train_ends[9]])]
    parts = [scorer(prepared)(histories) for scorer in (knn_scorer, text_scorer)]
    expected = sum(part / part.max() for part in parts)
    np.testing.assert_allclose(sum_scorer(prepared)(histories), expected, rtol=1e-5)


def test_ranks_count_every_item_that_scores_as_high_and_leave_the_history_out(prepared: Prepared):
    held_out, scorer = HeldOut.of(prepared, "test"), sum_scorer(prepared)
    found = rank_by_scores(scorer, held_out)
    for row in range(len(held_out)):
        history = np.asarray(
            held_out.event_items[held_out.starts_R[row] : held_out.positions_R[row]], np.int64
        )
        target, scores = held_out.targets_R[row], scorer([history])[0]
        others = np.setdiff1d(np.arange(held_out.items), [target])
        new = np.setdiff1d(others, history)
        assert found.unfiltered_R[row] == 1 + (scores[others] >= scores[target]).sum()
        assert found.filtered_R[row] == 1 + (scores[new] >= scores[target]).sum()


def test_they_stand_in_every_evaluation():
    assert {"popular", "item_knn", "tfidf", "neighbours"} <= {each.name for each in untrained()}


def test_they_recommend_before_any_training(trained):  # type: ignore[no-untyped-def]
    settings: Settings = trained.settings
    shown = recommend_untrained(settings, "neighbours", None, ["item9", "item13"], 3)
    assert shown.startswith("Neighbours, nothing trained, after 2 events")
    assert len(shown.splitlines()) == 3 + 3
    assert "item9 " not in shown
