from __future__ import annotations

import numpy as np
import pytest

from hllm.evaluation.ranking import HeldOut
from hllm.evaluation.segments import segments, split
from hllm.settings import Evaluation
from tests.evaluation.world import prepare


def test_items_and_users_are_counted_by_training_events_alone(tmp_path):
    # training events per item: 0 -> 3, 1 -> 1, 2 -> 0; item 2 occurs only where it is held out
    prepared = prepare(tmp_path, [[0, 0, 0, 1, 2, 0], [1, 2, 2]], items=3)
    limits = Evaluation(
        cold_item_events=0, long_tail_item_events=2, cold_user_events=1, long_tail_user_events=3
    )
    found = segments(prepared, HeldOut.of(prepared, "test"), limits)
    assert {name: chosen.tolist() for name, chosen in found.items()} == {
        "item:cold": [False, True],
        "item:long_tail": [False, False],
        "item:other": [True, False],
        "user:cold": [False, True],
        "user:long_tail": [False, False],
        "user:other": [True, False],
    }


@pytest.mark.parametrize(("cold", "long_tail"), [(0, 29), (5, 35), (3, 3), (5, 2), (0, 0)])
def test_every_event_is_in_exactly_one_segment_of_each_kind(cold, long_tail):
    parts = split("item", np.arange(100), cold, long_tail)
    assert (np.sum(list(parts.values()), axis=0) == 1).all()
    assert parts["item:cold"].sum() == cold + 1
