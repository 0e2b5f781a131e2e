"""Users from their histories: only the last position of each history is a user's vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hllm.data.prepared import Prepared
from hllm.models.history import UNKNOWN_TIME, History
from hllm.models.packing import Packing, device_of, inference_precision, on_device, ragged
from hllm.processes import place, total, turns

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
    published: bool = False,
) -> Floats:
    """Vectors of the histories event_items[start : start + length], asked for at a moment of their own
    (seconds UTC, or UNKNOWN_TIME as any time may be): (R, D), unit length. Histories are never empty.

    The vector is the predicted next interest, which ranks a catalogue. A model of late fusion has another
    one, its output at [USER]: with `published`, the vector that other models are to read.

    Processes share the work, and all have the result.
    """
    read: Any = model.user_token_vectors if published and has_user_token(model) else None
    vectors_RD = np.zeros((len(starts_R), item_vectors_ID.shape[1]), np.float32)
    batches = packed_histories(
        model, item_vectors_ID, event_items, event_times, starts_R, lengths_R, asked_R, batch
    )
    with torch.no_grad():  # not inference_mode: ZeRO 3 keeps what it gathers here
        for mine, rows, ends, inputs_TD, history in batches:
            with inference_precision(inputs_TD.device):
                if read:
                    found = read(inputs_TD, history, ends, np.asarray(asked_R)[rows])
                else:
                    found = model(inputs_TD, history)[on_device(ends, inputs_TD.device)]
            if mine:
                vectors_RD[rows] = found.float().cpu().numpy()
            if advance:
                advance(len(rows) * place().size)
    total(vectors_RD)
    return vectors_RD


def has_user_token(model: nn.Module) -> bool:
    """Whether the published user vector is not the predicted next interest."""
    return getattr(model, "objective", "") == "late_fusion"


def packed_histories(
    model: nn.Module,
    item_vectors_ID: Floats,
    event_items: Ints,
    event_times: Ints,
    starts_R: Ints,
    lengths_R: Ints,
    asked_R: Ints,
    batch: int,
) -> Iterator[tuple[bool, npt.NDArray[np.int64], npt.NDArray[np.int64], torch.Tensor, History]]:
    """This process's batches of at most `batch` histories: whether it counts (`hllm.processes.turns`), the
    rows that they answer, the place of each row's last event, the (T, D) vectors of their items, and the
    histories.

    Short histories come with short ones, so a batch holds no padding and one long history does not slow the
    rest. Rows that begin with the same event are the same history at different times: where the model counts
    positions from the first event, the longest is encoded for all of them.
    """
    if len(lengths_R) and np.min(lengths_R) < 1:
        raise ValueError("histories are never empty")
    known = getattr(model, "max_history", None)
    if known:  # ID-based families know as many positions as their windows were long, counted from the latest
        skipped_R = np.maximum(lengths_R - known, 0)
        starts_R, lengths_R = starts_R + skipped_R, lengths_R - skipped_R
        starts_G, group_R = starts_R, np.arange(len(starts_R))
    else:
        starts_G, group_R = np.unique(starts_R, return_inverse=True)
    by_group = np.lexsort((lengths_R, group_R))
    counts_G = np.bincount(group_R, minlength=len(starts_G))
    firsts_G = np.cumsum(counts_G) - counts_G
    longest_G = by_group[firsts_G + counts_G - 1]
    order = np.argsort(lengths_R[longest_G], kind="stable")
    where = device_of(model)
    for number, mine in turns(-(-len(order) // batch)):
        groups = order[number * batch : (number + 1) * batch]
        packing = Packing(np.asarray(lengths_R[longest_G[groups]], np.int64))
        positions = ragged(starts_G[groups], packing.lengths_S)
        items_T, times_T = (np.asarray(column[positions], np.int64) for column in (event_items, event_times))
        next_times_T = np.append(times_T[1:], UNKNOWN_TIME)
        next_times_T[packing.last_S] = asked_R[longest_G[groups]]
        rows = by_group[ragged(firsts_G[groups], counts_G[groups])]
        yield (
            mine,
            rows,
            np.repeat(packing.starts_S, counts_G[groups]) + lengths_R[rows] - 1,
            on_device(np.asarray(item_vectors_ID[items_T], np.float32), where),
            History(packing, items_T, times_T, next_times_T),
        )
