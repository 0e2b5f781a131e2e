"""Great Expectations over the marked tables: part by part, so that a log of any length fits in memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
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
        index = {"class_name": "DefaultSiteIndexBuilder"}
        site: Any = {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": store,
            "site_index_builder": index,
        }
        self.context.add_data_docs_site(site_name="validation", site_config=site)
        self.source = self.context.data_sources.add_pandas("tables")

    def check_rows(self, table: str, rules: Sequence[Rule], marked: Path, batch_rows: int) -> dict[str, int]:
        """How many rows break each rule: reason -> count."""
        import great_expectations as gx

        expectations = [rule.build() for rule in rules]
        with pa.parquet.ParquetFile(marked) as file:
            expectations.append(
                gx.expectations.ExpectTableColumnsToMatchSet(column_set=file.schema_arrow.names)
            )
            definition = self._define(table, expectations)
            failed = Counter({rule.reason: 0 for rule in rules})
            for frame in _parts(file, batch_rows):
                for result in self._run(definition, frame).results:
                    _refuse_broken(result)
                    reason = (result.expectation_config.meta or {}).get("reason")
                    if reason:
                        failed[reason] += result.result.get("unexpected_count", 0)
        return dict(failed)

    def check_log(self, log: Mapping[str, Any], settings: Validation) -> list[dict[str, Any]]:
        """Expectations about the log as a whole: its volume and its freshness."""
        import great_expectations as gx
        import pandas as pd

        checks = _log_checks(log, settings)
        frame = pd.DataFrame([{check["column"]: check["value"] for check in checks}])
        build = gx.expectations.ExpectColumnValuesToBeBetween
        expectations = [
            build(
                column=check["column"],
                min_value=check["least"],
                max_value=check["most"],
                meta={"reason": check["name"]},
            )
            for check in checks
        ]
        definition = self._define("log", expectations)
        passed = {}
        for result in self._run(definition, frame).results:
            _refuse_broken(result)
            passed[result.expectation_config.meta["reason"]] = bool(result.success)
        return [
            {
                "name": check["name"],
                "table": "interactions",
                "column": check["column"],
                "expectation": build.__name__,
                "passed": passed[check["name"]],
                "value": check["value"],
                "limit": check["least"] if check["least"] is not None else check["most"],
                "setting": check["setting"],
                "says": check["says"],
                "remedy": check["remedy"],
            }
            for check in checks
        ]

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


def _log_checks(log: Mapping[str, Any], settings: Validation) -> list[dict[str, Any]]:
    checks = [
        {
            "name": "some_rows", "column": "rows_read", "value": log["rows_read"], "least": 1, "most": None, "setting": "",
            "says": "the log has no rows", "remedy": "",
        }
    ]  # fmt: skip
    if log.get("previous_rows"):
        share, before = log["rows_read"] / log["previous_rows"], log["previous_rows"]
        checks.append(
            {
                "name": "volume", "column": "share_of_previous_rows", "value": share,
                "least": settings.min_rows_vs_previous, "most": None, "setting": "validation.min_rows_vs_previous",
                "says": f"{log['rows_read']:,} rows, only {100 * share:.0f} % of the previous run's {before:,}",
                "remedy": f"The limit is {100 * settings.min_rows_vs_previous:g} % (validation.min_rows_vs_previous). "
                "Is the log cut off? Another data set wants another run.name.",
            }
        )  # fmt: skip
    if settings.max_days_stale and log["days_old"] is not None:
        checks.append(
            {
                "name": "freshness", "column": "days_since_newest_event", "value": log["days_old"],
                "least": None, "most": settings.max_days_stale, "setting": "validation.max_days_stale",
                "says": f"the newest event is {log['days_old']:.1f} days old",
                "remedy": f"The limit is {settings.max_days_stale:g} days (validation.max_days_stale).",
            }
        )  # fmt: skip
        if log.get("previous_newest") is not None:
            behind = (log["previous_newest"] - log["newest"]) / 86_400
            checks.append(
                {
                    "name": "newer_than_previous", "column": "days_behind_previous", "value": behind,
                    "least": None, "most": 0.0, "setting": "validation.max_days_stale",
                    "says": f"the newest event is {behind:.1f} days older than the previous run's",
                    "remedy": "The log went back in time; validation.max_days_stale = 0 turns this off.",
                }
            )  # fmt: skip
    return checks


def _parts(file: pa.parquet.ParquetFile, batch_rows: int) -> Any:
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
