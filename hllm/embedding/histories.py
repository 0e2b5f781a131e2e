"""Histories to encode: rows of events, each asked about at a moment of its own; and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hllm.data.prepared import Prepared
from hllm.models.common.history import UNKNOWN_TIME, History
from hllm.models.common.packing import Packing, device_of, on_device, ragged
from hllm.work.ranks import turns

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]
# R histories, E events, I items, D vector width


@dataclass(frozen=True)
class Histories:
    """Row r: events [start, start + length) of one log, in their order."""

    items_E: Ints
    """Item index of every event of the log."""
    times_E: Ints
    """When it happened: seconds UTC, or UNKNOWN_TIME."""
    starts_R: Ints
    lengths_R: Ints
    asked_R: Ints
    """The moment at which the row is asked about: seconds UTC, or UNKNOWN_TIME."""

    @classmethod
    def before(
        cls, prepared: Prepared, users_R: Ints, positions_R: Ints, asked_R: Ints, most: int
    ) -> Histories:
        """The `most` events of each user before a position in the log: [max(first event, position - most),
        position)."""
        starts_R = np.maximum(np.asarray(prepared.user_offsets)[users_R], positions_R - most)
        return cls(prepared.event_items, prepared.event_times, starts_R, positions_R - starts_R, asked_R)

    def __len__(self) -> int:
        return len(self.starts_R)

    def take(self, rows: Ints) -> Histories:
        return Histories(
            self.items_E, self.times_E, self.starts_R[rows], self.lengths_R[rows], self.asked_R[rows]
        )


def packed_histories(
    model: nn.Module, item_vectors_ID: Floats, histories: Histories, batch: int
) -> Iterator[tuple[bool, npt.NDArray[np.int64], npt.NDArray[np.int64], torch.Tensor, History]]:
    """This process's batches of at most `batch` histories: whether it counts (`hllm.work.ranks.turns`), the
    rows that they answer, the place of each row's last event, the (T, D) vectors of their items, and the
    histories.

    Short histories come with short ones, so a batch holds no padding and one long history does not slow the
    rest. Rows that begin with the same event are the same history at different times: where the model counts
    positions from the first event, the longest is encoded for all of them.

    Raises:
        ValueError: a history is empty.
    """
    starts_R, lengths_R = histories.starts_R, histories.lengths_R
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
        items_T, times_T = (
            np.asarray(column[positions], np.int64) for column in (histories.items_E, histories.times_E)
        )
        next_times_T = np.append(times_T[1:], UNKNOWN_TIME)
        next_times_T[packing.last_S] = histories.asked_R[longest_G[groups]]
        rows = by_group[ragged(firsts_G[groups], counts_G[groups])]
        yield (
            mine,
            rows,
            np.repeat(packing.starts_S, counts_G[groups]) + lengths_R[rows] - 1,
            on_device(np.asarray(item_vectors_ID[items_T], np.float32), where),
            History(packing, items_T, times_T, next_times_T),
        )
