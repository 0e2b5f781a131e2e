from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm.data.windows import cut_windows


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 12), st.integers(0, 3))
def test_every_event_but_each_users_first_is_a_target_exactly_once(
    sizes: list[int], length: int, gap: int
) -> None:
    starts = np.cumsum([0] + [size + gap for size in sizes])[:-1]
    ends = starts + np.array(sizes, dtype=np.int64)
    window_starts, window_ends = cut_windows(starts, ends, length)

    targets = [
        event
        for start, end in zip(window_starts, window_ends, strict=True)
        for event in range(start + 1, end)
    ]
    expected = [event for start, end in zip(starts, ends, strict=True) for event in range(start + 1, end)]
    assert targets == expected


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 12))
def test_windows_stay_within_their_user_and_their_length(sizes: list[int], length: int) -> None:
    bounds = np.cumsum([0, *sizes])
    window_starts, window_ends = cut_windows(bounds[:-1], bounds[1:], length)
    widths = window_ends - window_starts
    assert ((widths >= 2) & (widths <= length + 1)).all()
    owner = np.searchsorted(bounds, window_starts, side="right") - 1
    assert (window_ends <= bounds[owner + 1]).all()


def test_the_newest_window_is_full_and_the_oldest_takes_the_remainder() -> None:
    starts, ends = cut_windows(np.array([100]), np.array([112]), 4)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(100, 104), (103, 108), (107, 112)]


@pytest.mark.parametrize("events", [0, 1])
def test_users_with_nothing_to_predict_give_no_window(events: int) -> None:
    starts, ends = cut_windows(np.array([5]), np.array([5 + events]), 10)
    assert len(starts) == len(ends) == 0


def test_no_user_at_all() -> None:
    starts, ends = cut_windows(np.array([], np.int64), np.array([], np.int64), 10)
    assert len(starts) == len(ends) == 0
