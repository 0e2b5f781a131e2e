"""Most-popular as a family: nothing is trained, training events are counted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.models.common.ranking import HeldOut, Ranks, rank_by_popularity, training_counts
from hllm.settings import Settings


def ranks(settings: Settings, prepared: Prepared, held_out: HeldOut) -> Ranks:
    return rank_by_popularity(training_counts(prepared), held_out)


def scores(settings: Settings, prepared: Prepared, held_out: HeldOut) -> npt.NDArray[np.float64]:
    """(R,) how popular each event's item is."""
    return training_counts(prepared)[held_out.targets_R].astype(np.float64)
