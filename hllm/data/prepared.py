"""The prepared data set as every later step reads it: memory-mapped, aligned by index.

Files of a `prepare` output:
    items.parquet          item_index, item_id, text (all fields), title (the first one), train_events,
                           then the catalogue's other columns; row i is item i
    users.parquet          user_index, user_id, events, train_events; row u is user u
    event_items.npy        int32 (E,)    item index of every event; user by user, each in time order
    event_times.npy        int64 (E,)    seconds UTC
    event_labels.npy       int8  (E,)    0, 1, or -1 where the log has no label
    user_offsets.npy       int64 (U+1,)  user u's events are [offsets[u], offsets[u+1])
    train_ends.npy         int64 (U,)    absolute: events before it train, the ones from it on are held out
    valid_ends.npy         int64 (U,)    absolute: [train_end, valid_end) validates, what follows tests
    token_ids.npy          int32 (T,)    tokens of every item's prompt and text, one item after another
    token_offsets.npy      int64 (I+1,)

A user's first event is never held out, whatever the split: there is no history to predict it from. In a
temporal split it may therefore lie before train_ends without being a training event: `train_events` of items
and users counts only what happened before the validation period.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

ARRAYS = {
    "event_items": np.int32,
    "event_times": np.int64,
    "event_labels": np.int8,
    "user_offsets": np.int64,
    "train_ends": np.int64,
    "valid_ends": np.int64,
    "token_ids": np.int32,
    "token_offsets": np.int64,
}


@dataclass(frozen=True)
class Prepared:
    """U users, I items, E events, T tokens."""

    folder: Path
    event_items: npt.NDArray[np.int32]
    event_times: npt.NDArray[np.int64]
    event_labels: npt.NDArray[np.int8]
    user_offsets: npt.NDArray[np.int64]
    train_ends: npt.NDArray[np.int64]
    valid_ends: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int32]
    token_offsets: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        return cls(
            folder,
            **{name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS},
        )

    @classmethod
    def of_items(cls, folder: Path) -> Prepared:
        """Items that are to be encoded, without any events: a folder that `write_items` filled."""
        found = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if name.startswith("token_")
            else np.zeros(0, kind)
            for name, kind in ARRAYS.items()
        }
        return cls(folder, **found)

    @property
    def trained_until(self) -> int:
        """The newest event that trained, seconds UTC. A user's only training event trains nothing, and
        may lie after the split: whoever is new then has one for a history."""
        users = np.flatnonzero(self.train_ends - self.user_offsets[:-1] > 1)
        return int(self.event_times[self.train_ends[users] - 1].max())

    @property
    def users(self) -> int:
        return len(self.user_offsets) - 1

    @property
    def items(self) -> int:
        return len(self.token_offsets) - 1

    @property
    def train_starts(self) -> npt.NDArray[np.int64]:
        return self.user_offsets[:-1]

    def item_table(self, columns: list[str] | None = None):  # type: ignore[no-untyped-def]
        """items.parquet as an Arrow table; row i is item i."""
        import pyarrow.parquet as parquet

        return parquet.read_table(self.folder / "items.parquet", columns=columns)

    def user_table(self, columns: list[str] | None = None):  # type: ignore[no-untyped-def]
        import pyarrow.parquet as parquet

        return parquet.read_table(self.folder / "users.parquet", columns=columns)

    def held_out(self, part: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(user index, absolute event position) of every held-out event of `valid` or `test`; an event's
        history is everything of that user before it."""
        starts, ends = (
            (self.train_ends, self.valid_ends)
            if part == "valid"
            else (self.valid_ends, self.user_offsets[1:])
        )
        counts = ends - starts
        users = np.repeat(np.arange(self.users), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        positions = np.repeat(starts, counts) + np.arange(counts.sum()) - first
        return users.astype(np.int64), positions.astype(np.int64)


@contextmanager
def array_file(folder: Path, name: str, length: int) -> Iterator[BinaryIO]:
    """NAME.npy of `length` elements, whose bytes follow in parts: for arrays that may not fit in memory."""
    form = {"descr": np.dtype(ARRAYS[name]).str, "fortran_order": False, "shape": (length,)}
    with (folder / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, form)
        yield file


def write_arrays(folder: Path, **arrays: npt.NDArray) -> None:  # type: ignore[type-arg]
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array, dtype=ARRAYS[name]), allow_pickle=False)
