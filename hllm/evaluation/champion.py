"""Ranks and scores of an earlier version in today's catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.models.common.ranking import HeldOut, Ranks, rank_by_vectors
from hllm.settings import Settings


def rank_package(prepared: Prepared, package: Any, settings: Settings, held_out: HeldOut) -> Ranks:
    """An item that the package does not know comes last, and so does everything for a user of whom it knows
    nothing."""
    ids = prepared.item_table(["item_id"])["item_id"].to_pylist()
    row_of = {item_id: row for row, item_id in enumerate(package.item_ids)}
    known_I = np.array([item_id in row_of for item_id in ids], dtype=bool)
    last = Ranks(np.full(len(held_out), held_out.items), np.full(len(held_out), held_out.items))
    among = _among_known(held_out, known_I)
    rows = np.flatnonzero(known_I[held_out.targets_R] & (among.positions_R > among.starts_R))
    if not len(rows):
        return last
    among, known_ids = among.take(rows), [ids[item] for item in np.flatnonzero(known_I)]
    users_RD = np.concatenate(
        [
            np.asarray(package.interest_vectors(*_histories(among, block, known_ids)), np.float32)
            for block in among.blocks(settings.embed.users_per_batch)
        ]
    )
    items_ID = np.asarray(package.item_vectors, np.float32)[[row_of[item_id] for item_id in known_ids]]
    ranks = rank_by_vectors(users_RD, items_ID, among, "champion")
    last.filtered_R[rows], last.unfiltered_R[rows] = ranks.filtered_R, ranks.unfiltered_R
    return last


def score_package(
    prepared: Prepared, package: Any, settings: Settings, held_out: HeldOut
) -> npt.NDArray[np.float64]:
    """What the package thinks of each event's item: its probability, or the cosine it ranks with; (R,). An
    item or a user that it does not know gets the mean of the others: it says nothing of them."""
    ids = prepared.item_table(["item_id"])["item_id"].to_pylist()
    row_of = {item_id: row for row, item_id in enumerate(package.item_ids)}
    scores = np.full(len(held_out), np.nan)
    for block in held_out.blocks(settings.embed.users_per_batch):
        histories, times, asked = _histories(held_out, block, ids)
        items = [ids[item] for item in held_out.targets_R[block]]
        if package.objective != "generative":
            found = package.scores(histories, [[item] for item in items], times, asked)
            scores[block] = np.concatenate(found)
        else:
            users = package.interest_vectors(histories, times, asked)
            known = [row_of.get(item, -1) for item in items]
            cosines = (users * np.asarray(package.item_vectors)[known]).sum(axis=1)
            scores[block] = np.where((np.array(known) >= 0) & users.any(axis=1), cosines, np.nan)
    unknown = np.isnan(scores)
    scores[unknown] = scores[~unknown].mean() if not unknown.all() else 0.0
    return scores


def _histories(
    held_out: HeldOut, block: slice, ids: list[str]
) -> tuple[list[list[str]], list[list[int]], list[int]]:
    """Ids and times of all events before each held-out one, oldest first, and its own time. The package takes
    as many of them as it reads, which today's settings do not know."""
    spans = [
        slice(start, end)
        for start, end in zip(held_out.starts_R[block], held_out.positions_R[block], strict=True)
    ]
    return (
        [[ids[item] for item in held_out.event_items[span]] for span in spans],
        [held_out.event_times[span].tolist() for span in spans],
        held_out.asked_R[block].tolist(),
    )


def _among_known(held_out: HeldOut, known_I: np.ndarray) -> HeldOut:
    """The same events in a catalogue of the known items alone; earlier events with unknown items are gone.
    The number of an unknown target means nothing."""
    renumbered_I = np.cumsum(known_I) - 1
    known_E = known_I[held_out.event_items]
    before_E = np.concatenate([[0], np.cumsum(known_E)])
    return HeldOut(
        users_R=held_out.users_R,
        positions_R=before_E[held_out.positions_R],
        starts_R=before_E[held_out.starts_R],
        targets_R=renumbered_I[held_out.targets_R],
        event_items=renumbered_I[held_out.event_items[known_E]].astype(np.int32),
        event_times=held_out.event_times[known_E],
        asked_R=held_out.asked_R,
        items=int(known_I.sum()),
    )
