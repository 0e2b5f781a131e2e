"""Means and intervals over users and seeds, against figures worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hllm.comparison.figures import Judged, Ranked, figures, scores_of
from hllm.comparison.file import Entry, Metric
from hllm.comparison.loss import softmax_loss
from hllm.comparison.scaling import fit
from hllm.comparison.work import Pipeline
from hllm.data.prepared import Prepared
from hllm.evaluation.labelled import labelled_rows
from hllm.models.common.ranking import HeldOut
from hllm.pipeline import keys
from hllm.work.artifacts import Manifest
from tests.world import run_steps, tiny_settings, write_labelled_source

SEEDS = (1, 2)
METRICS = [Metric.of(name) for name in ("recall@10", "ndcg@10", "item:cold recall@10", "loss", "auc", "uauc")]


def ranked(users: int = 400) -> Ranked:
    """`good` finds every second item whatever the seed, `lucky` all with one seed and none with the other,
    `bad` every fourth."""
    place = np.arange(users)
    hit = lambda every: np.where(place % every == 0, 1, 99)  # noqa: E731
    ranks = {("good", seed): hit(2) for seed in SEEDS} | {("bad", seed): hit(4) for seed in SEEDS}
    ranks |= {("lucky", 1): np.ones(users, int), ("lucky", 2): np.full(users, 99)}
    losses = {(name, seed): np.full(users, 2.0 + seed) for name in ("good", "lucky") for seed in SEEDS}
    liked = place % 2
    scores = {("good", seed): liked * 1.0 for seed in SEEDS} | {("bad", seed): liked * 0.0 for seed in SEEDS}
    scores |= {("lucky", 1): liked * 1.0, ("lucky", 2): liked * -1.0}
    judged = Judged(labels_L=liked, users_L=place // 4, scores_L=scores)
    return Ranked(place, {"item:cold": place < 4}, ranks, losses, judged)


def measured(samples: int = 500):
    return figures(METRICS, ["good", "lucky", "bad"], SEEDS, "bad", ranked(), samples, 0.95, seed=3)


def test_a_figure_is_the_mean_over_events_and_seeds():
    found = measured().found
    assert found["good"]["recall@10"]["value"] == found["good"]["ndcg@10"]["value"] == 0.5
    assert found["lucky"]["recall@10"]["value"] == 0.5
    assert found["bad"]["recall@10"]["value"] == 0.25
    assert found["bad"]["item:cold recall@10"]["value"] == 0.25
    assert measured().events["item:cold recall@10"] == 4
    assert found["good"]["loss"]["value"] == 3.5
    assert "loss" not in found["bad"]  # it has none


def test_labelled_events_are_judged_with_the_same_seeds_and_users():
    found = measured()
    assert {name: figures["auc"]["value"] for name, figures in found.found.items()} == {
        "good": 1.0, "lucky": 0.5, "bad": 0.5
    }  # fmt: skip
    assert found.found["good"]["uauc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (found.found["lucky"]["uauc"]["low"], found.found["lucky"]["uauc"]["high"]) == (0.0, 1.0)
    assert found.differences["good"]["auc"]["value"] == 0.5
    assert found.events["auc"] == 400


def test_an_interval_holds_the_luck_of_the_seeds():
    found = measured().found
    good, lucky = found["good"]["recall@10"], found["lucky"]["recall@10"]
    assert good["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)  # binomial, 400 users
    assert good["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)
    assert (lucky["low"], lucky["high"]) == (0.0, 1.0)  # both draws may be the same seed


def test_differences_are_paired_by_users():
    found = measured()
    difference, ratio = found.differences["good"]["recall@10"], found.ratios["good"]["recall@10"]
    assert difference["value"] == 0.25
    # What is drawn of `bad` is drawn of `good` too: narrower than two independent intervals.
    spread = np.sqrt(0.25 * 0.75 / 400)
    assert difference["high"] - difference["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert ratio["value"] == 2.0
    assert 1.0 < ratio["low"] < 2.0 < ratio["high"]
    assert "bad" not in found.differences


def test_the_same_seed_gives_the_same_intervals():
    assert measured().found == measured().found


def test_the_held_out_loss_is_the_cross_entropy_over_what_the_user_does_not_have():
    rng = np.random.default_rng(0)
    items, users = (rng.normal(size=(count, 4)).astype(np.float32) for count in (6, 2))
    event_items = np.array([0, 1, 2, 3, 3, 4])  # the first user has 0, 1, 2 before 3; the second 3 before 4
    held_out = HeldOut(
        users_R=np.array([0, 1]),
        positions_R=np.array([3, 5]),
        starts_R=np.array([0, 4]),
        targets_R=np.array([3, 4]),
        event_items=event_items,
        event_times=np.arange(6),
        asked_R=np.array([3, 5]),
        items=6,
    )
    found = softmax_loss(users, items, 5.0, held_out)
    for row, candidates in enumerate(([3, 4, 5], [0, 1, 2, 4, 5])):
        logits = 5.0 * items[candidates].astype(np.float64) @ users[row].astype(np.float64)
        wanted = 5.0 * float(items[held_out.targets_R[row]] @ users[row])
        assert found[row] == pytest.approx(np.log(np.exp(logits).sum()) - wanted, rel=1e-5)


def test_a_power_law_is_found_again():
    places = np.array([0.1, 0.25, 0.5, 1.0])
    factor, exponent = fit(places, 3.0 * places**-0.17)
    assert (factor, exponent) == (pytest.approx(3.0), pytest.approx(-0.17))


def test_labelled_events_are_scored_as_they_were_evaluated(tmp_path: Path):
    sets = {"data.columns.label": "label", "hllm.objective": "early_fusion", "model.stages": 1}
    source = write_labelled_source(tmp_path / "source")
    settings = tiny_settings(tmp_path, source, **sets, **{"model.baselines": ["sasrec"]})
    prepared = Prepared.open(run_steps(settings, "ingest", "validate", "prepare"))
    trained = [f"{step}-{family}-1" for family in ("hllm", "sasrec") for step in ("train", "embed")]
    evaluated = run_steps(settings, *trained, "evaluate")
    held_out = HeldOut.of(prepared, "test")
    judged = held_out.take(labelled_rows(prepared, held_out))
    pipeline = Pipeline(Entry("fusion", "hllm-1", ()), settings.run.seed, settings, keys(settings))
    found = {label: scores_of(pipeline, label, prepared, judged) for label in ("hllm-1", "sasrec-1")}
    assert ((found["hllm-1"] > 0) & (found["hllm-1"] < 1)).all()
    (evaluated / "labelled.parquet").unlink()  # as a model that does not judge leaves it
    manifest = Manifest.read(evaluated)
    assert manifest
    files = {name: digest for name, digest in manifest.files.items() if name != "labelled.parquet"}
    dataclasses.replace(manifest, files=files).write(evaluated)
    again = scores_of(pipeline, "sasrec-1", prepared, judged)
    np.testing.assert_allclose(again, found["sasrec-1"], atol=1e-6)
