"""The step `evaluate`: its files, its numbers in the manifest, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as parquet
import pytest

from hllm.data.prepared import Prepared
from hllm.errors import DataError
from hllm.evaluation import evaluate as module
from hllm.evaluation.metrics import evaluate_ranks
from hllm.models.family import untrained
from hllm.pipeline import steps
from hllm.settings import Settings
from hllm.work.artifacts import Store, file_digests
from hllm.work.step import Context
from tests.evaluation.world import prepare, random_histories, unit

LABELS = ("hllm-1", "hllm-2", "sasrec-1")


def context(tmp_path, histories, family="hllm", output="output"):
    prepare(tmp_path / "prepare", histories, items=30)
    settings = Settings.model_validate(
        {"model": {"family": family}, "evaluation": {"bootstrap": 50, "cutoffs": [5, 10], "example_users": 3}}
    )
    inputs = {"prepare": tmp_path / "prepare"}
    inputs |= {f"train-{label}": tmp_path / label for label in LABELS}
    inputs |= {"embed-hllm-1": tmp_path / "e1", "embed-sasrec-1": tmp_path / "e2"}
    (tmp_path / output).mkdir(exist_ok=True)
    step = steps(settings)["evaluate"]
    return Context(settings, step, "key", inputs, tmp_path / output, Store(str(tmp_path)))


@pytest.fixture
def histories():
    return random_histories(np.random.default_rng(6), users=40, items=30)


@pytest.fixture
def vectors(monkeypatch):
    """Trained models are tested where they live; here each label has its own fixed vectors."""

    def fixed(context, label, prepared, held_out):
        rng = np.random.default_rng(LABELS.index(label))
        return unit(rng, len(held_out), 8), unit(rng, prepared.items, 8)

    monkeypatch.setattr(module, "held_out_vectors", fixed)


def test_its_files_hold_what_they_promise(tmp_path, histories, vectors):
    running = context(tmp_path, histories)
    module.evaluate(running)
    metrics = json.loads((running.output / "metrics.json").read_text())
    assert set(metrics["models"]) == {*LABELS, *(each.name for each in untrained())}
    models = len(metrics["models"])
    assert (metrics["candidate"], metrics["headline"], metrics["rows"], metrics["catalogue"]) == (
        "hllm-2",
        "filtered",
        40,
        30,
    )
    table = parquet.read_table(running.output / "ranks.parquet")
    assert table.num_rows == models * 40
    for label, model in metrics["models"].items():
        rows = table.filter(np.array(table["model"].to_pylist()) == label)
        for mode in ("filtered", "unfiltered"):
            ranks, users = rows[f"rank_{mode}"].to_numpy(), rows["user_index"].to_numpy()
            again = evaluate_ranks(ranks, users, (5, 10), samples=50, confidence=0.95, seed=17)
            assert model["overall"][mode] == again
        assert sum(model["segments"][f"item:{name}"]["rows"] for name in ("cold", "long_tail", "other")) == 40
    assert running.rows == {"held_out_events": 40, "items": 30, "models": models}
    assert running.facts["candidate"] == "hllm-2"
    assert running.facts["ndcg@10"] == pytest.approx(
        metrics["models"]["hllm-2"]["overall"]["filtered"]["ndcg@10"]["value"], abs=1e-6
    )


def test_examples_are_the_events_they_claim_to_be(tmp_path, histories, vectors):
    running = context(tmp_path, histories)
    module.evaluate(running)
    prepared = Prepared.open(running.inputs["prepare"])
    shown = json.loads((running.output / "examples.json").read_text())
    assert len({example["user_id"] for example in shown}) == 3
    for example in shown:
        history = histories[int(example["user_id"][1:])]
        assert [item["item_id"] for item in example["history"]] == [f"i{item}" for item in history[:-1][-5:]]
        assert example["chosen"] == {"item_id": f"i{history[-1]}", "title": f"Item {history[-1]}"}
        recommended = [item["item_id"] for item in example["recommended"]]
        assert len(set(recommended)) == 5
        had = {f"i{item}" for item in history[:-1]} - {example["chosen"]["item_id"]}
        assert not had & set(recommended)
        place = example["rank"]
        assert (
            recommended[place - 1] == example["chosen"]["item_id"]
            if place <= 5
            else example["chosen"]["item_id"] not in recommended
        )
    assert prepared.users == 40


def test_a_second_run_over_a_half_written_output_gives_the_same_files(tmp_path, histories, vectors):
    first, second = context(tmp_path, histories), context(tmp_path, histories, output="again")
    module.evaluate(first)
    (second.output / "metrics.json").write_text('{"cand')
    (second.output / "ranks.parquet").write_bytes(b"PAR1")
    module.evaluate(second)
    assert file_digests(first.output) == file_digests(second.output)


def test_the_registered_family_is_the_candidate(tmp_path, histories, vectors):
    running = context(tmp_path, histories, family="sasrec")
    module.evaluate(running)
    assert json.loads((running.output / "metrics.json").read_text())["candidate"] == "sasrec-1"
    assert "model.family" in running.step.key_settings


def test_nothing_held_out_is_said_and_not_averaged(tmp_path, vectors):
    running = context(tmp_path, [[3], [4]])
    with pytest.raises(DataError, match="no held-out test events"):
        module.evaluate(running)
