"""A model of an earlier version in today's catalogue."""

from __future__ import annotations

import numpy as np
import pytest

from hllm.evaluation.evaluate import evaluate_package
from hllm.evaluation.measure import measure
from hllm.evaluation.rank_table import read_ranks, write_ranks
from hllm.models.common.ranking import HeldOut, rank_by_popularity, rank_by_vectors, training_counts
from hllm.settings import Settings
from tests.evaluation.world import SmallPackage, prepare, random_histories, unit

SETTINGS = Settings.model_validate({"evaluation": {"bootstrap": 50, "cutoffs": [5, 10]}})


@pytest.fixture
def prepared(tmp_path):
    rng = np.random.default_rng(11)
    return prepare(tmp_path / "prepare", random_histories(rng, users=60, items=30), items=30, test=2)


def test_items_are_matched_by_id_whatever_their_order(prepared):
    vectors = unit(np.random.default_rng(0), 30, 8)
    order = np.random.default_rng(1).permutation(30)
    same = SmallPackage([f"i{item}" for item in range(30)], vectors)
    shuffled = SmallPackage([f"i{item}" for item in order], vectors[order])
    held_out = HeldOut.of(prepared, "test")
    _, expected = evaluate_package(prepared, same, SETTINGS)
    _, found = evaluate_package(prepared, shuffled, SETTINGS)
    assert found.equals(expected)
    users = np.stack(
        [
            vectors[held_out.event_items[start:end]].mean(axis=0)
            for start, end in zip(held_out.starts_R, held_out.positions_R, strict=True)
        ]
    )
    ranks = rank_by_vectors(users, vectors, held_out)
    assert found["rank_filtered"].to_pylist() == ranks.filtered_R.tolist()
    candidates = Settings.model_validate({**SETTINGS.model_dump(), "embed": {"max_history": 1}})
    assert evaluate_package(prepared, same, candidates)[1].equals(expected)  # it reads as far as ever


def test_items_that_the_champion_never_saw_rank_last(prepared):
    vectors = unit(np.random.default_rng(0), 20, 8)
    old = SmallPackage([f"i{item}" for item in range(20)], vectors)
    entry, table = evaluate_package(prepared, old, SETTINGS)
    rows = table.to_pylist()
    assert {row["rank_unfiltered"] for row in rows if row["item_index"] >= 20} == {30}
    held_out = HeldOut.of(prepared, "test")
    starts = dict(zip(held_out.positions_R.tolist(), held_out.starts_R.tolist(), strict=True))
    for row in rows:
        had = prepared.event_items[starts[row["position"]] : row["position"]]
        if row["item_index"] < 20 and (had < 20).any():
            assert row["rank_unfiltered"] <= 20
    assert entry["overall"]["filtered"]["ndcg@10"]["value"] > 0


def test_a_champion_of_another_catalogue_altogether_ranks_everything_last(prepared):
    stranger = SmallPackage(["other"], unit(np.random.default_rng(0), 1, 8))
    entry, table = evaluate_package(prepared, stranger, SETTINGS)
    assert set(table["rank_filtered"].to_pylist()) == {30}
    assert entry["overall"]["filtered"]["recall@10"]["value"] == 0


def test_the_candidate_is_compared_with_the_champion_on_the_same_events(prepared, tmp_path):
    held_out = HeldOut.of(prepared, "test")
    rng = np.random.default_rng(2)
    ranks = {
        "popular": rank_by_popularity(training_counts(prepared), held_out),
        "hllm-2": rank_by_vectors(unit(rng, len(held_out), 8), unit(rng, 30, 8), held_out),
    }
    write_ranks(tmp_path / "ranks.parquet", held_out, ranks)
    again = read_ranks(tmp_path / "ranks.parquet", "hllm-2", held_out)
    assert again.filtered_R.tolist() == ranks["hllm-2"].filtered_R.tolist()
    package = SmallPackage([f"i{item}" for item in range(30)], unit(rng, 30, 8))
    entry, _ = evaluate_package(prepared, package, SETTINGS, tmp_path)
    mine = measure(SETTINGS, prepared, held_out, ranks, "hllm-2")["models"]["hllm-2"]
    gap = entry["comparison"]["filtered"]["ndcg@10"]["difference"]["value"]
    values = [model["overall"]["filtered"]["ndcg@10"]["value"] for model in (mine, entry)]
    assert gap == pytest.approx(values[0] - values[1])
