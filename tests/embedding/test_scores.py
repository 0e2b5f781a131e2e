"""A model that judges, from a labelled log to what is published and deployed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from hllm.data.prepared import Prepared
from hllm.embedding import scores as module
from hllm.embedding.histories import Histories
from hllm.embedding.items import ItemVectors
from hllm.embedding.package import Package
from hllm.embedding.scores import held_out_scores, scores_of_candidates
from hllm.errors import ConfigError, DataError
from hllm.evaluation.evaluate import evaluate_package
from hllm.features.publish import publish
from hllm.features.verify import verify
from hllm.models.family import untrained
from hllm.models.load import load_user_model
from hllm.pipeline import steps
from hllm.registry.promote import promote
from hllm.registry.register import register
from hllm.registry.versions import registered_version, serving_version
from hllm.settings import Settings
from tests.conftest import Trained
from tests.features.world import online
from tests.world import TinySource, run_steps, tiny_settings, write_labelled_source


@dataclass(frozen=True)
class Judging:
    objective: str
    settings: Settings
    outputs: dict[str, Path]

    @property
    def package(self) -> Package:
        return Package.open(self.outputs["embed-hllm-3"] / "package")

    @property
    def prepared(self) -> Prepared:
        return Prepared.open(self.outputs["prepare"])

    @property
    def items(self) -> np.ndarray:
        return ItemVectors.open(self.outputs["embed-hllm-1"]).matrix()


@pytest.fixture(scope="module", params=["early_fusion", "late_fusion"])
def judging(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judging:
    folder = tmp_path_factory.mktemp(request.param)
    sets = {
        "data.columns.label": "label",
        "hllm.objective": request.param,
        "hllm.user_features.time": "day",
        "hllm.user_features.item_id": True,
        "embed.max_history": 12,
        "hllm.stage2.evaluate_every": 2,
        "model.baselines": ["sasrec"],
    }
    settings = tiny_settings(folder, write_labelled_source(folder / "source"), **sets)
    return Judging(request.param, settings, {name: run_steps(settings, name) for name in steps(settings)})


def held_out(judging: Judging) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, positions = judging.prepared.held_out("test")
    return users, positions, np.asarray(judging.prepared.event_times)[positions]


def asked_of_package(judging: Judging) -> tuple[list[list[str]], list[list[int]], list[int], list[list[str]]]:
    """The held-out events as somebody else would ask about them: ids and times before, the item itself."""
    prepared, ids = judging.prepared, judging.package.item_ids
    users, positions, asked = held_out(judging)
    spans = [slice(prepared.user_offsets[user], at) for user, at in zip(users, positions, strict=True)]
    return (
        [[ids[item] for item in prepared.event_items[span]] for span in spans],
        [prepared.event_times[span].tolist() for span in spans],
        asked.tolist(),
        [[ids[item]] for item in prepared.event_items[positions]],
    )


def test_the_deployed_model_gives_the_probabilities_that_were_evaluated(judging: Judging):
    model = load_user_model(judging.outputs["train-hllm-2"])
    users, positions, asked = held_out(judging)
    done: list[int] = []
    expected = held_out_scores(
        model, judging.items, judging.prepared, users, positions, asked, 12, 7, done.append
    )
    assert len(done) > 1
    assert sum(done) == len(users)  # what the progress line counts
    histories, times, moments, candidates = asked_of_package(judging)
    found = np.concatenate(judging.package.scores(histories, candidates, times, moments))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ((expected > 0) & (expected < 1)).all()
    assert expected.std() > 1e-5


def test_many_candidates_of_many_histories_are_each_of_them_alone(
    judging: Judging, monkeypatch: pytest.MonkeyPatch
):
    model, prepared = load_user_model(judging.outputs["train-hllm-2"]), judging.prepared
    # the last three rows are one history, asked about at three times
    starts, lengths = np.array([0, 5, 31, 20, 20, 20]), np.array([3, 1, 3, 9, 2, 9])
    counts, latest = np.array([2, 0, 25, 11, 4, 5]), int(prepared.event_times.max())
    asked = latest + 86_400 * np.arange(6)
    candidates = np.random.default_rng(0).integers(0, prepared.items, counts.sum())
    histories = Histories(prepared.event_items, prepared.event_times, starts, lengths, asked)

    def scores(batch: int) -> np.ndarray:
        return scores_of_candidates(model, judging.items, histories, candidates, counts, batch)

    together = scores(256)
    monkeypatch.setattr(module, "CANDIDATES_AT_ONCE", 4)  # the third row in seven portions
    np.testing.assert_allclose(scores(3), together, atol=1e-6)
    rows = np.repeat(np.arange(6), counts)
    for place in (0, 1, 2, 17, 26, 37, 38, 41, 42, 46):
        one, shown = histories.take(rows[[place]]), candidates[place : place + 1]
        alone = scores_of_candidates(model, judging.items, one, shown, np.array([1]), 1)
        np.testing.assert_allclose(alone, together[place : place + 1], atol=1e-6)


def test_who_and_what_is_unknown_has_no_probability(judging: Judging):
    package = judging.package
    known = package.item_ids[:4]
    found = package.scores([known, [], ["gone"]], [["gone", known[0], "new", known[1]], known, known])
    assert np.isnan(found[0]).tolist() == [True, False, True, False]
    assert np.isnan(found[1]).all()
    assert np.isnan(found[2]).all()
    (alone,) = package.scores([known], [[known[1]]])
    np.testing.assert_allclose(alone, found[0][3:], atol=1e-6)
    assert [len(scores) for scores in package.scores([known, known], [[], ["gone"]])] == [0, 1]


def test_what_is_published_is_the_user_vector_of_late_fusion_and_the_next_interest_of_early(judging: Judging):
    prepared, package = judging.prepared, judging.package
    ids, offsets = package.item_ids, prepared.user_offsets
    spans = [slice(offsets[user], offsets[user + 1]) for user in range(prepared.users)]
    asked = (
        [[ids[item] for item in prepared.event_items[span]] for span in spans],
        [prepared.event_times[span].tolist() for span in spans],
        [int(prepared.event_times.max())] * len(spans),
    )
    (path,) = judging.outputs["embed-hllm-3"].glob("users-*.parquet")
    exported = np.stack(parquet.read_table(path)["vector"].to_numpy())
    np.testing.assert_allclose(package.user_vectors(*asked), exported, atol=1e-5)
    apart = np.abs(package.interest_vectors(*asked) - exported).max()
    manifest = json.loads((judging.outputs["embed-hllm-3"] / "manifest.json").read_text())
    assert manifest["facts"]["objective"] == judging.objective
    if judging.objective == "early_fusion":
        assert apart < 1e-5
    else:
        assert apart > 0.01
        # Whoever reads the two published vectors can judge with the head alone.
        user = load_user_model(package.folder)
        candidates = np.arange(len(exported)) % prepared.items
        with torch.no_grad():
            vectors = (torch.from_numpy(part) for part in (exported, judging.items[candidates]))
            chances = user.late_fusion(*vectors).sigmoid().numpy()
        histories, times, moments = asked
        shown = [[ids[item]] for item in candidates]
        found = np.concatenate(package.scores(histories, shown, times, moments))
        np.testing.assert_allclose(found, chances, atol=1e-5)


def test_recommendations_follow_the_next_interest(judging: Judging):
    package, history = judging.package, judging.package.item_ids[10:14]
    (found,) = package.recommend([history], k=5, filter_history=False)
    scores = package.item_vectors @ package.interest_vectors([history])[0]
    assert [item for item, _ in found] == [
        package.item_ids[row] for row in np.argsort(-scores, kind="stable")[:5]
    ]


def test_training_looked_at_the_auc_of_the_validation_events(judging: Judging):
    facts = json.loads((judging.outputs["train-hllm-2"] / "manifest.json").read_text())["facts"]
    assert 0 <= facts["best_valid_auc"] <= 1
    curves = (judging.outputs["train-hllm-2"] / "curves.jsonl").read_text()
    assert "valid_auc" in curves


def test_the_evaluation_counts_and_compares(judging: Judging):
    metrics = json.loads((judging.outputs["evaluate"] / "metrics.json").read_text())
    found, prepared = metrics["labelled"], judging.prepared
    _, positions = prepared.held_out("test")
    assert found["rows"] == len(positions)
    assert found["liked"] == int(np.asarray(prepared.event_labels)[positions].sum())
    # One held-out event for each user: nobody has both classes.
    assert found["users"] == found["users_with_one_class"] == len(positions)
    known = {each.name for each in untrained()}
    assert set(found["models"]) == {"item-rate", "hllm-1", "hllm-2", "sasrec-1", *known}
    assert set(found["differences"]) == set(found["models"]) - {"hllm-2"}
    assert set(found["models"]["hllm-2"]) == {"auc"}
    # The cheap baseline knows nothing here (what is liked depends on the user), whatever the model learned.
    assert found["models"]["item-rate"]["auc"]["value"] < 0.75


def test_as_a_champion_it_is_level_with_itself(judging: Judging):
    entry, _ = evaluate_package(
        judging.prepared, judging.package, judging.settings, judging.outputs["evaluate"]
    )
    mine = json.loads((judging.outputs["evaluate"] / "metrics.json").read_text())["labelled"]
    figures, difference = entry["labelled"]["figures"]["auc"], entry["labelled"]["difference"]["auc"]
    assert figures["value"] == pytest.approx(mine["models"]["hllm-2"]["auc"]["value"], abs=1e-3)
    assert difference["value"] == pytest.approx(0, abs=1e-3)


def test_it_is_registered_by_its_auc_published_and_promoted(
    judging: Judging, monkeypatch: pytest.MonkeyPatch
):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):  # MLflow writes them and leaves them
        monkeypatch.setenv(name, judging.settings.mlflow.tracking_uri)
    feast = judging.settings.feast.model_copy(
        update={"repo": str(Path(__file__).parents[2] / "feature_repo")}
    )
    gate = judging.settings.gate.model_copy(update={"metric": "auc"})
    settings = judging.settings.model_copy(update={"feast": feast, "gate": gate})
    version = register(settings).version
    found = registered_version(settings, str(version))
    assert found.tags["objective"] == judging.objective
    assert found.tags["gate"] == "passed"
    publish(settings, str(version))
    verify(settings, str(version))
    promote(settings, str(version), by="a tester")
    serving = serving_version(settings)
    assert serving is not None
    assert serving.version == version
    export = parquet.read_table(next(judging.outputs["embed-hllm-3"].glob("users-*.parquet"))).slice(0, 1)
    user, vector = export["user_id"][0].as_py(), export["vector"][0].as_py()
    read = online(settings, version, [(user, "item20")])
    assert read["user_vector"][0] == pytest.approx(vector)
    assert read["affinity"][0] is not None


def test_a_generative_model_has_no_probabilities_and_says_so(trained: Trained):
    package = Package.open(trained["embed-hllm-3"] / "package")
    with pytest.raises(ConfigError, match="was trained generatively"):
        package.scores([package.item_ids[:2]], [package.item_ids[:2]])


def test_a_log_without_labels_cannot_train_it(tmp_path: Path, tiny_source: TinySource):
    settings = tiny_settings(tmp_path, tiny_source, **{"hllm.objective": "late_fusion"})
    with pytest.raises(DataError, match="0 have label 0, 0 have label 1"):
        run_steps(settings, "ingest", "validate", "prepare", "train-hllm-1")
