from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from hllm.data.prepared import Prepared
from hllm.errors import ConfigError, DataError
from hllm.evaluation.auc import evaluate_scores
from hllm.ranker.features import read_offline, read_online
from hllm.ranker.impressions import Impressions, Periods
from hllm.ranker.network import Trained
from hllm.ranker.store import own_store
from tests.ranker.world import DAY, PERIODS, ranking_settings, write_labelled_source
from tests.world import run_steps

SCRIPT = Path(__file__).parents[2] / "feature_repo" / "train_ranker.py"
STEPS = ("ingest", "validate", "prepare", "train-hllm-1", "embed-hllm-1", "train-hllm-2", "rank")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Settings, and the output of the step."""
    folder = tmp_path_factory.mktemp("ranked")
    settings = ranking_settings(folder, write_labelled_source(folder / "source"))
    return settings, run_steps(settings, *STEPS), run_steps(settings, "prepare")


@pytest.fixture(scope="module")
def store(ranked):
    from hllm.features.store import open_store

    settings, output, _ = ranked
    return open_store(own_store(settings, output / "feast"))


def test_the_result_says_what_was_measured(ranked):
    settings, output, _ = ranked
    results = json.loads((output / "ranking.json").read_text())
    assert list(results["models"]) == ["base", "vectors", "fusion"]
    scores = parquet.read_table(output / "scores.parquet")
    assert results["rows"]["test"] == len(scores)
    assert scores["timestamp"].to_numpy().min() >= Periods.of(settings).test_from
    for variant, model in results["models"].items():
        assert len(model["seeds"]["auc"]) == 2
        assert model["parts"]["overall"]["auc"]["value"] == pytest.approx(np.mean(model["seeds"]["auc"]))
        found = evaluate_scores(
            scores["label"].to_numpy(), scores[variant].to_numpy(), scores["user_id"].to_numpy(), 10, 0.9, 1
        )
        assert found["auc"]["value"] > 0.5  # everybody likes the popular items: the counts say so
    assert [(gain["of"], gain["over"]) for gain in results["gains"]] == [
        ("vectors", "base"),
        ("fusion", "vectors"),
        ("fusion", "base"),
    ]
    text = (output / "ranking.md").read_text()
    for words in ("(c) + LEARN's fusion", "gain of (b) over (a)", "cold users", "long tail items"):
        assert words in text


def test_a_training_row_sees_only_what_could_be_read_before_it(ranked, store):
    """Beside the log: the counts, and the history behind the vector, end before the row's day."""
    settings, _, prepare = ranked
    prepared = Prepared.open(prepare)
    periods, offsets = Periods.of(settings), np.asarray(prepared.user_offsets)
    found = Impressions.of(prepared, periods)
    rows = np.linspace(0, len(found) - 1, 60).astype(int)
    users = prepared.user_table(["user_id"])["user_id"].to_pylist()
    items = prepared.item_table(["item_id"])["item_id"].to_pylist()
    names = np.array([users[user] for user in found.users_R[rows]], object)
    of_items = np.array([items[item] for item in found.items_R[rows]], object)
    read = read_offline(store, names, of_items, found.times_R[rows], 32)
    some = 0
    for row, at in enumerate(rows):
        user, item, midnight = found.users_R[at], found.items_R[at], found.times_R[at] // DAY * DAY
        mine = np.asarray(prepared.event_times)[offsets[user] : offsets[user + 1]]
        known = int((mine < midnight).sum())
        assert np.nan_to_num(read.counts_R6[row, 0]) == known
        assert read.with_user_vector[row] == (known > 0)
        of_item = np.asarray(prepared.event_times)[np.asarray(prepared.event_items) == item]
        assert read.counts_R6[row, 3] == (of_item < midnight).sum()
        some += known > 0
    assert some > 30


def test_what_is_served_is_what_was_trained(ranked, store):
    settings, output, _ = ranked
    trained = Trained.load(output / "ranker")
    now = int(Periods.of(settings).test_from + 100 * DAY)
    users, items = ["u1", "u2", "nobody"], ["item1", "item2", "item3"]
    online = read_online(store, users, items, now, 32)
    offline = read_offline(store, np.array(users, object), np.array(items, object), np.full(3, now), 32)
    assert np.array_equal(online.users_RD, offline.users_RD)
    assert online.with_user_vector.tolist() == [True, True, False]
    assert trained.scores(online) == pytest.approx(trained.scores(offline), abs=1e-9)
    assert len(set(trained.scores(online))) == 3


def test_the_script_to_copy_goes_from_the_store_to_a_ranked_request(ranked, tmp_path):
    _, output, _ = ranked
    done = subprocess.run([sys.executable, SCRIPT, output], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "of the test found a user vector" in lines[0]
    assert all(0.4 < float(line.split("AUC ")[1].split()[0]) < 1 for line in lines[1:3])
    assert len(lines) == 10  # ... a heading, the columns, five candidates
    likes = [float(line.split()[1]) for line in lines[5:]]
    assert likes == sorted(likes, reverse=True)
    assert 0 < likes[-1] < likes[0] < 1
    nowhere = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=300)
    assert nowhere.returncode == 2
    assert "is no output of `hllm rank`" in nowhere.stderr


def test_periods_out_of_order_and_other_splits_are_refused(tmp_path, tiny_settings):
    with pytest.raises(ConfigError, match="the days must follow one another"):
        Periods.of(tiny_settings(**{**PERIODS, "ranking.valid_from": "2020-09-01"}))
    with pytest.raises(ConfigError, match=r"ranking.valid_from: .* needs a day, got ''"):
        Periods.of(tiny_settings(**{**PERIODS, "ranking.valid_from": ""}))
    with pytest.raises(ConfigError, match=r'a ranker needs prepare.split = "temporal"'):
        Periods.of(tiny_settings(**{"ranking.test_from": "2020-10-08"}))


def test_a_log_without_labels_is_refused(ranked):
    settings, _, prepare = ranked
    prepared = Prepared.open(prepare)
    blind = Prepared(
        **{**vars(prepared), "event_labels": np.full_like(np.asarray(prepared.event_labels), -1)}
    )
    with pytest.raises(DataError, match="the train period has no labelled events of both kinds"):
        Impressions.of(blind, Periods.of(settings))
