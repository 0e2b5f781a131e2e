"""An id is one string, whatever type and notation a file stores it in, or it is refused."""

from __future__ import annotations

import json
import math
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hllm.data.ids import Lost, Spelling, ids, whole, without_fractions
from hllm.errors import DataError
from tests.world import TinySource, run_steps, tiny_settings, write_csv, write_items

BYTES = uuid.UUID("123e4567-e89b-12d3-a456-426614174000")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2, None], pa.int8()),
        pa.array([1, 2, None], pa.uint64()),
        pa.array([1.0, 2.0, None], pa.float16()),
        pa.array([1.0, 2.0, math.nan], pa.float32()),
        pa.array([1.0, 2.0, None]),
        pa.array([1.0, 2.0, None]).dictionary_encode(),
        pa.array([Decimal(1), Decimal(2), None], pa.decimal128(38, 0)),
        pa.array([Decimal("1.00"), Decimal("2.00"), None], pa.decimal128(10, 2)),
        pa.array([Decimal(1), Decimal(2), None], pa.decimal256(60, 0)),
        pa.array(["1", "2", None]),
        pa.array(["1", "2", None], pa.large_string()),
        pa.array(["1", "2", None], pa.string_view()),
        pa.array(["1", "2", None]).dictionary_encode(),
        pa.array([b"1", b"2", None]),
        pa.array([b"1", b"2", None], pa.large_binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_an_id_is_the_same_string_however_it_is_stored(column: pa.Array) -> None:
    assert ids(column, "here").to_pylist() == ["1", "2", None]


def test_large_ids_are_exact() -> None:
    number = 12345678901234567890123456789012345678
    assert ids(pa.array([Decimal(number)], pa.decimal128(38, 0)), "").to_pylist() == [str(number)]
    assert ids(pa.array([2**64 - 1], pa.uint64()), "").to_pylist() == [str(2**64 - 1)]
    assert ids(pa.array([BYTES.bytes], pa.uuid()), "").to_pylist() == [str(BYTES)]
    assert ids(pa.array([float(2**53 - 1)]), "").to_pylist() == [str(2**53 - 1)]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([2.0**11, 1.0], pa.float16()), r"2\^11"),
        (pa.array([2.0**24, 1.0], pa.float32()), r"float numbers beyond 2\^24.*\(e\.g\. '16777216'\)"),
        (pa.array([2.0**60, 1.0]), r"2\^53"),
        (pa.array([math.inf]), r"2\^53"),
        (pa.array([1.5]), "with a fraction"),
        (pa.array([Decimal("1.50")]), "with a fraction"),
        (pa.array([True]), "holds bool, not ids"),
        (pa.array([[1], [2]]), "holds list.*not ids"),
        (pa.array([{"a": 1}]), "holds struct.*not ids"),
        (pa.array([0], pa.timestamp("us")), "holds timestamp.*not ids"),
        (pa.array([0], pa.date32()), "holds date.*not ids"),
        (pa.array([BYTES.bytes], pa.binary(16)), r"fixed_size_binary[\s\S]*CAST\(id AS VARCHAR\)"),
        (pa.array([b"\xff"]), r"not UTF-8"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_that_are_none_or_lost_digits_are_refused_by_name(column: pa.Array, says: str) -> None:
    with pytest.raises(DataError, match=f"log.parquet, column user: .*{says}"):
        ids(column, "log.parquet, column user")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *[(text, "17") for text in ("17", "17.0", "17.", "17.000", "1.7e1", "1.7E+01", "170e-1")],
        *[("1e5", "100000"), ("1.0E7", "10000000"), ("1.23456789E8", "123456789"), ("-0.0", "0")],
        *[(text, ValueError) for text in ("007", "+5", "0x1F", "1.5", " 5", "5 ", "1_0", "", "nan", "1e-3")],
        *[(text, Lost) for text in ("1.5e+18", "9007199254740992.0", "1e16", "1.23457E+11", "-1e300")],
        ("12345678901234567", "12345678901234567"),
    ],
)
def test_a_number_is_whole_in_every_notation(text: str, found: str | type[ValueError]) -> None:
    if isinstance(found, str):
        assert whole(text) == found
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$") as error:
            whole(text)
        assert type(error.value) is found


