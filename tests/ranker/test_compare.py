"""A candidate's ranking result beside the champion's, as report and description tell it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hllm.evaluation.ranker import measure, tables
from hllm.evaluation.ranker_champion import ranking_of
from hllm.report.ranker import ranking_section
from hllm.settings import Settings

SETTINGS = Settings.model_validate({"evaluation": {"bootstrap": 100}})
ROWS, USERS = 1200, 80


def written(folder, skill, rows=ROWS):
    """A `rank` output: with more skill, vectors help more."""
    rng = np.random.default_rng(0)
    users, labels, noise = rng.integers(0, USERS, rows), rng.integers(0, 2, rows), rng.normal(size=rows)
    scores = {
        variant: [labels * much + noise + rng.normal(size=rows) * 0.1 for _ in range(2)]
        for variant, much in {"base": 0.2, "vectors": 0.2 + skill, "fusion": 0.2 + skill}.items()
    }
    events = rng.integers(0, 60, rows)
    affinity = np.where(rng.random(rows) < 0.4, labels + noise, np.nan)
    results = measure(SETTINGS, labels, users, events, events, affinity, scores) | {
        "rows": {"train": 10, "valid": 10, "test": rows},
        "days": {"prepare.test_from": "1998-01-01", "ranking.test_from": "1998-03-05"},
        "with_user_vector": {"train": 0.5, "test": 0.4},
        "refresh_hours": 24.0,
        "like_rate": 0.5,
    }
    folder.mkdir()
    (folder / "ranking.json").write_text(json.dumps(results))
    columns = {"user_id": [f"u{user}" for user in users], "item_id": [f"i{row}" for row in range(rows)]}
    columns |= {"timestamp": np.arange(rows), "label": labels}
    columns |= {variant: np.mean(each, axis=0) for variant, each in scores.items()}
    parquet.write_table(pa.table(columns), folder / "scores.parquet")
    return folder


def test_gains_are_told_beside_the_champions(tmp_path):
    mine, other = written(tmp_path / "mine", skill=0.6), written(tmp_path / "other", skill=0.1)
    found = ranking_of(SETTINGS, mine, (3, other))
    section = ranking_section(found)
    assert section["comparable"]
    said = {row["name"]: row["says"] for row in section["gains"]}
    assert said["(b) over (a)"] == "better"
    assert said["candidate less champion, (b)"] == "better"
    assert said["(c) over (b)"] == "no clear difference"
    auc = found["differences"]["vectors"]["auc"]
    values = [
        json.loads((folder / "ranking.json").read_text())["models"]["vectors"]["parts"]["overall"]["auc"]
        for folder in (mine, other)
    ]
    assert auc["value"] == pytest.approx(values[0]["value"] - values[1]["value"], abs=0.01)
    assert auc["low"] < auc["value"] < auc["high"]


def test_results_on_other_impressions_are_not_subtracted(tmp_path):
    mine, other = written(tmp_path / "mine", 0.6), written(tmp_path / "other", 0.1, rows=ROWS - 1)
    section = ranking_section(ranking_of(SETTINGS, mine, (3, other)))
    assert not section["comparable"]
    assert not [row for row in section["gains"] if row["name"].startswith("candidate less champion")]
    assert any(row["name"].startswith("the champion's (version 3)") for row in section["gains"])


def test_without_a_champion_and_without_a_result(tmp_path):
    assert ranking_section(None) is None
    section = ranking_section(ranking_of(SETTINGS, written(tmp_path / "mine", 0.6), None))
    assert section["champion"] is None
    assert len(section["gains"]) == 3


def test_the_tables_hold_every_figure(tmp_path):
    results = json.loads((written(tmp_path / "mine", 0.6) / "ranking.json").read_text())
    text = tables(results)
    for model in results["models"].values():
        for figure in model["parts"]["overall"].values():
            assert f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" in text
    shares = [about["share"] for part, about in results["parts"].items() if part.startswith("user:")]
    assert sum(shares) == pytest.approx(1)
    assert "| gain of (b) over (a) | +" in text
    found, missing = (results["parts"][part]["rows"] for part in ("vector:found", "vector:missing"))
    assert found + missing == ROWS
    assert results["affinity_alone"]["auc"]["value"] > 0.6
    assert f"| user vector found | {found / ROWS:.1%} |" in text
