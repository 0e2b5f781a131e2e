"""`hllm validate`: Great Expectations over both tables; rows that break a rule go to quarantine.

Every row of the ingested tables ends in one file, the valid table or `quarantine/TABLE_REASON.parquet`:
untouched, with the first reason that applies. Past a rule's limit the step fails; the files stay to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from hllm.data.cells import PER_SECOND, fitting_unit, unit_advice
from hllm.data.engine import duck
from hllm.data.quarantine import Split
from hllm.data.readers import has_times, promised_columns
from hllm.data.schema import (
    Rule,
    interaction_rules,
    interactions_schema,
    item_rules,
    items_schema,
    window,
)
from hllm.data.validation_view import mark_interactions, mark_items
from hllm.errors import DataError
from hllm.settings import Data
from hllm.work.artifacts import Manifest, clear, write_atomically
from hllm.work.step import Context

if TYPE_CHECKING:
    import duckdb

    from hllm.data.expectations import Check, Docs

YEAR_1971, YEAR_2200, TEN_YEARS = 31_536_000, 7_258_118_400, 315_569_520
"""In seconds since 1970."""


@dataclass(frozen=True)
class Finding:
    """What one rule found in a table of `total` rows."""

    rule: Rule
    failed: int
    total: int
    quarantined: int
    """Rows that have this rule's reason; those that failed and are not here broke an earlier rule too."""
    examples: tuple[Any, ...]

    @property
    def share(self) -> float:
        return self.failed / self.total if self.total else 0.0

    @property
    def passed(self) -> bool:
        return self.share <= self.rule.limit

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.rule.reason,
            "table": self.rule.table,
            "column": self.rule.column,
            "expectation": self.rule.expectation,
            "passed": self.passed,
            "failed": self.failed,
            "total": self.total,
            "share": self.share,
            "limit": self.rule.limit,
            "setting": self.rule.setting,
            "quarantined": self.quarantined,
            "examples": list(self.examples),
        }


def validate(context: Context) -> None:
    """Check, split, report; then fail if too much is wrong.

    Raises:
        DataError: an ingested table has other columns than ours, a rule's limit is passed, or the log as a
            whole is too small or too old.
    """
    from hllm.data.expectations import Docs

    clear(context.output)
    settings, now = context.settings.validation, datetime.now(UTC)
    rules = {"items": item_rules(settings), "interactions": interaction_rules(settings, now)}
    raw = {table: context.inputs["ingest"] / f"{table}.parquet" for table in rules}
    docs = Docs(context.output / "data_docs")
    for table, path in raw.items():
        _require_columns(docs, table, path, context)
    findings: list[Finding] = []
    with duck.connect(context.work, context.settings.run.threads) as db:
        _refuse_absurd_creation(db, raw["items"], context)
        marked = {table: context.work / f"{table}_marked.parquet" for table in rules}
        mark_items(db, raw["items"], marked["items"], rules["items"])
        mark_interactions(
            db, raw["interactions"], marked["items"], marked["interactions"], rules["interactions"]
        )
        for table in rules:
            broken = docs.check_rows(table, rules[table], marked[table], context.settings.data.batch_rows)
            split = Split(db, table, raw[table], marked[table])
            quarantined = split.write(context.output, rules[table])
            context.rows[table] = _rows(context.output / f"{table}.parquet")
            _say_where_rows_went(table, _rows(raw[table]), context.rows[table], sum(quarantined.values()))
            for rule in rules[table]:
                failed = broken[rule.reason]
                examples = split.examples(rule) if failed else ()
                findings.append(
                    Finding(rule, failed, _rows(raw[table]), quarantined.get(rule.reason, 0), examples)
                )
        log = _log(db, context, _rows(raw["interactions"]), now)
    checks = docs.check_log(log, settings)
    docs.build()
    context.rows["quarantined"] = sum(finding.quarantined for finding in findings)
    context.facts |= {"run": context.settings.run.name, **log}
    context.facts["quarantined"] = {
        f"{f.rule.table}_{f.rule.reason}": f.quarantined for f in findings if f.quarantined
    }
    for finding in findings:
        if finding.quarantined:
            file = context.output / "quarantine" / f"{finding.rule.table}_{finding.rule.reason}.parquet"
            print(
                f"validate: {finding.quarantined:,} of {finding.total:,} {finding.rule.table} "
                f"{finding.rule.says}: {file}",
                flush=True,
            )
    report = [*(finding.as_json() for finding in findings), *(check.as_json() for check in checks)]
    write_atomically(context.output / "validation.json", json.dumps(report, indent=1).encode())
    _judge(findings, checks, context)


def _say_where_rows_went(table: str, read: int, valid: int, quarantined: int) -> None:
    if valid + quarantined != read:  # a bug of ours
        raise RuntimeError(f"{table}: {read:,} rows read, {valid:,} valid, {quarantined:,} in quarantine")
    print(f"validate: {table}: {read:,} rows = {valid:,} valid + {quarantined:,} in quarantine", flush=True)


def _require_columns(docs: Docs, table: str, path: Path, context: Context) -> None:
    """The names and types of `hllm.data.schema`, before any SQL relies on them."""
    found = pa.parquet.read_schema(path)
    expected = interactions_schema()
    if table == "items":
        promised = promised_columns(context.settings.data)
        expected = items_schema(list(dict.fromkeys([*promised, *found.names])))
    wrong = docs.check_columns(table, found, expected)
    if wrong:
        docs.build()
        raise DataError(
            f"{table} has columns that are missing or of the wrong type",
            where=path,
            examples=wrong,
            remedy=f"`hllm ingest` writes other columns. Delete {path.parent} and run it again.",
        )


