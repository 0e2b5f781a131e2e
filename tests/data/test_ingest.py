"""What a source may look like, and what is refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from hllm.data.readers import source_fingerprints
from hllm.data.schema import conform, items_schema
from hllm.errors import ConfigError, DataError
from hllm.settings import Settings
from tests.world import TinySource, run_steps, tiny_settings, write_csv, write_items

TinySettings = Callable[..., Settings]
LOG = ["user_id", "item_id", "timestamp"]


@pytest.fixture
def two_items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "two.parquet", item_id=["a", "b"], title=["A", "B"])


def ingest(
    folder: Path, items: Path, interactions: Path, **sets: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both canonical tables."""
    settings = table_settings(folder, items, interactions, **sets)
    output = run_steps(settings, "ingest")
    return (
        parquet.read_table(output / "items.parquet").to_pylist(),
        parquet.read_table(output / "interactions.parquet").to_pylist(),
    )


def table_settings(folder: Path, items: Path, interactions: Path, **sets: Any) -> Settings:
    sets = {"data.columns": {"texts": ["title"]}} | sets
    return tiny_settings(folder, TinySource(items, interactions, [], []), **sets)


def test_the_log_arrives_whole_and_in_order(tiny_settings: TinySettings, tiny_source: TinySource) -> None:
    output = run_steps(tiny_settings(**{"data.batch_rows": 7}), "ingest")
    log = parquet.read_table(output / "interactions.parquet").to_pylist()
    assert [(row["user_id"], row["item_id"], row["timestamp"]) for row in log] == tiny_source.events
    items = parquet.read_table(output / "items.parquet")
    assert items.column("item_id").to_pylist() == tiny_source.item_ids
    assert items.schema.names == ["item_id", "title", "genre"]


def test_csv_and_parquet_give_the_same_tables(tmp_path: Path, two_items: Path) -> None:
    rows = [("u 1", "a", 1_600_000_000), ('say "hi"', "b", 1_600_000_001), ("two\nlines", "a", 1_600_000_001)]
    csv_log = write_csv(tmp_path / "log.csv", LOG, rows)
    users, items, times = zip(*rows, strict=True)
    parquet_log = write_items(tmp_path / "log.parquet", user_id=users, item_id=items, timestamp=times)
    csv_items = write_csv(tmp_path / "items.csv", ["item_id", "title"], [("a", "A"), ("b", "B")])
    assert ingest(tmp_path / "1", csv_items, csv_log) == ingest(tmp_path / "2", two_items, parquet_log)


