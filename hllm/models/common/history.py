"""What a user model reads: packed histories, each event with its item, its time, and the time of what came
next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hllm.models.common.packing import Packing

UNKNOWN_TIME = np.iinfo(np.int64).min
UNKNOWN_ITEM = -1

# T events of all histories one after another


@dataclass(frozen=True)
class History:
    """Events of packed histories, oldest first within each.

    `next_times_T` is the moment of the question that a position answers: when the next event happened, and at
    a history's last position when the recommendation is asked for.
    """

    packing: Packing
    items_T: npt.NDArray[np.int64]
    """Item indices; UNKNOWN_ITEM where the model's catalogue lacks the item."""
    times_T: npt.NDArray[np.int64]
    """Seconds UTC, or UNKNOWN_TIME."""
    next_times_T: npt.NDArray[np.int64]

    @classmethod
    def without_times(cls, packing: Packing, items_T: npt.NDArray[np.int64]) -> History:
        unknown_T = np.full(packing.tokens, UNKNOWN_TIME)
        return cls(packing, items_T, unknown_T, unknown_T)


def counted_back(packing: Packing, max_history: int) -> npt.NDArray[np.int64]:
    """(T,) position of each event, the latest of its history at `max_history` - 1."""
    if int(packing.lengths_S[-1]) > max_history:
        raise ValueError(
            f"a history of {packing.lengths_S[-1]} events, the model knows {max_history} positions"
        )
    lengths_T = packing.lengths_S[packing.sequence_T]
    return max_history - lengths_T + packing.positions_T
