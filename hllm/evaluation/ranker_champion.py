"""A candidate's ranking result beside the champion's, on the same impressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from hllm.evaluation.auc import compare_scores
from hllm.settings import Settings

KEYS = ("user_id", "item_id", "timestamp", "label")
COMPARED = ("vectors", "fusion")


def ranking_of(settings: Settings, mine: Path, champion: tuple[int, Path] | None) -> dict[str, Any]:
    """What report and description say of ranking: `results` of the candidate's `rank` output and, where the
    champion has one, its `version`, `champion` (results) and `differences`, candidate less champion: variant
    -> metrics with paired intervals, empty where the two were tested on other impressions."""
    found: dict[str, Any] = {"results": _results(mine), "champion": None}
    if champion is not None:
        version, folder = champion
        found |= {
            "version": version,
            "champion": _results(folder),
            "differences": differences(settings, mine / "scores.parquet", folder / "scores.parquet"),
        }
    return found


def differences(settings: Settings, mine: Path, other: Path) -> dict[str, Any]:
    tables = [
        parquet.read_table(path).sort_by([(key, "ascending") for key in KEYS]) for path in (mine, other)
    ]
    if not tables[0].select(KEYS).equals(tables[1].select(KEYS)):
        return {}
    labels, users = tables[0]["label"].to_numpy(), tables[0]["user_id"].to_numpy()
    return {
        variant: compare_scores(
            labels,
            tables[0][variant].to_numpy(),
            tables[1][variant].to_numpy(),
            users,
            settings.evaluation.bootstrap,
            settings.evaluation.confidence,
            settings.run.seed,
        )
        for variant in COMPARED
    }


def _results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "ranking.json").read_text("utf-8"))
    return found
