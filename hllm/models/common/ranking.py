"""Where the chosen item stands in the whole catalogue, for every held-out event.

R held-out events, I items, D vector width, P (event, item) pairs.

The rank of an event's target is 1 + the number of other items that score at least as high: ties count
against the model, so one that gives every item the same score ranks everything last. `filtered` leaves out
the items that the user had before the event, except the target itself, which is never left out.

Ranks are exact: scores come from a float32 product in blocks, and the few that lie within its rounding error
of the target's score are computed again in float64. So neither the block size nor the machine changes a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_info, threadpool_limits

from hllm.data.prepared import Prepared
from hllm.errors import DataError
from hllm.work.ranks import place, total

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK_USERS, BLOCK_ITEMS = 256, 4096
"""One block of scores (4 MiB) stays in the processor's cache while it is compared."""
PAIRS_AT_ONCE = 65_536
HALF_ULP = 2.0**-24
LONGEST = 1e15
"""Longer vectors overflow in float32 when they are multiplied."""


@dataclass(frozen=True)
class HeldOut:
    """The events that models are asked to foresee, and what their users had done before."""

    users_R: Ints
    positions_R: Ints
    """Absolute position of the event in the log."""
    starts_R: Ints
    """Absolute position of the user's first event."""
    targets_R: Ints
    event_items: npt.NDArray[np.int32]
    event_times: Ints
    asked_R: Ints
    """When the event happened: the moment of the question."""
    items: int
    without_history: int = 0
    """Events left out because their user had no earlier event: a model here has nothing to go by."""

    @classmethod
    def of(cls, prepared: Prepared, part: str) -> HeldOut:
        users, positions = prepared.held_out(part)
        starts = np.asarray(prepared.train_starts)[users]
        known = positions > starts
        users, positions, starts = users[known], positions[known], starts[known]
        targets = np.asarray(prepared.event_items[positions]).astype(np.int64)
        return cls(
            users,
            positions,
            starts,
            targets,
            prepared.event_items,
            prepared.event_times,
            np.asarray(prepared.event_times)[positions],
            prepared.items,
            int((~known).sum()),
        )

    def __len__(self) -> int:
        return len(self.targets_R)

    def take(self, rows: Ints) -> HeldOut:
        return replace(
            self,
            users_R=self.users_R[rows],
            positions_R=self.positions_R[rows],
            starts_R=self.starts_R[rows],
            targets_R=self.targets_R[rows],
            asked_R=self.asked_R[rows],
        )

    def blocks(self, size: int = BLOCK_USERS) -> Iterator[slice]:
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def seen(self, block: slice) -> tuple[Ints, Ints]:
        """Distinct (row of the block, item) of what the users had before, the row's target left out."""
        counts = self.positions_R[block] - self.starts_R[block]
        rows = np.repeat(np.arange(len(counts)), counts)
        shift = np.repeat(self.starts_R[block] - (np.cumsum(counts) - counts), counts)
        items = np.asarray(self.event_items[shift + np.arange(len(rows))]).astype(np.int64)
        rows, items = np.divmod(np.unique(rows * self.items + items), self.items)
        kept = items != self.targets_R[block][rows]
        return rows[kept], items[kept]


@dataclass(frozen=True)
class Ranks:
    """1 is best."""

    filtered_R: Ints
    unfiltered_R: Ints

    def choose(self, filter_history: bool) -> Ints:
        return self.filtered_R if filter_history else self.unfiltered_R


