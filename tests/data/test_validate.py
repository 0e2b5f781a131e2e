"""Bad rows go to quarantine with their reason; no row is lost; too many of them stop the pipeline."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hllm.data.cells import PER_SECOND
from hllm.data.expectations import Docs
from hllm.data.prepared import Prepared
from hllm.data.validate import validate as run_validate
from hllm.errors import DataError
from hllm.pipeline import keys, steps
from hllm.settings import Settings
from hllm.work.artifacts import Store
from hllm.work.step import Context
from tests.world import TinySource, run_steps, tiny_settings, write_csv, write_items

TinySettings = Callable[..., Settings]
NOW = int(time.time())
LOG = ["user_id", "item_id", "timestamp", "label"]
LENIENT = {
    f"validation.{name}": 1.0
    for name in ("max_quarantined", "max_unknown_items", "max_duplicates", "max_empty_texts")
}
COLUMNS = {"data.columns": {"texts": ["title", "brand"], "label": "label"}}


def validate(folder: Path, items: list[tuple[Any, ...]], events: list[tuple[Any, ...]], **sets: Any) -> Path:
    """The output of `validate` on a catalogue of (id, title, brand) and a log of LOG, both written as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    source = TinySource(
        write_csv(folder / "items.csv", ["item_id", "title", "brand"], items),
        write_csv(folder / "log.csv", LOG, events),
        [],
        [],
    )
    return run_steps(tiny_settings(folder, source, **(COLUMNS | LENIENT | sets)), "ingest", "validate")


def quarantined(output: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: parquet.read_table(path).to_pylist() for path in (output / "quarantine").glob("*.parquet")
    }


def rows(output: Path, table: str) -> list[dict[str, Any]]:
    return parquet.read_table(output / f"{table}.parquet").to_pylist()


ITEMS = [
    ("a", "Axe", ""),
    ("b", "", "Brand only"),
    ("🎬", "Film", ""),
    ('q"u o\nte', "Quote", ""),
    ("", "No id", ""),
    ("nan", "No id either", ""),
    ("empty", "", ""),
    ("blank", "  \u200b\t\u00a0 ", ""),
    ("long", "x" * 100_000, ""),
    ("a", "Axe again", ""),
]
EVENTS = [
    ("u", "a", 1_600_000_000, 1),
    ("u", "🎬", 1_600_000_000, 0),
    ("u v", 'q"u o\nte', 1_600_000_005, ""),
    ("", "a", 1_600_000_001, 1),
    ("u", "", 1_600_000_001, 1),
    ("u", "a", "soon", 1),
    ("u", "a", "", 1),
    ("u", "a", -5, 1),
    ("u", "a", 1_600_000_000_000, 1),
    ("u", "a", NOW + 86_400, 1),
    ("u", "b", 1_600_000_002, 2),
    ("u", "b", 1_600_000_002, "yes"),
    ("u", "nowhere", 1_600_000_003, 1),
    ("u", "long", 1_600_000_004, 1),
    ("u", "a", 1_600_000_000, 1),
    ("nan", "nowhere", -1, 9),
]


@pytest.fixture(scope="module")
def everything_wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return validate(tmp_path_factory.mktemp("wrong"), ITEMS, EVENTS)


def test_every_bad_row_is_in_quarantine_under_its_reason(everything_wrong: Path) -> None:
    found = quarantined(everything_wrong)
    events = {name: len(found[name]) for name in found if name.startswith("interactions")}
    assert events == {
        "interactions_missing_user_id": 2,
        "interactions_missing_item_id": 1,
        "interactions_unreadable_timestamp": 2,
        "interactions_early_timestamp": 1,
        "interactions_future_timestamp": 2,
        "interactions_bad_label": 2,
        "interactions_unknown_item": 1,
        "interactions_quarantined_item": 1,
        "interactions_duplicate_event": 1,
    }
    assert {name: [row["item_id"] for row in found[name]] for name in found if name.startswith("items")} == {
        "items_missing_item_id": [None, "nan"],
        "items_empty_text": ["empty", "blank"],
        "items_long_text": ["long"],
        "items_duplicate_item": ["a"],
    }
    assert found["items_duplicate_item"][0]["title"] == "Axe again"
    assert {row["reason"] for row in found["interactions_bad_label"]} == {"bad_label"}


