"""Ranks of an earlier version in today's catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np

from hllm.data.prepared import Prepared
from hllm.evaluation.ranking import HeldOut, Ints, Ranks, rank_by_vectors
from hllm.settings import Settings


def rank_package(prepared: Prepared, package: Any, settings: Settings, held_out: HeldOut) -> Ranks:
    ids = prepared.item_table(["item_id"])["item_id"].to_pylist()
    row_of = {item_id: row for row, item_id in enumerate(package.item_ids)}
    known_I = np.array([item_id in row_of for item_id in ids], dtype=bool)
    histories = [
        _history(held_out, row, ids, known_I, settings.embed.max_history) for row in range(len(held_out))
    ]
    last = Ranks(np.full(len(held_out), held_out.items), np.full(len(held_out), held_out.items))
    rows = np.flatnonzero(
        known_I[held_out.targets_R] & np.array([bool(history) for history in histories], dtype=bool)
    )
    if not len(rows):
        return last
    batch = settings.embed.users_per_batch
    users_RD = np.concatenate(
        [
            np.asarray(
                package.user_vectors([histories[row] for row in rows[start : start + batch]]),
                dtype=np.float32,
            )
            for start in range(0, len(rows), batch)
        ]
    )
    order = [row_of[item_id] for item_id, known in zip(ids, known_I, strict=True) if known]
    items_ID = np.asarray(package.item_vectors, dtype=np.float32)[order]
    ranks = rank_by_vectors(users_RD, items_ID, _among_known(held_out, rows, known_I), "champion")
    last.filtered_R[rows], last.unfiltered_R[rows] = ranks.filtered_R, ranks.unfiltered_R
    return last


def _history(held_out: HeldOut, row: int, ids: list[str], known_I: np.ndarray, longest: int) -> list[str]:
    """Ids of the latest events before a held-out one that the package knows, oldest first."""
    items = held_out.event_items[held_out.starts_R[row] : held_out.positions_R[row]]
    return [ids[item] for item in items[known_I[items]][-longest:]]


def _among_known(held_out: HeldOut, rows: Ints, known_I: np.ndarray) -> HeldOut:
    """The chosen events in a catalogue of the known items alone; events with unknown items are gone."""
    renumbered_I = np.cumsum(known_I) - 1
    known_E = known_I[held_out.event_items]
    before_E = np.concatenate([[0], np.cumsum(known_E)])
    return HeldOut(
        users_R=held_out.users_R[rows],
        positions_R=before_E[held_out.positions_R[rows]],
        starts_R=before_E[held_out.starts_R[rows]],
        targets_R=renumbered_I[held_out.targets_R[rows]],
        event_items=renumbered_I[held_out.event_items[known_E]].astype(np.int32),
        items=int(known_I.sum()),
    )
