"""Prepared data and models small enough to train in a blink."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hllm.data.prepared import Prepared, write_arrays
from hllm.models.items import IdItems
from hllm.models.recommender import Recommender
from hllm.models.users import SASRecUser


def prepared_of(folder: Path, lengths: list[int], items: int, seed: int = 0) -> Prepared:
    """Users with histories of the given lengths; the last two events of those with three or more are held
    out."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    held = np.array(lengths) >= 3
    write_arrays(
        folder,
        event_items=rng.integers(0, items, offsets[-1]),
        event_times=np.arange(offsets[-1]),
        event_labels=np.full(offsets[-1], -1),
        user_offsets=offsets,
        train_ends=offsets[1:] - 2 * held,
        valid_ends=offsets[1:] - 1 * held,
        token_ids=rng.integers(0, 256, items * 4),
        token_offsets=np.arange(items + 1) * 4,
    )
    return Prepared.open(folder)


def tiny_model(items: int, dropout: float = 0.3) -> Recommender:
    torch.manual_seed(3)
    return Recommender(IdItems(items, 16), SASRecUser(16, 1, 2, dropout, 20), 0.07)