def test_what_stood_in_an_unreadable_cell_is_kept(everything_wrong: Path) -> None:
    found = quarantined(everything_wrong)
    assert [row["timestamp_raw"] for row in found["interactions_unreadable_timestamp"]] == ["soon", None]
    assert [(row["label"], row["label_raw"]) for row in found["interactions_bad_label"]] == [
        (2, None),
        (None, "yes"),
    ]


def test_good_rows_stay_as_they_are_and_in_order(everything_wrong: Path) -> None:
    assert [row["item_id"] for row in rows(everything_wrong, "items")] == ["a", "b", "🎬", 'q"u o\nte']
    names = ("user_id", "item_id", "timestamp", "label")
    log = [tuple(row[name] for name in names) for row in rows(everything_wrong, "interactions")]
    assert log == [
        ("u", "a", 1_600_000_000, 1),
        ("u", "🎬", 1_600_000_000, 0),
        ("u v", 'q"u o\nte', 1_600_000_005, None),
    ]


def test_the_report_counts_what_great_expectations_found(everything_wrong: Path) -> None:
    report = {
        (entry["table"], entry["name"]): entry
        for entry in json.loads((everything_wrong / "validation.json").read_text())
    }
    entry = report["interactions", "missing_user_id"]
    assert (entry["failed"], entry["total"], entry["passed"], entry["examples"]) == (
        2,
        16,
        True,
        ["row 4", "row 16"],
    )
    # The last event breaks five rules: each expectation counts it, one quarantine file holds it.
    assert report["interactions", "early_timestamp"]["failed"] == 2
    assert report["interactions", "early_timestamp"]["quarantined"] == 1
    assert report["items", "empty_text"]["examples"] == ["empty", "blank"]
    assert (everything_wrong / "data_docs" / "index.html").exists()


cell = st.sampled_from(
    ["", "a", "b", "c", "nan", "0", "1", "-1", "soon", "1600000000", "1600000000000", "🎬", " "]
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=12),
    events=st.lists(st.tuples(cell, cell, cell, cell), min_size=1, max_size=25),
)
def test_no_row_is_lost(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, ...]], events: list[tuple[str, ...]]
) -> None:
    events = [("u", "a", "1600000000", ""), *events]  # a log without any time at all is refused earlier
    items = [("a", "Axe", ""), *items]
    output = validate(tmp_path_factory.mktemp("any"), items, events)
    found = quarantined(output)
    for table, sent in (("items", items), ("interactions", events)):
        away = {
            name: count
            for name, count in ((name, len(rows)) for name, rows in found.items())
            if name.startswith(table)
        }
        assert len(rows(output, table)) + sum(away.values()) == len(sent)
        report = [
            entry
            for entry in json.loads((output / "validation.json").read_text())
            if entry["table"] == table and "failed" in entry
        ]
        assert {
            f"{table}_{entry['name']}": entry["quarantined"] for entry in report if entry["quarantined"]
        } == away
        assert all(entry["quarantined"] <= entry["failed"] for entry in report)
    known = {row["item_id"] for row in rows(output, "items")}
    assert {row["item_id"] for row in rows(output, "interactions")} <= known


# ---- limits ----


def good(count: int, **more: Any) -> list[tuple[Any, ...]]:
    return [
        (f"u{n % 10}", "a", more.get("start", 1_600_000_000) + n * more.get("unit", 1), 1)
        for n in range(count)
    ]


def test_too_many_unknown_items_stop_the_step_with_numbers_and_examples(tmp_path: Path) -> None:
    events = good(95) + [("u", f"x{n}", 1_600_000_000 + n, 1) for n in range(5)]
    with pytest.raises(DataError) as error:
        validate(tmp_path, [("a", "Axe", "")], events, **{"validation.max_unknown_items": 0.001})
    message = str(error.value)
    assert error.value.first_line == (
        "interactions: 5 of 100 rows name an item that the catalogue lacks (e.g. 'x0', 'x1', 'x2')"
    )
    assert "quarantine/interactions_unknown_item.parquet" in message
    assert "The limit is 0.1 % (validation.max_unknown_items)." in message
    (file,) = tmp_path.glob("runs/validate/*/quarantine/interactions_unknown_item.parquet")
    assert parquet.read_table(file).num_rows == 5
    assert not list(tmp_path.glob("runs/validate/*/manifest.json"))


