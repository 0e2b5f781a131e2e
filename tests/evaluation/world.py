"""Small prepared data sets, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from hllm.data.prepared import Prepared, write_arrays


def prepare(folder: Path, histories: list[list[int]], items: int, test: int = 1, valid: int = 1) -> Prepared:
    """User u has the events `histories[u]`; the last `test` are test, the `valid` before them validation."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(history) for history in histories])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    valid_ends = np.maximum(offsets[1:] - test, offsets[:-1])
    train_ends = np.maximum(valid_ends - valid, offsets[:-1])
    events = np.concatenate([np.array(history, dtype=np.int32) for history in histories])
    write_arrays(
        folder,
        event_items=events,
        event_times=np.arange(len(events)) * 86_400 + 880_000_000,
        event_labels=np.full(len(events), -1),
        user_offsets=offsets,
        train_ends=train_ends,
        valid_ends=valid_ends,
        token_ids=np.arange(items),
        token_offsets=np.arange(items + 1),
    )
    training = np.concatenate([events[a:b] for a, b in zip(offsets[:-1], train_ends, strict=True)])
    write_table(
        folder / "items.parquet",
        item_index=range(items),
        item_id=[f"i{item}" for item in range(items)],
        text=[f"title: Item {item}" for item in range(items)],
        title=[f"Item {item}" for item in range(items)],
        train_events=np.bincount(training, minlength=items),
    )
    write_table(
        folder / "users.parquet",
        user_index=range(len(histories)),
        user_id=[f"u{user}" for user in range(len(histories))],
        events=lengths,
        train_events=train_ends - offsets[:-1],
    )
    return Prepared.open(folder)


def write_table(path: Path, **columns: object) -> None:
    parquet.write_table(
        arrow.table({name: arrow.array(list(values)) for name, values in columns.items()}), path
    )  # type: ignore[call-overload]


def random_histories(rng: np.random.Generator, users: int, items: int, longest: int = 12) -> list[list[int]]:
    return [rng.integers(0, items, size=rng.integers(3, longest + 1)).tolist() for _ in range(users)]


def unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class SmallPackage:
    """A deployable model whose user vector is the mean of the vectors of what the user had, as far as it
    knows."""

    objective = "generative"

    def __init__(self, item_ids: list[str], item_vectors: np.ndarray) -> None:
        self.item_ids, self.item_vectors = item_ids, item_vectors
        self.row_of = {item_id: row for row, item_id in enumerate(item_ids)}

    def interest_vectors(self, histories: list[list[str]], times: object, asked_at: object) -> np.ndarray:
        known = [
            [self.row_of[item_id] for item_id in history if item_id in self.row_of] for history in histories
        ]
        nothing = np.zeros(self.item_vectors.shape[1])
        means = [self.item_vectors[rows].mean(axis=0) if rows else nothing for rows in known]
        return np.stack(means).astype(np.float32)
