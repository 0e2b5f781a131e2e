"""The deployable package as an MLflow model: what its signature promises is what it does."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from hllm.embedding.package import Package, write_package
from hllm.models.load import new_model, save_model
from hllm.serving.mlflow_model import log_package, signature
from hllm.settings import Settings
from hllm.work import mlflow as server
from tests.training.world import prepared_of


def package_of(folder: Path, objective: str, time: str = "") -> Path:
    model = {"objective": objective, "item_llm": {"width": 16}, "user_llm": {"width": 16}}
    model |= {"user_features": {"time": time, "time_width": 4}}
    prepared = prepared_of(folder, [4, 6], items=9)
    recommender = new_model(Settings.model_validate({"hllm": model}), "hllm", prepared).eval()
    if time:  # as if it had learned something of it
        torch.nn.init.normal_(recommender.user.features.time.outer.weight)
    (folder / "train").mkdir()
    save_model(recommender, "hllm", folder / "train")
    with torch.no_grad():
        vectors = recommender.items(np.arange(9)).numpy()
    ids = [f"film {number}" for number in range(9)]
    write_package(folder / "package", folder / "train", vectors, pa.table({"item_id": ids, "title": ids}), 5)
    return folder / "package"


@pytest.mark.parametrize("objective", ["generative", "early_fusion", "late_fusion"])
def test_the_signature_says_whether_candidates_can_be_judged(tmp_path: Path, objective: str) -> None:
    columns = [column.name for column in signature(package_of(tmp_path, objective)).inputs]
    assert columns == ["history"] if objective == "generative" else ["history", "candidates"]


def test_candidates_come_back_in_their_order_with_probabilities(settings: Settings, tmp_path: Path) -> None:
    folder = package_of(tmp_path, "late_fusion")
    client = server.client(settings)
    experiment = client.create_experiment("shop", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    model_id = log_package(client, settings, run, folder)
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    histories = [["film 1", "film 2"], ["film 8"]]
    candidates = [["film 5", "never seen", "film 1"], ["film 0"]]
    found = model.predict(pd.DataFrame({"history": histories, "candidates": candidates}))
    assert found["item_ids"].tolist() == candidates
    expected = Package.open(folder).scores(histories, candidates)
    for scores, wanted in zip(found["scores"], expected, strict=True):
        np.testing.assert_allclose(scores, wanted, atol=1e-6)
    assert np.isnan(found["scores"][0][1])
    without = model.predict(pd.DataFrame({"history": histories}), params={"k": 3})
    assert [len(ids) for ids in without["item_ids"]] == [3, 3]


def test_a_model_that_reads_times_is_told_them(settings: Settings, tmp_path: Path) -> None:
    folder = package_of(tmp_path, "generative", time="hour")
    assert [column.name for column in signature(folder).inputs] == ["history", "times", "asked_at"]
    client = server.client(settings)
    experiment = client.create_experiment("shop", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    model = mlflow.pyfunc.load_model(f"models:/{log_package(client, settings, run, folder)}")
    histories, times, asked_at = [["film 1", "film 2"]], [[1_500_000_000, 1_600_000_000]], [1_600_000_500]
    found = model.predict(pd.DataFrame({"history": histories, "times": times, "asked_at": asked_at}))
    expected = Package.open(folder).recommend(histories, 10, times=times, asked_at=asked_at)
    assert found["item_ids"][0] == [item for item, _ in expected[0]]
    np.testing.assert_allclose(found["scores"][0], [score for _, score in expected[0]], atol=1e-6)
    without = model.predict(pd.DataFrame({"history": histories}))
    assert np.abs(np.sort(found["scores"][0]) - np.sort(without["scores"][0])).max() > 1e-5
