"""Users from their histories: only the last position of each history is a user's vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hllm.data.prepared import Prepared
from hllm.models.packing import Packing, ragged
from hllm.models.users import SASRecUser

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]
# R users (or held-out events), I items, D vector width


def held_out_user_vectors(
    model: nn.Module,
    item_vectors_ID: Floats,
    prepared: Prepared,
    users_R: Ints,
    positions_R: Ints,
    max_history: int,
    batch: int,
) -> Floats:
    """Row r: the user's vector from events [max(first event, position - max_history), position): (R, D), unit
    length."""
    starts_R = np.maximum(np.asarray(prepared.user_offsets)[users_R], positions_R - max_history)
    return vectors_of_histories(
        model, item_vectors_ID, prepared.event_items, starts_R, positions_R - starts_R, batch
    )


def vectors_of_histories(
    model: nn.Module,
    item_vectors_ID: Floats,
    event_items: Ints,
    starts_R: Ints,
    lengths_R: Ints,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Floats:
    """Vectors of the histories event_items[start : start + length]: (R, D), unit length. Histories are never
    empty.

    Short histories are encoded with short ones, so a batch holds no padding and one long history does not
    slow the rest.
    """
    if isinstance(model, SASRecUser):  # it knows as many positions as its training windows were long
        skipped_R = np.maximum(lengths_R - model.max_history, 0)
        starts_R, lengths_R = starts_R + skipped_R, lengths_R - skipped_R
    vectors_RD = np.empty((len(starts_R), item_vectors_ID.shape[1]), np.float32)
    order = np.argsort(lengths_R, kind="stable")
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            packing = Packing(np.asarray(lengths_R[rows], np.int64))
            history = np.asarray(
                item_vectors_ID[np.asarray(event_items[ragged(starts_R[rows], lengths_R[rows])])], np.float32
            )
            outputs_TD = model(torch.from_numpy(history), packing)
            vectors_RD[rows] = outputs_TD[torch.from_numpy(packing.last_S)].float().numpy()
            if advance:
                advance(len(rows))
    return vectors_RD
