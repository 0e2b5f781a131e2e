from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hllm.data import cells


@given(st.lists(st.one_of(st.none(), st.integers(-(2**62), 2**62)), max_size=30))
def test_integer_times_mean_the_same_as_numbers_and_as_text(values: list[int | None]) -> None:
    as_text = pa.array([None if value is None else str(value) for value in values], pa.string())
    for unit in ("s", "ms", "us"):
        from_numbers, bad = cells.seconds(pa.array(values, pa.int64()), unit, "here")
        from_text, bad_text = cells.seconds(as_text, unit, "here")
        per_second = cells.PER_SECOND[unit]
        assert from_numbers.to_pylist() == [
            None if value is None else value // per_second for value in values
        ]
        assert from_text.to_pylist() == from_numbers.to_pylist()
        assert bad.null_count == bad_text.null_count == len(values)


def test_a_cell_that_is_no_time_keeps_its_text() -> None:
    cells_in = pa.array(
        ["881250949", "881250949.9", "8.81250949e8", "soon", "", None, "nan", "inf", "9" * 30]
    )
    times, raw = cells.seconds(cells_in, "s", "here")
    assert times.to_pylist() == [881250949, 881250949, 881250949, None, None, None, None, None, None]
    assert raw.to_pylist() == [None, None, None, "soon", None, None, None, "inf", "9" * 30]


def test_iso_times_are_utc_unless_they_name_a_zone() -> None:
    column = pa.array(["2024-03-01T00:00:00", "2024-03-01T09:00:00+09:00", "2024-03-01", "01/03/2024"])
    times, raw = cells.seconds(column, "iso", "here")
    midnight = int(datetime(2024, 3, 1, tzinfo=UTC).timestamp())
    assert times.to_pylist() == [midnight, midnight, midnight, None]
    assert raw.to_pylist() == [None, None, None, "01/03/2024"]


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("ms", "Asia/Tokyo")],
)
def test_typed_timestamps_need_no_unit(kind: pa.DataType) -> None:
    column = pa.array([1_600_000_000], pa.int64()).cast(pa.timestamp("s")).cast(pa.timestamp(kind.unit))
    typed = pa.array(column.cast(pa.int64()).to_pylist(), kind)
    assert cells.seconds(typed, "s", "here")[0].to_pylist() == [1_600_000_000]


def test_labels_are_read_from_numbers_texts_and_truth_values() -> None:
    values, raw = cells.labels(pa.array(["0", "1.0", "true", "", "maybe", "0.5", "7"]), "here")
    assert values.to_pylist() == [0, 1, 1, None, None, None, 7]
    assert raw.to_pylist() == [None, None, None, None, "maybe", "0.5", None]
    assert cells.labels(pa.array([True, False, None]), "here")[0].to_pylist() == [1, 0, None]


def test_a_list_of_texts_is_one_text() -> None:
    assert cells.texts(pa.array([["a", "b"], [], None]), "here").to_pylist() == ["a, b", "", None]
    assert cells.texts(pa.array([1995.0, None]), "here").to_pylist() == ["1995", None]


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        (pa.array([1_600_000_000_123, -1]), "ms", [(1_600_000_000, 123_000_000), (-1, 999_000_000)]),
        (pa.array(["1600000000123456789"]), "ns", [(1_600_000_000, 123_456_789)]),
        (pa.array(["1600000000.000000001", "1.5e9"]), "s", [(1_600_000_000, 1), (1_500_000_000, 0)]),
        (pa.array([1_600_000_000.25]), "s", [(1_600_000_000, 250_000_000)]),
        (pa.array(["2020-09-13T12:26:40.123456789Z"]), "iso", [(1_600_000_000, 123_456_789)]),
        (pa.array(["1969-12-31T23:59:59.25Z"]), "iso", [(-1, 250_000_000)]),
        (pa.array([1_600_000_000_123_456], pa.timestamp("us")), "s", [(1_600_000_000, 123_456_000)]),
    ],
)
def test_a_time_keeps_the_precision_of_its_source(values, unit, expected):
    whole, nanos, raw = cells.moments(values, unit, "here")
    assert list(zip(whole.to_pylist(), nanos.to_pylist(), strict=True)) == expected
    assert raw.null_count == len(values)