def rank_by_vectors(
    users_RD: Floats,
    items_ID: Floats,
    held_out: HeldOut,
    what: str = "model",
    block_users: int = BLOCK_USERS,
    block_items: int = BLOCK_ITEMS,
    advance: Callable[[int], None] = lambda rows: None,
) -> Ranks:
    """Ranks by dot product. Processes share the work, and all have the result.

    Raises:
        DataError: a vector is not finite or has no length, or the two tables do not fit the events.
    """
    users_RD, items_ID = (
        np.ascontiguousarray(users_RD, np.float32),
        np.ascontiguousarray(items_ID, np.float32),
    )
    if users_RD.shape != (len(held_out), items_ID.shape[1]) or len(items_ID) != held_out.items:
        raise DataError(
            f"{users_RD.shape} user vectors and {items_ID.shape} item vectors do not fit {len(held_out):,} "
            f"held-out events and {held_out.items:,} items",
            where=what,
        )
    longest_item = lengths(items_ID, f"{what}: item vectors").max(initial=0.0)
    margin_R = rounding(lengths(users_RD, f"{what}: user vectors"), float(longest_item), users_RD.shape[1])
    filtered, unfiltered = np.zeros(len(held_out), np.int64), np.zeros(len(held_out), np.int64)

    def rank(block: slice) -> int:
        users_BD, targets_B = users_RD[block], held_out.targets_R[block]
        scores_B = exact_scores(users_BD, items_ID, np.arange(len(targets_B)), targets_B)
        ahead_B = count_ahead(users_BD, items_ID, targets_B, scores_B, margin_R[block], block_items)
        rows, items = held_out.seen(block)
        seen_ahead = exact_scores(users_BD, items_ID, rows, items) >= scores_B[rows]
        unfiltered[block] = 1 + ahead_B
        filtered[block] = unfiltered[block] - np.bincount(rows[seen_ahead], minlength=len(targets_B))
        return len(targets_B)

    blocks = list(held_out.blocks(block_users))
    with workers() as pool:
        for ranked in pool.map(rank, blocks[place().rank :: place().size]):
            advance(ranked * place().size)
    return Ranks(total(filtered), total(unfiltered))


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as a product of matrices would take, each with products of its own: so that all of the
    work is shared and not the products alone."""
    found = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    pool = ThreadPoolExecutor(max(found, default=1))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # who is told to stop does not wait for what has not begun


def count_ahead(
    users_BD: Floats,
    items_ID: Floats,
    targets_B: Ints,
    scores_B: npt.NDArray[np.float64],
    margin_B: npt.NDArray[np.float64],
    block_items: int,
) -> Ints:
    """How many other items score at least as high as the target."""
    above_B1 = np.nextafter((scores_B + margin_B).astype(np.float32), np.float32(np.inf))[:, None]
    below_B1 = np.nextafter((scores_B - margin_B).astype(np.float32), np.float32(-np.inf))[:, None]
    ahead_B = np.zeros(len(targets_B), np.int64)
    for start in range(0, len(items_ID), block_items):
        scores_BI = users_BD @ items_ID[start : start + block_items].T
        surely_BI = scores_BI > above_B1
        surely_B = _count_rows(surely_BI)
        ahead_B += surely_B
        unsure = np.flatnonzero(_count_rows(scores_BI >= below_B1) != surely_B)  # few rows, in most blocks
        rows, items = np.nonzero((scores_BI[unsure] >= below_B1[unsure]) ^ surely_BI[unsure])
        rows, items = unsure[rows], items + start
        others = items != targets_B[rows]
        rows, items = rows[others], items[others]
        ahead = exact_scores(users_BD, items_ID, rows, items) >= scores_B[rows]
        ahead_B += np.bincount(rows[ahead], minlength=len(ahead_B))
    return ahead_B


def _count_rows(true_BI: npt.NDArray[np.bool_]) -> Ints:
    """How many are true in each row: numpy counts a row of bytes several times as fast as it sums an axis."""
    return np.fromiter(map(np.count_nonzero, true_BI), np.int64, len(true_BI))


def exact_scores(users_RD: Floats, items_ID: Floats, rows_P: Ints, items_P: Ints) -> npt.NDArray[np.float64]:
    """Dot products of pairs in float64, always summed in the same order: equal vectors get equal scores."""
    scores_P = np.empty(len(rows_P))
    for start in range(0, len(rows_P), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        scores_P[part] = (users_RD[rows_P[part]].astype(np.float64) * items_ID[items_P[part]]).sum(axis=1)
    return scores_P


def rounding(
    user_lengths_R: npt.NDArray[np.float64], longest_item: float, width: int
) -> npt.NDArray[np.float64]:
    """No float32 dot product of these vectors is further than this from the true one (doubled to be safe)."""
    return 2.0 * (width + 1) * HALF_ULP * user_lengths_R * longest_item + np.finfo(np.float32).tiny


def lengths(vectors: Floats, what: str) -> npt.NDArray[np.float64]:
    """Length of every row; a row without a finite, positive length would rank at random and is an error."""
    squares = np.empty(len(vectors))
    for start in range(0, len(vectors), PAIRS_AT_ONCE):
        part = vectors[start : start + PAIRS_AT_ONCE].astype(np.float64)
        squares[start : start + PAIRS_AT_ONCE] = (part * part).sum(axis=1)
    bad = ~((squares > 0) & (squares <= LONGEST**2))
    if bad.any():
        raise DataError(
            "vectors are zero, huge, infinite or NaN",
            where=what,
            count=(int(bad.sum()), len(vectors)),
            examples=[f"row {row}" for row in np.flatnonzero(bad)[:3]],
            remedy="Training diverged or the weights are damaged: look at the loss, train with a lower lr.",
        )
    return np.sqrt(squares)


def rank_by_popularity(counts_I: Ints, held_out: HeldOut) -> Ranks:
    """Most-popular: items with the most training events first, equal counts in catalogue order."""
    place_I = np.empty(len(counts_I), np.int64)
    place_I[np.argsort(-counts_I, kind="stable")] = np.arange(1, len(counts_I) + 1)
    unfiltered = place_I[held_out.targets_R]
    filtered = unfiltered.copy()
    for block in held_out.blocks(4096):
        rows, items = held_out.seen(block)
        ahead = place_I[items] < unfiltered[block][rows]
        filtered[block] -= np.bincount(rows[ahead], minlength=block.stop - block.start)
    return Ranks(filtered, unfiltered)


def training_counts(prepared: Prepared) -> Ints:
    """Training events of every item (I,), as the split counted them: a user's first event, which is never
    held out, is not among them when it happened in the validation or test period."""
    return prepared.item_table(["train_events"])["train_events"].to_numpy().astype(np.int64)
