"""Great Expectations over the marked tables: part by part, so that a log of any length fits in memory."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from hllm.data.schema import Rule
from hllm.data.tables import open_parquet
from hllm.settings import Validation

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 500_000
"""Rows that become one pandas frame, one validation result and one page of the Data Docs."""


def harmless(name: str) -> str:
    """A name from the data as the Data Docs may show it: their pages take it for HTML, and `$` for a
    template's mark. Different names stay different."""
    return html.escape(name).replace("$", "&#36;")


@dataclass
class Check:
    """An expectation about the log as a whole: a value in its unit, between `least` and `most`."""

    name: str
    column: str
    value: float
    unit: str
    least: float | None
    most: float | None
    setting: str
    says: str
    remedy: str = ""
    passed: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "table": "interactions",
            "column": self.column,
            "expectation": "ExpectColumnValuesToBeBetween",
            "passed": self.passed,
            "value": self.value,
            "unit": self.unit,
            "least": self.least,
            "most": self.most,
            "setting": self.setting,
        }


class Docs:
    """One validation: runs suites, remembers their results, writes the Data Docs."""

    def __init__(self, folder: Path) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self.context = gx.get_context(mode="ephemeral")
        self.context.variables.progress_bars = ProgressBarsConfig(globally=False)
        for name in list(self.context.get_site_names()):
            self.context.delete_data_docs_site(name)
        store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder)}
        site: Any = {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": store,
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
        self.context.add_data_docs_site(site_name="validation", site_config=site)
        self.source = self.context.data_sources.add_pandas("tables")

    def check_columns(self, table: str, found: pa.Schema, expected: pa.Schema) -> list[str]:
        """What is wrong with a table's columns, in words: missing, not ours, or of another type."""
        import great_expectations as gx
        import pandas as pd

        # One row that holds each column's type: so the file is judged, not what pandas makes of it.
        frame = pd.DataFrame([{harmless(field.name): str(field.type) for field in found}])
        both = [field for field in expected if field.name in found.names]
        named = {harmless(field.name): field.name for field in both}
        of_type = gx.expectations.ExpectColumnValuesToBeInSet
        expectations: list[Any] = [
            gx.expectations.ExpectTableColumnsToMatchSet(column_set=list(map(harmless, expected.names))),
            *(of_type(column=harmless(field.name), value_set=[str(field.type)]) for field in both),
        ]
        wrong: list[str] = []
        for result in self._run(self._define(f"{table}_columns", expectations), frame).results:
            _refuse_broken(result)
            column = result.expectation_config.kwargs.get("column")
            if result.success:
                continue
            if column:
                column = named[column]
                wrong.append(f"{column} is {found.field(column).type}, not {expected.field(column).type}")
            else:
                wrong += [f"{name} is missing" for name in expected.names if name not in found.names]
                wrong += [f"{name} is not ours" for name in found.names if name not in expected.names]
        return wrong

    def check_rows(self, table: str, rules: Sequence[Rule], marked: Path, batch_rows: int) -> dict[str, int]:
        """Rows that break each rule, by its reason."""
        definition = self._define(table, [rule.build() for rule in rules])
        failed = Counter({rule.reason: 0 for rule in rules})
        with open_parquet(marked) as file:
            for frame in _parts(file, batch_rows):
                for result in self._run(definition, frame).results:
                    _refuse_broken(result)
                    reason = result.expectation_config.meta["reason"]
                    failed[reason] += result.result.get("unexpected_count", 0)
        return dict(failed)

    def check_log(self, log: Mapping[str, Any], settings: Validation) -> list[Check]:
        """Expectations about the log as a whole: its volume and its freshness."""
        import great_expectations as gx
        import pandas as pd

        checks = {check.name: check for check in log_checks(log, settings)}
        frame = pd.DataFrame([{check.column: check.value for check in checks.values()}])
        build = gx.expectations.ExpectColumnValuesToBeBetween
        expectations = [
            build(
                column=check.column, min_value=check.least, max_value=check.most, meta={"reason": check.name}
            )
            for check in checks.values()
        ]
        for result in self._run(self._define("log", expectations), frame).results:
            _refuse_broken(result)
            checks[result.expectation_config.meta["reason"]].passed = bool(result.success)
        return list(checks.values())

    def build(self) -> None:
        self.context.build_data_docs()

    def _define(self, name: str, expectations: Sequence[Any]) -> Any:
        import great_expectations as gx

        suite = self.context.suites.add(gx.ExpectationSuite(name=name, expectations=list(expectations)))
        batches = self.source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("rows")
        return self.context.validation_definitions.add(
            gx.ValidationDefinition(name=name, data=batches, suite=suite)
        )

    @staticmethod
    def _run(definition: Any, frame: pd.DataFrame) -> Any:
        brief = {"result_format": "BASIC", "partial_unexpected_count": 3}
        return definition.run(batch_parameters={"dataframe": frame}, result_format=brief)


def log_checks(log: Mapping[str, Any], settings: Validation) -> Iterator[Check]:
    """`log` is what `hllm.data.validate` knows of the log; what it has no number for is not checked."""
    rows, newest = log["rows_read"], log["newest"]
    yield Check(
        "some_rows", "valid_rows", log["valid_rows"], "rows", 1, None, "", "no row of the log is valid"
    )
    before = log.get("previous_rows")
    if before:
        percent, least = 100 * rows / before, 100 * settings.min_rows_vs_previous
        yield Check(
            "volume",
            "percent_of_previous_rows",
            percent,
            "% of the previous run's rows",
            least,
            None,
            "validation.min_rows_vs_previous",
            f"{rows:,} rows, only {percent:.0f} % of the previous run's {before:,}",
            f"The limit is {least:g} % (validation.min_rows_vs_previous). Is the log cut off? "
            "Another data set wants another run.name.",
        )
    stale = settings.max_days_stale
    if stale and newest is not None:
        yield Check(
            "freshness",
            "days_since_newest_event",
            log["days_old"],
            "days old",
            None,
            stale,
            "validation.max_days_stale",
            f"the newest event is {log['days_old']:.1f} days old",
            f"The limit is {stale:g} days (validation.max_days_stale).",
        )
    previous = log.get("previous_newest")
    if previous is not None and newest is not None:
        most = settings.max_days_behind_previous
        yield Check(
            "newer_than_previous",
            "days_behind_previous",
            max(0.0, (previous - newest) / 86_400),
            "days behind the previous run",
            None,
            most,
            "validation.max_days_behind_previous",
            f"the newest event ({_moment(newest)}) is older than the previous run's ({_moment(previous)})",
            f"The limit is {most:g} days (validation.max_days_behind_previous). Did the log go back in time? "
            "Another data set wants another run.name.",
        )


def _moment(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _parts(file: pa.parquet.ParquetFile, batch_rows: int) -> Iterator[pd.DataFrame]:
    """Frames of up to PART_ROWS rows."""
    pending: list[pa.RecordBatch] = []
    for batch in file.iter_batches(batch_size=min(batch_rows, PART_ROWS)):
        pending.append(batch)
        if sum(part.num_rows for part in pending) + batch.num_rows > PART_ROWS:
            yield pa.Table.from_batches(pending).to_pandas()
            pending = []
    if pending:
        yield pa.Table.from_batches(pending).to_pandas()


def _refuse_broken(result: Any) -> None:
    """An expectation that could not be computed is a bug of ours, never a pass."""
    if (result.exception_info or {}).get("raised_exception"):
        raise RuntimeError(f"{result.expectation_config.type}: {result.exception_info['exception_message']}")
