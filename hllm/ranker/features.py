"""What a ranker reads from Feast: the same columns offline, joined at each row's moment, and online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hllm.ranker.store import SERVICE, count_names
from hllm.work.progress import Progress

if TYPE_CHECKING:
    from feast import FeatureStore

# R rows, D vector width

Floats = npt.NDArray[np.float32]
JOINED_AT_ONCE = 4_000
"""Rows of one point-in-time join: Feast computes the affinity from Python lists of both vectors."""


@dataclass(frozen=True)
class Features:
    """R rows of the service. What could not be read is nan; a vector that could not be, zeros."""

    user_ids_R: npt.NDArray[np.object_]
    item_ids_R: npt.NDArray[np.object_]
    counts_R6: npt.NDArray[np.float64]
    """Events, likes and second of the last event, of the user and of the item."""
    times_R: npt.NDArray[np.int64]
    """The moment of each row, seconds UTC."""
    categories_R: npt.NDArray[np.object_]
    """A list of words each."""
    users_RD: Floats
    items_RD: Floats
    affinity_R: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.user_ids_R)

    @property
    def with_user_vector(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.users_RD.any(axis=1))

    def take(self, rows: Any) -> Features:
        return Features(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def of(cls, table: pa.Table, times_R: npt.NDArray[np.int64], width: int) -> Features:
        counts = [table[name] for kind in ("user", "item") for name in count_names(kind)]
        categories = np.empty(table.num_rows, object)
        categories[:] = [words or [] for words in table["item_categories"].to_pylist()]
        return cls(
            table["user_id"].to_numpy(),
            table["item_id"].to_numpy(),
            np.stack([_numbers(column) for column in counts], axis=1),
            times_R,
            categories,
            _vectors(table["user_vector"], width),
            _vectors(table["item_vector"], width),
            _numbers(table["affinity"]),
        )

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def read_offline(
    store: FeatureStore,
    user_ids: npt.NDArray[np.object_],
    item_ids: npt.NDArray[np.object_],
    times_R: npt.NDArray[np.int64],
    width: int,
) -> Features:
    """`get_historical_features`: what could be read at each row's moment."""
    import pandas as pd

    service, parts = store.get_feature_service(SERVICE), []
    with Progress("point-in-time join", len(times_R), "row") as progress:
        for begin in range(0, len(times_R), JOINED_AT_ONCE):
            part = slice(begin, begin + JOINED_AT_ONCE)
            rows = pd.DataFrame(
                {
                    "user_id": user_ids[part],
                    "item_id": item_ids[part],
                    "event_timestamp": pd.to_datetime(times_R[part], unit="s", utc=True),
                    "row": np.arange(len(times_R[part])),
                }
            )
            table = store.get_historical_features(rows, service).to_arrow().sort_by("row")
            if table["row"].to_pylist() != rows["row"].to_list():
                raise RuntimeError("the point-in-time join lost or repeated rows")
            parts.append(Features.of(table, times_R[part], width))
            progress.advance(len(rows))
    return Features.joined(parts)


def read_online(
    store: FeatureStore, user_ids: Sequence[str], item_ids: Sequence[str], now: int, width: int
) -> Features:
    """`get_online_features`: what can be read now. Ids that the store does not know read as missing."""
    rows = [{"user_id": user, "item_id": item} for user, item in zip(user_ids, item_ids, strict=True)]
    table = store.get_online_features(store.get_feature_service(SERVICE), entity_rows=rows).to_arrow()
    return Features.of(table, np.full(len(rows), now), width)


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)


def _vectors(column: pa.ChunkedArray, width: int) -> Floats:
    """(R, D); zeros where there is none."""
    found = np.zeros((len(column), width), np.float32)
    if pa.types.is_null(column.type):
        return found
    there = np.asarray(column.is_valid().to_numpy(), bool)
    kept = column.combine_chunks().drop_null()
    found[there] = np.asarray(kept.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)
    return found