def test_integer_ids_in_one_table_are_the_strings_of_the_other(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", item_id=[1, 2, 10], title=["A", "B", "C"])
    log = write_items(
        tmp_path / "log.parquet", user_id=["u", "u", "v"], item_id=[1.0, None, 10.0], timestamp=[1, 2, 3]
    )
    catalogue, events = ingest(tmp_path / "1", items, log)
    assert [row["item_id"] for row in catalogue] == ["1", "2", "10"]
    assert [row["item_id"] for row in events] == ["1", None, "10"]
    written_by_pandas = write_csv(
        tmp_path / "log.csv", LOG, [("u", "1.0", 1), ("u", "", 2), ("v", "10.0", 3)]
    )
    assert [row["item_id"] for row in ingest(tmp_path / "2", items, written_by_pandas)[1]] == [
        "1",
        None,
        "10",
    ]


def test_a_version_like_id_keeps_its_fraction(tmp_path: Path) -> None:
    items = write_csv(tmp_path / "items.csv", ["item_id", "title"], [("1.0", "A"), ("1.1", "B")])
    log = write_csv(tmp_path / "log.csv", LOG, [("u", "1.1", 1), ("u", "1.0", 2)])
    catalogue, events = ingest(tmp_path, items, log)
    assert [row["item_id"] for row in catalogue] == ["1.0", "1.1"]
    assert [row["item_id"] for row in events] == ["1.1", "1.0"]


def test_columns_are_mapped_by_the_settings(tmp_path: Path) -> None:
    items = write_items(
        tmp_path / "i.parquet", asin=["a"], name=["A"], tags=[["x", "y"]], born=["2020-01-01"]
    )
    log = write_csv(
        tmp_path / "l.csv", ["who", "what", "when", "bought", "kind"], [("u", "a", "2021-01-01", "1", "buy")]
    )
    columns = {"item_id": "asin", "texts": ["name", "tags"], "created_at": "born"}
    for_items = write_items(
        tmp_path / "i2.parquet", what=["a"], name=["A"], tags=[["x", "y"]], born=["2020-01-01"]
    )
    assert items.exists()
    columns = {
        "user_id": "who", "item_id": "what", "timestamp": "when", "label": "bought", "event": "kind",
        "texts": ["name", "tags"], "created_at": "born",
    }  # fmt: skip
    catalogue, events = ingest(
        tmp_path, for_items, log, **{"data.columns": columns, "data.timestamp_unit": "iso"}
    )
    assert catalogue == [
        {"item_id": "a", "name": "A", "tags": "x, y", "created_at": 1577836800, "created_at_raw": None}
    ]
    (event,) = events
    assert (event["timestamp"], event["label"], event["event"]) == (1609459200, 1, "buy")


def test_a_log_without_times_is_taken_in_order(tmp_path: Path, two_items: Path) -> None:
    log = write_csv(tmp_path / "log.csv", ["user_id", "item_id"], [("u", "a"), ("u", "b"), ("v", "a")])
    sets = {
        "data.columns": {"texts": ["title"], "timestamp": ""},
        "data.order_starts": 100,
        "data.batch_rows": 2,
    }
    assert [row["timestamp"] for row in ingest(tmp_path, two_items, log, **sets)[1]] == [100, 101, 102]


def test_movielens_from_the_installed_package(tmp_path: Path) -> None:
    settings = Settings.model_validate({"run": {"root": str(tmp_path)}, "data": {"source": "movielens"}})
    output = run_steps(settings, "ingest")
    items = parquet.read_table(output / "items.parquet")
    assert items.slice(0, 1).to_pylist() == [
        {"item_id": "1", "title": "Toy Story", "year": "1995", "genres": "Animation Children's Comedy"}
    ]
    log = parquet.read_table(output / "interactions.parquet")
    assert (items.num_rows, log.num_rows) == (1682, 100_000)
    first = log.slice(0, 1).to_pylist()[0]
    assert (first["user_id"], first["item_id"], first["timestamp"], first["label"]) == (
        "196",
        "242",
        881250949,
        0,
    )


def test_amazon_order_becomes_seconds(tmp_path: Path) -> None:
    source = tmp_path / "toys"
    source.mkdir()
    (source / "Toys.inter.json").write_text(json.dumps({"u": [3, 4], "v": [4]}))
    catalogue = {"3": {"title": "Bear", "categories": ["Toys", "Soft"]}, "4": {"title": "Ball", "brand": "B"}}
    (source / "Toys.item.json").write_text(json.dumps(catalogue))
    settings = Settings.model_validate(
        {"run": {"root": str(tmp_path / "runs")}, "data": {"source": "amazon", "path": str(source)}}
    )
    output = run_steps(settings, "ingest")
    log = parquet.read_table(output / "interactions.parquet", columns=LOG).to_pylist()
    assert [tuple(row.values()) for row in log] == [
        ("u", "3", 1_000_000_001),
        ("u", "4", 1_000_000_002),
        ("v", "4", 1_000_000_001),
    ]
    assert parquet.read_table(output / "items.parquet").to_pylist() == [
        {"item_id": "3", "title": "Bear", "categories": "Toys, Soft", "brand": None},
        {"item_id": "4", "title": "Ball", "categories": None, "brand": "B"},
    ]
    assert "order" in json.loads((output / "manifest.json").read_text())["facts"]["times"]


def amazon(folder: Path, log: str, items: str) -> Settings:
    source = folder / "toys"
    source.mkdir()
    (source / "Toys.inter.json").write_text(log)
    (source / "Toys.item.json").write_text(items)
    return Settings.model_validate(
        {"run": {"root": str(folder / "runs")}, "data": {"source": "amazon", "path": str(source)}}
    )


def test_amazon_keys_that_are_named_twice_lose_no_row(tmp_path: Path) -> None:
    log = '{"u": [3, 4], "v": [4], "u": [4, 3]}'
    items = '{"3": {"title": "Bear"}, "4": {"title": "Ball"}, "3": {"title": "Bear again"}}'
    settings = amazon(tmp_path, log, items)
    output = run_steps(settings, "ingest")
    events = parquet.read_table(output / "interactions.parquet", columns=LOG).to_pylist()
    assert [tuple(row.values()) for row in events] == [
        ("u", "3", 1_000_000_001),
        ("u", "4", 1_000_000_002),
        ("v", "4", 1_000_000_001),
        ("u", "4", 1_000_000_003),
        ("u", "3", 1_000_000_004),
    ]
    titles = parquet.read_table(output / "items.parquet").column("title").to_pylist()
    assert titles == ["Bear", "Ball", "Bear again"]
    with pytest.raises(
        DataError, match=r"items: 1 of 3 rows repeat the id of an earlier item \(e\.g\. '3'\)"
    ):
        run_steps(settings, "validate")


def test_an_amazon_catalogue_without_any_text(tmp_path: Path) -> None:
    settings = amazon(tmp_path, '{"u": [3, 4, 3]}', '{"3": {}, "4": {}}')
    run_steps(settings, "ingest")
    with pytest.raises(DataError, match=r"items: 2 of 2 rows have no text at all \(e\.g\. '3', '4'\)"):
        run_steps(settings, "validate")


def test_a_column_that_appears_later_is_not_dropped() -> None:
    later = pa.RecordBatch.from_pydict({"item_id": ["a"], "title": ["A"], "brand": ["B"]})
    with pytest.raises(DataError, match=r"columns that its beginning has not .*'brand'"):
        conform(later, items_schema(["item_id", "title"]))


# ---- refused, with a sentence ----


def test_a_missing_column_is_named_with_its_neighbours(tmp_path: Path, two_items: Path) -> None:
    log = write_csv(tmp_path / "log.csv", ["userid", "item_id", "timestamp"], [("u", "a", 1)])
    with pytest.raises(DataError) as error:
        ingest(tmp_path, two_items, log)
    assert "log.csv: has no column 'user_id'. Did you mean 'userid'" in error.value.first_line
    assert "Set data.columns.user_id" in str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_empty_file(tmp_path: Path, two_items: Path, suffix: str) -> None:
    log = tmp_path / f"log{suffix}"
    log.touch()
    with pytest.raises(DataError, match=r"log\.\w+: is an empty file"):
        ingest(tmp_path, two_items, log)


def test_a_header_without_rows(tmp_path: Path, two_items: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        ingest(tmp_path, two_items, write_csv(tmp_path / "log.csv", LOG, []))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95, 0.999])
def test_a_truncated_parquet_file(tmp_path: Path, two_items: Path, keep: float) -> None:
    n = 5_000
    log = write_items(
        tmp_path / "log.parquet", user_id=[str(i) for i in range(n)], item_id=["a"] * n, timestamp=range(n)
    )
    whole = log.read_bytes()
    log.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=r"log\.parquet: cannot be read as Parquet"):
        ingest(tmp_path, two_items, log)


