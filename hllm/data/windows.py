"""Training windows: every user's events cut so that each event but the first is a target exactly once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def cut_windows(starts: Positions, ends: Positions, length: int) -> tuple[Positions, Positions]:
    """Windows (HLLM, tables 11 and 13: their length) [start, end) of each user's events [starts[u], ends[u]):
    user by user, oldest window first.

    A window holds at most `length` + 1 events: `length` inputs, and each of them predicts the next event.
    Neighbours overlap by one event, so the last target of a window is the first input of the next one and no
    event is lost between them. They are counted from a user's newest event backwards: the most recent window,
    the one most like serving, is full, and the remainder falls on the oldest. Users with fewer than two
    events have nothing to predict and give no window.
    """
    starts, ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    targets = np.maximum(ends - starts - 1, 0)
    counts = -(-targets // length)
    users = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    behind = np.repeat(counts, counts) - 1 - nth  # windows between this one and the user's newest
    window_ends = ends[users] - behind * length
    return np.maximum(starts[users], window_ends - length - 1), window_ends