def _log(db: duckdb.DuckDBPyConnection, context: Context, rows_read: int, now: datetime) -> dict[str, Any]:
    """The log as a whole, beside the previous run of the same name."""
    valid = context.output / "interactions.parquet"
    query = (
        "SELECT count(*), count(DISTINCT user_id), count(DISTINCT item_id), min(timestamp), max(timestamp)"
    )
    (found,) = db.execute(f"{query} FROM {duck.parquet(valid)}").fetchall()
    log = dict(zip(("valid_rows", "users", "items_with_events", "oldest", "newest"), found, strict=True))
    log |= {"rows_read": rows_read}
    log["days_old"] = None if log["newest"] is None else (now.timestamp() - log["newest"]) / 86_400
    previous = _previous(context)
    if previous:
        log["previous_key"] = previous.key
        log["previous_rows"] = previous.facts["rows_read"]
        # Times made from the order of events grow with the longest history, not with the calendar.
        log["previous_newest"] = previous.facts["newest"] if has_times(context.settings.data) else None
    return log


def _previous(context: Context) -> Manifest | None:
    """The newest finished validation of the same run name, other than this one."""
    name = context.settings.run.name
    before = [
        m for m in context.store.finished("validate") if m.key != context.key and m.facts.get("run") == name
    ]
    return before[-1] if before else None


def _judge(findings: Sequence[Finding], checks: Sequence[Check], context: Context) -> None:
    """
    Raises:
        DataError: a rule's limit is passed, or the log as a whole is too small or too old.
    """
    too_many = [finding for finding in findings if not finding.passed]
    if too_many:
        worst = max(too_many, key=lambda finding: finding.share / max(finding.rule.limit, 1e-9))
        rule = worst.rule
        file = context.output / "quarantine" / f"{rule.table}_{rule.reason}.parquet"
        kept = f"They are in {file}." if worst.quarantined else "Each is in quarantine for an earlier reason."
        remedy = (
            f"{kept} The limit is {100 * rule.limit:g} % ({rule.setting}). {_hint(worst, context)}".rstrip()
        )
        others = [
            f"{other.failed:,} {other.rule.table} {other.rule.says}"
            for other in too_many
            if other is not worst
        ]
        if others:
            remedy += f"\n  Also past their limits: {'; '.join(others)}."
        what = f"{worst.failed:,} of {worst.total:,} rows {rule.says}"
        raise DataError(what, where=rule.table, examples=worst.examples, remedy=remedy)
    for check in checks:
        if not check.passed:
            raise DataError(check.says, where="interactions", remedy=check.remedy)


def _hint(finding: Finding, context: Context) -> str:
    """What a person would guess from the examples."""
    data, reason = context.settings.data, finding.rule.reason
    earliest, latest = window(context.settings.validation, datetime.now(UTC))
    if reason in ("unreadable_timestamp", "unreadable_created_at"):
        column = reason.removeprefix("unreadable_")
        cells = [cell for cell in finding.examples if cell != "nothing"]
        return unit_advice(column, _unit(data, column), cells, earliest, latest)
    if reason in ("early_timestamp", "future_timestamp") and finding.share > 0.5 and finding.examples:
        return _other_unit("timestamp", data, finding.examples, earliest, latest)
    return finding.rule.remedy


def _unit(data: Data, column: str) -> str:
    return (data.created_at_unit if column == "created_at" else "") or data.timestamp_unit


def _other_unit(column: str, data: Data, times: Sequence[int], earliest: int, latest: int) -> str:
    """Advice about times that are absurd in the unit they were read in: their numbers, in another."""
    unit = _unit(data, column)
    if unit == "iso":
        return ""
    return unit_advice(column, unit, [str(t * PER_SECOND[unit]) for t in times], earliest, latest)


def _refuse_absurd_creation(db: duckdb.DuckDBPyConnection, items: Path, context: Context) -> None:
    """Books of 1850 may be in a catalogue; a catalogue of January 1970 or of the year 50,000 is none.

    Raises:
        DataError: most creation times are absurd, and in another unit they would not be.
    """
    if "created_at" not in pa.parquet.read_schema(items).names:
        return
    latest = int(datetime.now(UTC).timestamp()) + TEN_YEARS
    absurd = f"created_at NOT BETWEEN {YEAR_1971} AND {latest}"
    query = f"SELECT count(created_at), count(*) FILTER ({absurd}) FROM {duck.parquet(items)}"
    ((known, outside),) = db.execute(query).fetchall()
    if outside <= known / 2:
        return
    query = f"SELECT DISTINCT created_at FROM {duck.parquet(items)} WHERE {absurd} ORDER BY 1 LIMIT 3"
    times = [time for (time,) in db.execute(query).fetchall()]
    data = context.settings.data
    unit = _unit(data, "created_at")
    cells = [] if unit == "iso" else [str(time * PER_SECOND[unit]) for time in times]
    if fitting_unit(cells, YEAR_1971, latest) or min(times) > YEAR_2200:
        raise DataError(
            "most creation times are absurd",
            where="items, column created_at",
            count=(outside, known),
            examples=[shown_time(time) for time in times],
            remedy=_other_unit("created_at", data, times, YEAR_1971, latest),
        )


def shown_time(seconds: int) -> str:
    """A day, or a year where the calendar has none."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):
        return f"the year {1970 + seconds // 31_556_952:,}"


def _rows(path: Path) -> int:
    return int(pa.parquet.read_metadata(path).num_rows)