def test_a_parquet_file_damaged_in_the_middle(tmp_path: Path, two_items: Path) -> None:
    n = 5_000
    log = tmp_path / "log.parquet"
    table = pa.table(
        {"user_id": [f"user {i * 7919 % n}" for i in range(n)], "item_id": ["a"] * n, "timestamp": range(n)}
    )
    parquet.write_table(table, log, compression="zstd", use_dictionary=False)
    content = bytearray(log.read_bytes())
    content[1000:3000] = b"\xff" * 2000
    log.write_bytes(content)
    with pytest.raises(DataError, match=r"log\.parquet: cannot be read as Parquet"):
        ingest(tmp_path, two_items, log)


def test_a_byte_that_is_not_utf8_is_found(tmp_path: Path, two_items: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(b"user_id,item_id,timestamp\nu,a,1\nJos\xe9,a,2\n")
    with pytest.raises(DataError, match="line 3 holds the byte 0xe9"):
        ingest(tmp_path, two_items, log)


def test_a_row_with_too_many_cells(tmp_path: Path, two_items: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\nu,a,1\nu,a,b,2\n")
    with pytest.raises(DataError, match=r"Row #3: Expected 3 columns, got 4"):
        ingest(tmp_path, two_items, log)


def test_a_quote_that_is_never_closed(tmp_path: Path, two_items: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text('user_id,item_id,timestamp\n"u,a,1\n' + "u,a,1\n" * 900_000)
    with pytest.raises(DataError, match=r"never closed|every quote closed"):
        ingest(tmp_path, two_items, log)


def test_a_column_of_dates_read_as_seconds(tmp_path: Path, two_items: Path) -> None:
    log = write_csv(tmp_path / "log.csv", LOG, [("u", "a", "2024-01-01"), ("u", "b", "2024-01-02")])
    with pytest.raises(DataError, match=r'set data\.timestamp_unit = "iso"'):
        ingest(tmp_path, two_items, log)


def test_a_column_of_an_impossible_type(tmp_path: Path, two_items: Path) -> None:
    log = write_items(tmp_path / "log.parquet", user_id=["u"], item_id=["a"], timestamp=[[1, 2]])
    with pytest.raises(DataError, match=r"log\.parquet, column timestamp: holds list.*not times"):
        ingest(tmp_path, two_items, log)


def test_a_column_named_twice(tmp_path: Path, two_items: Path) -> None:
    log = write_csv(tmp_path / "log.csv", [*LOG, "user_id"], [("u", "a", 1, "v")])
    with pytest.raises(DataError, match="2 columns named 'user_id'"):
        ingest(tmp_path, two_items, log)


@pytest.mark.parametrize(
    ("log", "items", "says"),
    [
        ("{", '{"3": {"title": "Bear"}}', "is not JSON"),
        ('{"u": 3}', '{"3": {}}', "not a JSON array"),
        ('{"u": [3]}', '{"3": "Bear"}', "not a JSON object"),
        ("[1]", '{"3": {"title": "Bear"}}', "not an object"),
        ('{"u": [3]}', '{"3": {"reason": "x"}}', "name of ours"),
        ('{"u": [3]}', '{"3": {"label_raw": "x"}}', "name of ours"),
        ('{"u": [3]}', '{"3": {"A": "x"}, "4": {"a": "y"}}', "only in case; rename them .*'A', 'a'"),
        ('{"u": [3]}', '{"3": {"": "x"}}', "a field without a name"),
        (
            '{"u": [3]}',
            '{"3": {"a": "x"}, "4": {"a": "y", "a": "z"}}',
            r"a field twice \(1 of 2\) \(e\.g\. '4'",
        ),
    ],
)
def test_amazon_files_of_another_shape(tmp_path: Path, log: str, items: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        run_steps(amazon(tmp_path, log, items), "ingest")


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ({"source": "table"}, ConfigError, "data.interactions is not set"),
        ({"source": "amazon"}, ConfigError, "data.path is not set"),
        ({"source": "movielens", "path": "/nowhere"}, DataError, "no such folder"),
        ({"source": "table", "interactions": "/nowhere.csv", "items": "/x.csv"}, DataError, "no such file"),
    ],
)
def test_a_source_that_is_not_there(data: dict[str, str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        source_fingerprints(Settings.model_validate({"data": data}).data)


def test_text_columns_may_not_take_our_names(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", item_id=["a"], Reason=["x"])
    log = write_csv(tmp_path / "log.csv", LOG, [("u", "a", 1)])
    with pytest.raises(ConfigError, match="name of ours"):
        ingest(tmp_path, items, log, **{"data.columns": {"texts": ["Reason"]}})
