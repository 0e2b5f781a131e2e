"""Great Expectations over the marked tables: part by part, so that a log of any length fits in memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from hllm.data.schema import Rule
from hllm.settings import Validation

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 500_000
"""Rows that become one pandas frame, one validation result and one page of the Data Docs."""


@dataclass(frozen=True)
class Rows:
    """What a table's suite found."""

    failed: dict[str, int]
    """Rows that break each rule, by its reason."""
    misshapen: tuple[str, ...]
    """Columns that are missing, too many, or of the wrong type."""


@dataclass
class Check:
    """An expectation about the log as a whole."""

    name: str
    column: str
    value: float
    least: float | None
    most: float | None
    setting: str
    says: str
    remedy: str = ""
    passed: bool = False

    def as_json(self, rows: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "table": "interactions",
            "column": self.column,
            "expectation": "ExpectColumnValuesToBeBetween",
            "passed": self.passed,
            "failed": 0 if self.passed else rows,
            "total": rows,
            "share": 0.0 if self.passed else 1.0,
            "limit": self.least if self.most is None else self.most,
            "setting": self.setting,
            "quarantined": 0,
            "examples": [self.value],
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

    def check_rows(self, table: str, rules: Sequence[Rule], marked: Path, batch_rows: int) -> Rows:
        """Every rule, and the columns and types of the table."""
        import great_expectations as gx

        expectations = [rule.build() for rule in rules]
        with pa.parquet.ParquetFile(marked) as file:
            expectations.append(
                gx.expectations.ExpectTableColumnsToMatchSet(column_set=file.schema_arrow.names)
            )
            of_type = gx.expectations.ExpectColumnValuesToBeInTypeList
            expectations += [of_type(column=rule.column, type_list=_types(rule)) for rule in rules]
            definition = self._define(table, expectations)
            failed = Counter({rule.reason: 0 for rule in rules})
            misshapen: list[str] = []
            for frame in _parts(file, batch_rows):
                for result in self._run(definition, frame).results:
                    _refuse_broken(result)
                    reason = (result.expectation_config.meta or {}).get("reason")
                    if reason:
                        failed[reason] += result.result.get("unexpected_count", 0)
                    elif not result.success:
                        misshapen.append(str(result.expectation_config.kwargs.get("column", "columns")))
        return Rows(dict(failed), tuple(dict.fromkeys(misshapen)))

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
    rows, stale = log["rows_read"], settings.max_days_stale
    yield Check("some_rows", "valid_rows", log["valid_rows"], 1, None, "", "no row of the log is valid")
    before = log.get("previous_rows")
    if before:
        share, least = rows / before, settings.min_rows_vs_previous
        yield Check(
            "volume",
            "share_of_previous_rows",
            share,
            least,
            None,
            "validation.min_rows_vs_previous",
            f"{rows:,} rows, only {100 * share:.0f} % of the previous run's {before:,}",
            f"The limit is {100 * least:g} % (validation.min_rows_vs_previous). Is the log cut off? "
            "Another data set wants another run.name.",
        )
    if stale and log["newest"] is not None:
        yield Check(
            "freshness",
            "days_since_newest_event",
            log["days_old"],
            None,
            stale,
            "validation.max_days_stale",
            f"the newest event is {log['days_old']:.1f} days old",
            f"The limit is {stale:g} days (validation.max_days_stale).",
        )
        if log.get("previous_newest") is not None:
            behind = (log["previous_newest"] - log["newest"]) / 86_400
            yield Check(
                "newer_than_previous",
                "days_behind_previous",
                behind,
                None,
                0.0,
                "validation.max_days_stale",
                f"the newest event is {behind:.1f} days older than the previous run's",
                "The log went back in time. validation.max_days_stale = 0 turns this off.",
            )


def _types(rule: Rule) -> list[str]:
    """How a column of the marked view may look in pandas (a column of integers with gaps is float64)."""
    if rule.column in ("repeats", "created_at_unreadable"):
        return ["bool", "bool_"]
    if rule.column in ("timestamp", "label", "text_chars"):
        return ["int8", "int32", "int64", "float64"]
    return ["str", "NoneType"]


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
