from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hllm.ranker.refreshes import refreshes

DAY = 86_400


def test_a_refresh_for_every_day_with_events_and_none_for_the_others():
    times = np.array([-5, -1, 0, 10, DAY - 1, 5 * DAY, 7])  # three users: 2 + 4 + 1 events
    found = refreshes(np.array([0, 2, 6, 7]), times, since=0, every=DAY, lag=60)
    assert found.entities_S.tolist() == [0, 1, 1, 2]
    assert (found.as_of_S // DAY).tolist() == [0, 1, 6, 1]
    assert found.ends_S.tolist() == [2, 5, 6, 7]
    assert (found.available_S - found.as_of_S == 60).all()
    assert found.latest().tolist() == [0, 2, 3]


def test_everyone_has_a_first_refresh_even_without_events():
    found = refreshes(np.array([0, 0, 2]), np.array([-1, 3]), since=0, every=DAY, lag=0, everyone=True)
    assert found.entities_S.tolist() == [0, 1, 1]
    assert found.ends_S.tolist() == [0, 1, 2]


@given(
    events=st.lists(st.tuples(st.integers(0, 4), st.integers(-100, 400)), max_size=40),
    every=st.integers(1, 120),
    lag=st.integers(0, 50),
    everyone=st.booleans(),
)
def test_what_can_be_read_is_exactly_what_was_known_before_the_last_refresh(events, every, lag, everyone):
    """Against the definition, event by event."""
    events = sorted(events)
    times = np.array([time for _, time in events], np.int64)
    owner = np.array([user for user, _ in events], np.int64)
    offsets = np.searchsorted(owner, np.arange(6))
    found = refreshes(offsets, times, since=0, every=every, lag=lag, everyone=everyone)
    for user in range(5):
        mine = times[owner == user]
        for now in range(-20, 420, 37):
            last = (now - lag) // every * every  # the newest refresh that can be read
            known = int((mine < last).sum()) if last >= 0 else 0
            rows = np.flatnonzero((found.entities_S == user) & (found.available_S <= now))
            seen = int(found.ends_S[rows[-1]] - found.starts_S[rows[-1]]) if len(rows) else 0
            assert seen == known
