"""From the log to a registered version that tells its ranking gain beside the champion's."""

from __future__ import annotations

import json

import pytest

from hllm.pipeline import steps
from hllm.registry import versions
from hllm.registry.promote import promote
from hllm.registry.register import register
from hllm.work import mlflow as server
from hllm.work.artifacts import Store
from tests.ranker.world import ranking_settings, write_labelled_source
from tests.world import run_steps


@pytest.mark.slow
def test_a_version_tells_its_ranking_gain_and_a_later_one_is_compared_with_it(tmp_path):
    source = write_labelled_source(tmp_path / "source")
    first, second = (
        ranking_settings(tmp_path, source, **{"run.seed": seed, "gate.min_vs_champion": 0.0})
        for seed in (17, 18)
    )
    run_steps(first, *steps(first))
    assert register(first).version == 1
    info = versions.registered_version(first, "1")
    assert "**Ranking gain.** AUC of the reference ranker on" in info.description
    assert info.tags["ranking"].split("/")[-2] == "rank"
    files = {entry.path for entry in server.client(first).list_artifacts(info.run_id)}
    assert "ranking.json" in files
    versions.set_tags(first, 1, {"publication": "verified", "feast.feature_service": "hllm_v1"})
    promote(first, "1", by="ada")
    run_steps(second, *(name for name in steps(second) if name not in ("ingest", "validate", "prepare")))
    assert register(second).version == 2
    later = versions.registered_version(second, "2")
    assert "The champion's (version 1): vectors" in later.description
    assert "Candidate less champion with vectors:" in later.description
    page = Store(second.run.root).folder("register", later.tags["pipeline"]) / "report.html"
    assert "candidate less champion, (b)" in page.read_text()
    location = Store(first.run.root).local / "rank" / info.tags["ranking"].split("/")[-1]
    assert json.loads((location / "ranking.json").read_text())["rows"]["test"] > 0
