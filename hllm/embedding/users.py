"""Users from their histories: only the last position of each history is a user's vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hllm.data.prepared import Prepared
from hllm.models.history import UNKNOWN_TIME, History
from hllm.models.packing import Packing, ragged

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]
# R users (or held-out events), I items, D vector width


def held_out_user_vectors(
    model: nn.Module,
    item_vectors_ID: Floats,
    prepared: Prepared,
    users_R: Ints,
    positions_R: Ints,
    asked_R: Ints,
    max_history: int,
    batch: int,
) -> Floats:
    """Row r: the user's vector from events [max(first event, position - max_history), position), asked for at
    a moment of its own (seconds UTC): (R, D), unit length."""
    starts_R = np.maximum(np.asarray(prepared.user_offsets)[users_R], positions_R - max_history)
    return vectors_of_histories(
        model,
        item_vectors_ID,
        prepared.event_items,
        prepared.event_times,
        starts_R,
        positions_R - starts_R,
        asked_R,
        batch,
    )


def vectors_of_histories(
    model: nn.Module,
    item_vectors_ID: Floats,
    event_items: Ints,
    event_times: Ints,
    starts_R: Ints,
    lengths_R: Ints,
    asked_R: Ints,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Floats:
    """Vectors of the histories event_items[start : start + length], asked for at a moment of their own
    (seconds UTC, or UNKNOWN_TIME as any time may be): (R, D), unit length. Histories are never empty.

    Short histories are encoded with short ones, so a batch holds no padding and one long history does not
    slow the rest.
    """
    known = getattr(model, "max_history", None)
    if known:  # ID-based families know as many positions as their training windows were long
        skipped_R = np.maximum(lengths_R - known, 0)
        starts_R, lengths_R = starts_R + skipped_R, lengths_R - skipped_R
    vectors_RD = np.empty((len(starts_R), item_vectors_ID.shape[1]), np.float32)
    order = np.argsort(lengths_R, kind="stable")
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            packing = Packing(np.asarray(lengths_R[rows], np.int64))
            positions = ragged(starts_R[rows], lengths_R[rows])
            items_T, times_T = (
                np.asarray(column[positions], np.int64) for column in (event_items, event_times)
            )
            next_times_T = np.append(times_T[1:], UNKNOWN_TIME)
            next_times_T[packing.last_S] = asked_R[rows]
            outputs_TD = model(
                torch.from_numpy(np.asarray(item_vectors_ID[items_T], np.float32)),
                History(packing, items_T, times_T, next_times_T),
            )
            vectors_RD[rows] = outputs_TD[torch.from_numpy(packing.last_S)].float().numpy()
            if advance:
                advance(len(rows))
    return vectors_RD
