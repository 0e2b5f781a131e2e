"""A small world on disk, the same every time: 60 items in four genres, 40 users who each like one of them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.pipeline import keys, steps
from hllm.settings import Settings
from hllm.settings.loading import merge, refuse_unknown
from hllm.work.artifacts import WORK, Manifest, Store, clear, digest_of, file_digests
from hllm.work.step import Context, load_function, settings_of

STRANGE_IDS = ("with space", 'quo"te', "new\nline", "🎬", "naïve,comma", "007")
GENRES = ("space opera", "heist", "romance", "nature film")
START = 1_600_000_000


@dataclass(frozen=True)
class TinySource:
    """`items` is Parquet, `interactions` is CSV; `events` are (user, item, second) in the file's order."""

    items: Path
    interactions: Path
    item_ids: list[str]
    events: list[tuple[str, str, int]]


def write_tiny_source(folder: Path, users: int = 40, items: int = 60, seed: int = 5) -> TinySource:
    """Users have 1 to about 30 events; many of them fall on the same second."""
    rng = np.random.default_rng(seed)
    item_ids = [STRANGE_IDS[n] if n < len(STRANGE_IDS) else f"item{n}" for n in range(items)]
    user_ids = ["ünï user", "🙂", *(f"u{n}" for n in range(2, users))]
    events: list[tuple[str, str, int]] = []
    for user in range(users):
        count = user + 1 if user < 3 else int(rng.integers(5, 27))
        weights = np.where(np.arange(items) % len(GENRES) == user % len(GENRES), 8.0, 1.0)
        chosen = rng.choice(items, size=min(count, items), replace=False, p=weights / weights.sum())
        times = START + 3600 * np.sort(rng.integers(0, 200, size=len(chosen)))
        events += [
            (user_ids[user], item_ids[item], int(time)) for item, time in zip(chosen, times, strict=True)
        ]
    order = rng.permutation(len(events))
    events = [events[at] for at in order]
    folder.mkdir(parents=True, exist_ok=True)
    write_items(
        folder / "items.parquet",
        item_id=item_ids,
        title=[f"Title {n} of {GENRES[n % len(GENRES)]}" for n in range(items)],
        genre=[GENRES[n % len(GENRES)] if n % 7 else None for n in range(items)],
    )
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], events)
    return TinySource(folder / "items.parquet", folder / "interactions.csv", item_ids, events)


def write_labelled_source(folder: Path) -> TinySource:
    """The same, and every event says whether the user likes the item: those of the user's own genre."""
    source = write_tiny_source(folder)
    genre_of = {item: n % len(GENRES) for n, item in enumerate(source.item_ids)}
    users = {user: n for n, user in enumerate(["ünï user", "🙂", *(f"u{n}" for n in range(2, 40))])}
    rows = [
        (user, item, time, int(genre_of[item] == users[user] % len(GENRES)))
        for user, item, time in source.events
    ]
    write_csv(source.interactions, ["user_id", "item_id", "timestamp", "label"], rows)
    return source


def write_items(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return path


def write_csv(path: Path, header: list[str], rows: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def tiny_settings(folder: Path, source: TinySource, **sets: Any) -> Settings:
    """Settings whose every file lies under `folder`, with byte tokens and tiny random decoders.

    `tiny_settings(tmp_path, source, **{"hllm.stage1.steps": 3})` overrides any of them.
    """
    tiny = {"width": 32, "heads": 2, "layers": 1}
    stage = {"history_length": 8, "batch_size": 8, "negatives": 16, "steps": 4, "lr": 1e-3}
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "root": str(folder / "runs"), "threads": 1},
        "data": {
            "source": "table",
            "items": str(source.items),
            "interactions": str(source.interactions),
            "columns": {"texts": ["title", "genre"]},
        },
        "prepare": {"prompt": "item: ", "max_tokens": 48},
        "model": {"baselines": ["sasrec"]},
        "hllm": {
            "item_llm": dict(tiny),
            "user_llm": dict(tiny),
            "stage1": dict(stage),
            "stage2": {**stage, "history_length": 16},
        },
        "sasrec": {**tiny, "stage1": dict(stage)},
        "hstu": {**tiny, "stage1": dict(stage)},
        "evaluation": {"cutoffs": [5, 10], "bootstrap": 20},
        "gate": {"metric": "ndcg@10", "min_vs": {"popular": 0.0}},
        "mlflow": {
            "tracking_uri": f"sqlite:///{folder}/mlflow.db",
            "artifact_root": str(folder / "mlflow"),
            "keep_system_metrics": False,
        },
        "feast": {
            "registry": str(folder / "feast" / "registry.db"),
            "online_url": str(folder / "feast" / "online.db"),
            "offline_path": str(folder / "feast" / "offline"),
            "verify_sample": 50,
        },
    }
    for dotted, value in sets.items():
        *parents, last = dotted.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    refuse_unknown(tree, Settings, "", "tiny_settings", {})
    return Settings.model_validate(merge(Settings().model_dump(), tree))


def toml(tree: dict[str, Any], path: str = "") -> str:
    """Sections of plain values are all that settings have."""
    own = {name: value for name, value in tree.items() if not isinstance(value, dict)}
    text = f"[{path}]\n" if path else ""
    text += "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in own.items())
    for name, value in tree.items():
        if isinstance(value, dict):
            text += toml(value, f"{path}.{name}" if path else name)
    return text


def run_steps(settings: Settings, *names: str) -> Path:
    """Run steps for real, but without MLflow (which takes seconds to start); the last one's output folder."""
    all_steps, all_keys, store = steps(settings), keys(settings), Store(settings.run.root)
    output = Path()
    for name in names:
        step, key = all_steps[name], all_keys[name]
        output = store.folder(name, key)
        output.mkdir(parents=True, exist_ok=True)
        inputs = {need: store.fetch(need, all_keys[need]) for need in step.needs}
        context = Context(settings, step, key, inputs, output, store)
        load_function(step.run)(context)
        clear(output / WORK)
        files = file_digests(output)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        digest = digest_of(settings_of(step, settings))
        store.finish(
            Manifest(
                name, key, digest, "test", now, 0.0, digest_of(files), context.rows, context.facts, files
            )
        )
    return output