@pytest.mark.parametrize(
    ("factor", "name", "unit"), [(1000, "milliseconds", "ms"), (10**6, "microseconds", "us")]
)
def test_times_in_a_smaller_unit_are_recognised(tmp_path: Path, factor: int, name: str, unit: str) -> None:
    events = good(50, start=1_600_000_000 * factor, unit=factor)
    with pytest.raises(DataError, match=f'These look like {name}: set data.timestamp_unit = "{unit}"'):
        validate(tmp_path, [("a", "Axe", "")], events, **{"validation.max_quarantined": 0.01})
    output = validate(tmp_path / "told", [("a", "Axe", "")], events, **{"data.timestamp_unit": unit})
    assert rows(output, "interactions")[0]["timestamp"] == 1_600_000_000


def test_half_a_log_is_worse_than_none(tmp_path: Path) -> None:
    validate(tmp_path, [("a", "Axe", "")], good(100))
    with pytest.raises(DataError, match=r"40 rows, only 40 % of the previous run's 100"):
        validate(tmp_path, [("a", "Axe", "")], good(100)[60:])
    validate(tmp_path, [("a", "Axe", "")], good(100)[60:], **{"run.name": "another"})
    validate(tmp_path, [("a", "Axe", "")], good(100)[40:])


def test_a_stale_log_fails_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the newest event is [\d.]+ days old"):
        validate(tmp_path, [("a", "Axe", "")], good(10), **{"validation.max_days_stale": 7})
    fresh = good(10, start=NOW - 3600)
    validate(tmp_path / "fresh", [("a", "Axe", "")], fresh, **{"validation.max_days_stale": 7})


def test_a_log_that_goes_back_in_time_fails_however_old_it_is(tmp_path: Path) -> None:
    items = [("a", "Axe", "")]
    validate(tmp_path, items, good(10))
    validate(tmp_path, [*items, ("b", "Bell", "")], good(10))  # the same newest event is not older
    with pytest.raises(DataError) as error:
        validate(tmp_path, items, good(9))
    assert error.value.first_line == (
        "interactions: the newest event (2020-09-13 12:26:48 UTC) is older than the previous run's "
        "(2020-09-13 12:26:49 UTC)"
    )
    assert "validation.max_days_behind_previous" in str(error.value)
    validate(tmp_path, items, good(9), **{"validation.max_days_behind_previous": 1})


def test_an_order_that_stands_in_for_times_cannot_go_back(tmp_path: Path) -> None:
    columns = {"data.columns": {"texts": ["title", "brand"], "timestamp": ""}}
    validate(tmp_path, [("a", "Axe", "")], good(10), **columns)
    validate(tmp_path, [("a", "Axe", "")], good(9), **columns)


def test_checks_of_the_whole_log_say_their_value_and_unit(tmp_path: Path) -> None:
    validate(tmp_path, [("a", "Axe", "")], good(100))
    sets = {"validation.max_days_stale": 36_500}
    output = validate(tmp_path, [("a", "Axe", "")], good(100), **sets)
    report = {entry["name"]: entry for entry in json.loads((output / "validation.json").read_text())}
    found = {
        name: tuple(report[name][key] for key in ("unit", "least", "most"))
        for name in ("some_rows", "volume", "freshness", "newer_than_previous")
    }
    assert found == {
        "some_rows": ("rows", 1, None),
        "volume": ("% of the previous run's rows", 50.0, None),
        "freshness": ("days old", None, 36_500),
        "newer_than_previous": ("days behind the previous run", None, 0.0),
    }
    assert (report["some_rows"]["value"], report["volume"]["value"]) == (100, 100.0)
    assert 365 < report["freshness"]["value"] < 36_500
    assert report["newer_than_previous"]["value"] == 0