@pytest.mark.parametrize("batches", [[["1", "2"], ["3.0", "nan"]], [["3.0"], ["1", "", "1e0"]]])
def test_the_verdict_is_that_of_all_batches(batches: list[list[str]]) -> None:
    spelling = Spelling("user")
    for batch in batches:
        spelling.look(pa.array(batch), Path("log"), "user_id")
    assert spelling.are_numbers
    spelling.look(pa.array(["abc"]), Path("log"), "user_id")
    assert not spelling.are_numbers
    assert without_fractions(pa.array(["1.0", "2", "1e5", "nan", None])).to_pylist() == [
        *("1", "2", "100000", "nan", None),
    ]


def events(folder: Path, users: list[Any], kind: str, batch_rows: int = 2) -> list[str]:
    """The users of a log in which each has one event, from a file of one kind."""
    folder.mkdir(exist_ok=True)
    times = range(1_600_000_000, 1_600_000_000 + len(users))
    items = write_csv(folder / "items.csv", ["item_id", "title"], [("i", "A")])
    log = folder / f"log.{kind}"
    if kind == "csv":
        write_csv(
            log, ["user_id", "item_id", "timestamp"], zip(users, ["i"] * len(users), times, strict=True)
        )
    elif kind == "parquet":
        write_items(log, user_id=users, item_id=["i"] * len(users), timestamp=times)
    else:
        rows = [
            {"user_id": user, "item_id": "i", "timestamp": time}
            for user, time in zip(users, times, strict=True)
        ]
        log.write_text("\n".join(map(json.dumps, rows)))
    sets = {"data.columns": {"texts": ["title"]}, "data.batch_rows": batch_rows}
    output = run_steps(tiny_settings(folder, TinySource(items, log, [], []), **sets), "ingest")
    found = parquet.read_table(output / "interactions.parquet").column("user_id").to_pylist()
    return [str(user) for user in found]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_number_is_the_same_id_in_every_format(tmp_path: Path, kind: str) -> None:
    assert events(tmp_path / "a", [1.0, 2.0, 100000.0], kind) == ["1", "2", "100000"]
    assert events(tmp_path / "b", [1, 2, 12345678901234567], kind) == ["1", "2", "12345678901234567"]
    assert events(tmp_path / "c", ["007", "7", "+5"], kind) == ["007", "7", "+5"]
    with pytest.raises(DataError, match="may be lost"):
        events(tmp_path / "d", [1.0, 1.5e18], kind)


@pytest.mark.parametrize("users", [["1", "2", "3", "1.0"], ["1.0", "2.0", "3.0", "1"]])
def test_ids_that_become_floats_midway_are_one_user(tmp_path: Path, users: list[str]) -> None:
    assert events(tmp_path, users, "csv") == [*("1", "2", "3", "1")]


def test_a_number_written_in_two_ways_among_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 user ids are written in two ways.*'1' and '1\.0'"):
        events(tmp_path / "a", ["guest", "1", "2.0", "1.0"], "csv")
    assert events(tmp_path / "b", ["guest", "1", "2.0", "3.0"], "csv") == ["guest", "1", "2.0", "3.0"]


def test_item_ids_of_both_tables_get_one_verdict(tmp_path: Path) -> None:
    """A log that happens to name "1.0" only does not lose it where the catalogue has versions."""
    items = write_csv(tmp_path / "items.csv", ["item_id", "title"], [("1.0", "A"), ("1.1", "B")])
    log = write_csv(tmp_path / "log.csv", ["user_id", "item_id", "timestamp"], [("u", "1.0", 1)])
    settings = tiny_settings(
        tmp_path, TinySource(items, log, [], []), **{"data.columns": {"texts": ["title"]}}
    )
    output = run_steps(settings, "ingest")
    assert parquet.read_table(output / "interactions.parquet").column("item_id").to_pylist() == ["1.0"]
