"""Neighbours as a family: nothing is trained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.models.common.neighbours import Scorer, rank_by_scores, scores_of_targets, sum_scorer
from hllm.models.common.ranking import HeldOut, Ranks
from hllm.settings import Settings


def scorer(settings: Settings, prepared: Prepared) -> Scorer:
    return sum_scorer(prepared)


def ranks(settings: Settings, prepared: Prepared, held_out: HeldOut) -> Ranks:
    return rank_by_scores(sum_scorer(prepared), held_out)


def scores(settings: Settings, prepared: Prepared, held_out: HeldOut) -> npt.NDArray[np.float64]:
    return scores_of_targets(sum_scorer(prepared), held_out)