@pytest.mark.parametrize(
    ("table", "change", "says"),
    [
        ("interactions", lambda t: t.drop_columns(["label"]), "label is missing"),
        (
            "interactions",
            lambda t: t.set_column(2, "timestamp", t["timestamp"].cast("double")),
            "timestamp is double, not int64",
        ),
        ("interactions", lambda t: t.append_column("more", t["user_id"]), "more is not ours"),
        ("items", lambda t: t.drop_columns(["item_id"]), "item_id is missing"),
        ("items", lambda t: t.drop_columns(["brand"]), "brand is missing"),
        (
            "items",
            lambda t: t.set_column(1, "title", pa.array([1] * t.num_rows)),
            "title is int64, not string",
        ),
    ],
)
def test_columns_that_ingest_would_not_write_are_named(
    tmp_path: Path, table: str, change: Callable[[pa.Table], pa.Table], says: str
) -> None:
    items = write_csv(tmp_path / "i.csv", ["item_id", "title", "brand"], [("a", "Axe", "")])
    log = write_csv(tmp_path / "l.csv", LOG, good(3))
    settings = tiny_settings_for(tmp_path, items, log, **COLUMNS)
    file = run_steps(settings, "ingest") / f"{table}.parquet"
    changed = change(parquet.read_table(file))
    parquet.write_table(changed, file)
    context = context_of(settings, "validate")
    with pytest.raises(DataError) as error:
        run_validate(context)
    assert f"{table} has columns that are missing or of the wrong type (e.g. '{says}')" in str(error.value)
    assert (context.output / "data_docs" / "index.html").exists()


def test_nothing_valid_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row of the log is valid"):
        validate(tmp_path, [("b", "Bell", "")], good(3))


def test_the_tiny_world_is_valid_through_and_through(
    tiny_settings: TinySettings, tiny_source: TinySource
) -> None:
    output = run_steps(tiny_settings(), "ingest", "validate")
    assert not quarantined(output)
    assert len(rows(output, "interactions")) == len(tiny_source.events)


def test_ids_join_whatever_their_type(tmp_path: Path) -> None:
    items = write_items(tmp_path / "i.parquet", item_id=[1, 2, 3], title=["A", "B", "C"])
    log = write_items(
        tmp_path / "l.parquet",
        user_id=["u"] * 3,
        item_id=["1", "2", "3"],
        timestamp=[1_600_000_000 + n for n in range(3)],
    )
    sets = {"data.columns": {"texts": ["title"]}}
    output = run_steps(tiny_settings_for(tmp_path, items, log, **sets), "ingest", "validate", "prepare")
    assert Prepared.open(output).event_items.tolist() == [0, 1, 2]


def context_of(settings: Settings, name: str) -> Context:
    """A step's context over inputs that were changed after they were finished."""
    step, found, store = steps(settings)[name], keys(settings), Store(settings.run.root)
    inputs = {need: store.folder(need, found[need]) for need in step.needs}
    output = store.folder(name, found[name])
    output.mkdir(parents=True)
    return Context(settings, step, found[name], inputs, output, store)


def tiny_settings_for(folder: Path, items: Path, log: Path, **sets: Any) -> Settings:
    return tiny_settings(folder, TinySource(items, log, [], []), **sets)


def test_ids_that_no_store_takes_are_found_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = "x" * 1001
    items = [
        ("a", "Axe", ""),
        ("n\0l", "Bell", ""),
        (long, "Cup", ""),
        ("d", "D\0sh", ""),
        ("e\x1b[2J", "E", ""),
    ]
    kept = [
        ("u", "a", 1_600_000_000, 1),
        ("two\nlines", "a", 1_600_000_000, 1),
        ("é" * 500, "a", 1_600_000_000, 1),
    ]
    events = [
        *kept,
        ("n\0l", "a", 1_600_000_001, 1),
        (long, "a", 1_600_000_001, 1),
        ("é" * 501, "a", 1_600_000_001, 1),
        ("u", "n\0l", 1_600_000_001, 1),
        ("u", "d", 1_600_000_001, 1),
    ]
    output = validate(tmp_path, items, events)
    assert {name: len(found) for name, found in quarantined(output).items()} == {
        "items_unfit_item_id": 3,
        "interactions_unfit_user_id": 3,
        "interactions_unfit_item_id": 1,
    }
    assert [row["user_id"] for row in rows(output, "interactions")] == [*(user for user, *_ in kept), "u"]
    said = capfd.readouterr().out
    assert "validate: items: 5 rows = 2 valid + 3 in quarantine" in said
    assert "validate: interactions: 8 rows = 4 valid + 4 in quarantine" in said


