from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.errors import DataError
from hllm.serving.index import ApproximateIndex, ExactIndex
from tests.evaluation.world import unit


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), items=st.integers(1, 40), k=st.integers(1, 50), without=st.integers(0, 40))
def test_the_exact_index_finds_what_sorting_everything_finds(seed, items, k, without):
    rng = np.random.default_rng(seed)
    vectors = np.round(unit(rng, items, 4), 1)  # with ties
    left_out = rng.permutation(items)[:without]
    found, scores = ExactIndex(vectors).search(unit(rng, 3, 4), k, [left_out] * 3)
    rng = np.random.default_rng(seed)
    queries = (unit(rng, items, 4), rng.permutation(items), unit(rng, 3, 4))[2]
    for query, of_query, of_scores in zip(queries, found, scores, strict=True):
        every = vectors @ query
        best = [item for item in np.lexsort((np.arange(items), -every)) if item not in left_out][:k]
        kept = of_query[of_query >= 0]
        assert len(kept) == len(best)
        assert of_scores[: len(best)] == pytest.approx(every[best], abs=1e-6)
        assert np.isneginf(of_scores[len(best) :]).all()


def test_equal_scores_come_in_catalogue_order():
    found, _ = ExactIndex(np.ones((9, 4), np.float32) / 2).search(np.ones((1, 4), np.float32), 3, [[0, 2]])
    assert found.tolist() == [[1, 3, 4]]


def test_the_approximate_index_finds_nearly_the_same_and_leaves_out_what_it_must(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 2000, 16), unit(rng, 50, 16)
    exact, exact_scores = ExactIndex(vectors).search(queries, 10)
    built = ApproximateIndex.build(vectors)
    built.save(tmp_path / "index")
    index = ApproximateIndex.open(tmp_path / "index")
    found, scores = index.search(queries, 10)
    hits = [len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]
    assert np.mean(hits) > 9.5
    same = exact[:, 0] == found[:, 0]
    assert scores[same, 0] == pytest.approx(exact_scores[same, 0], abs=1e-5)
    without, _ = index.search(queries, 10, list(exact))
    assert all(not set(a) & set(b) for a, b in zip(exact, without, strict=True))
    assert (without >= 0).all()


def test_more_results_than_items_are_not_invented():
    vectors = unit(np.random.default_rng(1), 5, 8)
    for index in (ExactIndex(vectors), ApproximateIndex.build(vectors)):
        items, scores = index.search(vectors[:1], 10, [np.array([0, 3])])
        assert sorted(items[0][items[0] >= 0]) == [1, 2, 4]
        assert np.isneginf(scores[0][items[0] < 0]).all()


def test_a_file_that_holds_no_index_says_so(tmp_path):
    (tmp_path / "index").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no index"):
        ApproximateIndex.open(tmp_path / "index")
