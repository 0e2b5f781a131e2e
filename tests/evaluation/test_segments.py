from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm.data.engine import duck
from hllm.data.histories import number_and_sort, write_events
from hllm.data.prepared import Prepared, write_arrays
from hllm.data.splits import write_splits
from hllm.evaluation.segments import segments, split
from hllm.models.common.ranking import HeldOut, training_counts
from hllm.settings import Evaluation, Prepare
from tests.evaluation.world import prepare, write_table


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


ITEMS, DAY = 4, 86_400
START = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp())


def split_by_time(folder, log):
    """The real split of (user, item, day): validation from day 4 on, the test from day 7 on."""
    catalogue = [f"i{item}" for item in range(ITEMS)]
    users, items, days = zip(*log, strict=True)
    write_table(folder / "catalogue.parquet", item_id=catalogue)
    write_table(
        folder / "log.parquet",
        user_id=[f"u{user}" for user in users],
        item_id=[f"i{item}" for item in items],
        timestamp=[START + day * DAY for day in days],
        nanos=[0] * len(days),
        label=[1] * len(log),
    )
    days_of = Prepare(split="temporal", valid_from="2020-01-05", test_from="2020-01-08")
    with duck.connect(folder, 1) as db:
        counts = number_and_sort(db, folder / "catalogue.parquet", folder / "log.parquet", 0)
        write_events(db, folder, counts["events"])
        held_out = write_splits(db, folder, days_of)
    write_arrays(folder, token_ids=np.zeros(ITEMS), token_offsets=np.arange(ITEMS + 1))
    write_table(folder / "items.parquet", item_id=catalogue, train_events=held_out.item_train_events)
    return Prepared.open(folder)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, ITEMS - 1), st.integers(0, 9)), min_size=1, max_size=30
    )
)
def test_nothing_of_the_validation_and_test_periods_counts_as_training(tmp_path_factory, log):
    log = [(9, 0, 3), (9, 1, 5), (9, 2, 8), *log]  # something is held out in both periods
    prepared = split_by_time(tmp_path_factory.mktemp("log"), log)
    past = [(user, item) for user, item, day in log if day < 4]
    of_item = [sum(item == other for _, other in past) for item in range(ITEMS)]
    assert training_counts(prepared).tolist() == of_item
    held_out = HeldOut.of(prepared, "test")
    user_ids = prepared.user_table(["user_id"])["user_id"].to_pylist()
    of_user = [sum(user_ids[user] == f"u{other}" for other, _ in past) for user in held_out.users_R]
    limits = Evaluation(
        cold_item_events=0, long_tail_item_events=2, cold_user_events=0, long_tail_user_events=2
    )
    found = segments(prepared, held_out, limits)
    assert found["user:cold"].tolist() == [count == 0 for count in of_user]
    assert found["item:cold"].tolist() == [of_item[target] == 0 for target in held_out.targets_R]