def table(folder: Path, log: list[int], created: list[int], **sets: Any) -> Settings:
    """Settings of three items with creation times and a log with these times."""
    folder.mkdir()
    items = write_items(
        folder / "items.parquet", item_id=["a", "b", "c"], title=["A", "B", "C"], created_at=created
    )
    events = [("u", item, time) for item, time in zip("abc", log, strict=True)]
    source = TinySource(items, write_csv(folder / "log.csv", LOG[:3], events), [], [])
    columns = {"data.columns": {"texts": ["title"], "created_at": "created_at"}}
    return tiny_settings(folder, source, **(columns | sets))


SECONDS = [1_600_000_000, 1_600_000_100, 1_600_000_200]


@pytest.mark.parametrize(
    ("unit", "actual"), [(unit, actual) for unit in PER_SECOND for actual in PER_SECOND if unit != actual]
)
def test_creation_times_have_a_unit_of_their_own_and_absurd_ones_name_it(
    tmp_path: Path, unit: str, actual: str
) -> None:
    log = [time * PER_SECOND[unit] for time in SECONDS]
    created = [time * PER_SECOND[actual] for time in SECONDS]
    settings = table(tmp_path / "1", log, created, **{"data.timestamp_unit": unit})
    says = rf'column created_at: most .* absurd \(3 of 3\)[\s\S]*set data.created_at_unit = "{actual}"'
    with pytest.raises(DataError, match=says):
        run_steps(settings, "ingest", "validate")
    followed = {"data.timestamp_unit": unit, "data.created_at_unit": actual}
    output = run_steps(table(tmp_path / "2", log, created, **followed), "ingest")
    assert parquet.read_table(output / "items.parquet")["created_at"].to_pylist() == SECONDS


def test_a_catalogue_of_old_books_is_no_mistake(tmp_path: Path) -> None:
    born = [-3_786_825_600, -3_155_673_600, -2_208_988_800]  # 1850, 1870, 1900
    settings = table(tmp_path / "1", SECONDS, born)
    validate_of = run_steps(settings, "ingest", "validate")
    assert parquet.read_table(validate_of / "items.parquet")["created_at"].to_pylist() == born


@pytest.mark.parametrize(
    ("unit", "actual"), [("s", "ns"), ("s", "us"), ("s", "ms"), ("ms", "s"), ("us", "ns"), ("ns", "ms")]
)
def test_the_unit_that_fits_the_log_is_named(tmp_path: Path, unit: str, actual: str) -> None:
    log = [time * PER_SECOND[actual] for time in SECONDS]
    sets = {"data.timestamp_unit": unit, "data.created_at_unit": "s"}
    with pytest.raises(DataError, match=f'set data.timestamp_unit = "{actual}"'):
        run_steps(table(tmp_path / "1", log, SECONDS, **sets), "ingest", "validate")


class Elements(HTMLParser):
    """Names of elements and of attributes that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.found.update(name for name, _ in attrs if name.startswith("on"))
        self.found.update("address" for _, value in attrs if value and "pwned" in value)


def elements(folder: Path) -> Counter[str]:
    parser = Elements()
    for page in folder.rglob("*.html"):
        parser.feed(page.read_text("utf-8"))
    return Counter({name: parser.found[name] for name in ("address", *RUN) if parser.found[name]})


RUN = ("script", "iframe", "img", "svg", "onerror", "onclick", "onload", "onmouseover", "form")
HARMFUL = (
    "<script>pwned()</script>",
    '"><img src=x onerror=pwned()>',
    "' onmouseover='pwned()",
    "</script><svg onload=pwned()>",
    "$column",
    "${column}",
    "&lt;b&gt;",
    "a\nb",
)


@pytest.mark.parametrize("broken", [False, True], ids=["columns as promised", "columns of another type"])
def test_names_of_columns_are_only_text_in_the_data_docs(tmp_path: Path, broken: bool) -> None:
    pages = {}
    for name, fields in {"plain": [f"field{n}" for n in range(len(HARMFUL))], "harmful": HARMFUL}.items():
        found = pa.schema([(field, pa.int64() if broken else pa.string()) for field in ("item_id", *fields)])
        expected = pa.schema([(field, pa.string()) for field in ("item_id", *fields)])
        docs = Docs(tmp_path / name)
        wrong = docs.check_columns("items", found, expected)
        assert wrong == ([f"{field} is int64, not string" for field in expected.names] if broken else [])
        docs.build()
        pages[name] = elements(tmp_path / name)
    assert pages["plain"] == pages["harmful"]
    assert pages["plain"]
