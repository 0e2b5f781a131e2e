"""Times and IDs beside item vectors (Algorithm 1 of the HLLM paper)."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hllm.models.common.history import UNKNOWN_ITEM, UNKNOWN_TIME
from hllm.models.hllm.features import PARTS, SIZES, EventFeatures, TimeEmbedding, calendar

EARLIEST, LATEST = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (1, 2100))


@given(st.lists(st.integers(EARLIEST, LATEST - 1), min_size=1, max_size=20))
def test_parts_of_a_time_are_the_calendars(seconds: list[int]):
    found = calendar(np.array(seconds))
    for row, second in zip(found.tolist(), seconds, strict=True):
        moment = datetime.fromtimestamp(second, UTC)
        assert row == [getattr(moment, part) for part in PARTS]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_any_time_at_all_finds_its_row(seconds: list[int]):
    parts_TP = calendar(np.array(seconds))
    assert (parts_TP >= 0).all()
    assert (parts_TP < np.array(SIZES)).all()


def test_years_far_away_become_the_nearest_known():
    assert calendar(np.array([LATEST, -(10**15)]))[:, 0].tolist() == [2099, 0]


@pytest.mark.parametrize("part", range(1, 6))
def test_precision_decides_what_is_seen(part: int):
    torch.manual_seed(0)
    embedding = TimeEmbedding(PARTS[part], 4, 8)
    torch.nn.init.normal_(embedding.outer.weight)
    step = {"month": 31 * 86400, "day": 86400, "hour": 3600, "minute": 60, "second": 1}
    moment = int(datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC).timestamp())
    one, finer, coarser = embedding(np.array([moment, moment + 1, moment + step[PARTS[part]]]))
    assert torch.equal(one, finer) == (PARTS[part] != "second")
    assert not torch.equal(one, coarser)


def test_what_is_unknown_adds_nothing_and_what_is_known_learns():
    torch.manual_seed(0)
    features = EventFeatures(8, "day", 4, items=5)
    torch.nn.init.normal_(features.ids)
    torch.nn.init.normal_(features.time.outer.weight)
    items, times = [2, UNKNOWN_ITEM, 7, 4], [1_600_000_000, UNKNOWN_TIME, 1_600_086_400, UNKNOWN_TIME]
    time_TD, ids_TD = features(np.array(items), np.array(times))
    assert (time_TD.abs().sum(1) > 0).tolist() == [True, False, True, False]
    assert (ids_TD.abs().sum(1) > 0).tolist() == [True, False, False, True]
    (time_TD.sum() + ids_TD.sum()).backward()
    assert (features.ids.grad.abs().sum(1) > 0).tolist() == [False, False, True, False, True]
    assert all(table.weight.grad.abs().sum() > 0 for table in features.time.tables)
