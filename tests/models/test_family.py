"""A stranger's family: one folder outside of the package and a few settings, no other file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hllm.errors import ConfigError
from hllm.models import family as module
from hllm.models.family import TrainedModel, families

ROOT = Path(__file__).resolve().parents[2]

SHORTEST_FAMILY = """
from hllm.models.family import Family
FAMILY = Family(name="shortest", title="Shortest text", code="hllm.models.shortest.model", mark="triangle")
"""
SHORTEST = """
import numpy as np
from hllm.models.common.neighbours import rank_by_scores

def scorer(settings, prepared):
    lengths_I = np.diff(prepared.token_offsets).astype(np.float32)
    return lambda histories: np.repeat(-lengths_I[None], len(histories), axis=0)

def ranks(settings, prepared, held_out):
    return rank_by_scores(scorer(settings, prepared), held_out)
"""
RUN = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from tests import world
from hllm.models.load import load_user_model
from hllm.pipeline import steps
from hllm.comparison.file import read
from wiring import form

folder = Path(sys.argv[3])
source = world.write_tiny_source(folder / "source")
stage = {"history_length": 8, "batch_size": 8, "negatives": 16, "steps": 4, "lr": 1e-3}
tiny = {"width": 32, "heads": 2, "layers": 1, "stage1": stage}
sets = {"model.family": "twin", "model.baselines": ["sasrec"], "twin": tiny, "gate.min_vs": {"shortest": 0.5}}
settings = world.tiny_settings(folder, source, **sets)
evaluated = world.run_steps(settings, *steps(settings))
metrics = json.loads((evaluated / "metrics.json").read_text())
from hllm.evaluation.gate import judge
from hllm.report.figures import models_in_order
print(json.dumps({
    "steps": list(steps(settings)),
    "models": list(metrics["models"]),
    "same": metrics["models"]["twin-1"]["overall"] == metrics["models"]["sasrec-1"]["overall"],
    "names": [model.name for model in models_in_order(metrics, None)],
    "reasons": [reason for reason in judge(settings, metrics, None).reasons],
    "form": [name for name in form.params(settings) if "twin" in name or "shortest" in name],
}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("stranger")
    mine = folder / "families"
    shutil.copytree(
        ROOT / "hllm" / "models" / "sasrec", mine / "twin", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in (mine / "twin").glob("*.py"):
        text = path.read_text().replace("models.sasrec", "models.twin").replace('"sasrec"', '"twin"')
        path.write_text(
            text.replace('title="SASRec"', 'title="Twin"').replace("renamed={", "renamed={} and {")
        )
    (mine / "shortest").mkdir()
    (mine / "shortest" / "__init__.py").touch()
    (mine / "shortest" / "family.py").write_text(SHORTEST_FAMILY)
    (mine / "shortest" / "model.py").write_text(SHORTEST)
    environment = {**os.environ, "HLLM_FAMILIES": str(mine), "AIRFLOW_HOME": str(folder / "airflow")}
    argv = [sys.executable, "-c", RUN, str(ROOT), str(ROOT / "dags"), str(folder)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict = json.loads(done.stdout.splitlines()[-1])  # type: ignore[type-arg]
    return found


def test_it_trains_embeds_and_is_evaluated_as_the_family_that_it_copies(run):
    assert {"train-twin-1", "embed-twin-1", "embed-twin-3"} <= set(run["steps"])
    assert {"twin-1", "sasrec-1", "shortest"} <= set(run["models"])
    assert run["same"]  # the same seed, the same weights, the same ranks


def test_people_meet_it_by_its_title_in_report_gate_and_form(run):
    assert run["names"][:2] == ["Twin", "SASRec"]
    assert "Shortest text" in run["names"]
    assert any("0.5 x shortest text's" in reason for reason in run["reasons"])
    assert {"twin.stage1.steps", "gate.min_vs.shortest"} <= set(run["form"])


def test_a_folder_that_is_not_there_and_a_family_that_is_none_are_settings_errors(tmp_path, monkeypatch):
    monkeypatch.setenv(module.FOLDERS, str(tmp_path / "nowhere"))
    families.cache_clear()
    try:
        with pytest.raises(ConfigError, match="no such folder"):
            families()
    finally:
        monkeypatch.delenv(module.FOLDERS)
        families.cache_clear()
        families()
    for made, says in ((None, "defines no FAMILY"), (module.Family("Bad-Name", "x", "y"), "is no name")):
        with pytest.raises(ConfigError, match=says):
            module._add({}, made, "here", False)


def test_labels_and_steps_lead_back_to_the_trained_model():
    for name, family in families().items():
        for stage in range(1, 1 + len(family.stages)):
            trained = TrainedModel(family, stage)
            assert TrainedModel.of(trained.label) == TrainedModel.of(trained.train_step) == trained
        assert TrainedModel.of(name) is None
