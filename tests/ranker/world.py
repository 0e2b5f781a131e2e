"""A log with labels: users like the items of their genre, and some items are liked by everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hllm.settings import Settings
from tests.world import GENRES, TinySource, tiny_settings, write_csv, write_items

DAY = 86_400
START = 1_600_041_600  # 2020-09-14, midnight
PERIODS = {
    "prepare.split": "temporal",
    "prepare.valid_from": "2020-09-22",
    "prepare.test_from": "2020-09-24",
    "ranking.valid_from": "2020-10-04",
    "ranking.test_from": "2020-10-08",
}
"""Of 30 days from START on: 10 for HLLM, 10 train the ranker, 4 choose its epoch, 6 test it."""


def write_labelled_source(folder: Path, users: int = 60, items: int = 40, seed: int = 3) -> TinySource:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    item_ids = [f"item{n}" for n in range(items)]
    popular = rng.random(items) < 0.2
    events: list[tuple[str, str, int, int]] = []
    for user in range(users):
        chosen = rng.choice(items, size=int(rng.integers(15, 30)), replace=False)
        times = START + np.sort(rng.integers(0, 30 * DAY, size=len(chosen)))
        for item, time in zip(chosen, times, strict=True):
            likes = 0.15 + 0.55 * (item % len(GENRES) == user % len(GENRES)) + 0.25 * popular[item]
            events.append((f"u{user}", item_ids[item], int(time), int(rng.random() < likes)))
    write_items(
        folder / "items.parquet",
        item_id=item_ids,
        title=[f"Title {n} of {GENRES[n % len(GENRES)]}" for n in range(items)],
        category=[GENRES[n % len(GENRES)] for n in range(items)],
    )
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp", "label"], events)
    return TinySource(
        folder / "items.parquet",
        folder / "interactions.csv",
        item_ids,
        [(user, item, time) for user, item, time, _ in events],
    )


def ranking_settings(folder: Path, source: TinySource, **sets: Any) -> Settings:
    columns = {"texts": ["title"], "label": "label"}
    small = {"ranking.seeds": 2, "ranking.epochs": 4, "ranking.batch_size": 64, "ranking.hidden": 8}
    return tiny_settings(folder, source, **{"data.columns": columns, **PERIODS, **small, **sets})
