"""`hllm validate`: Great Expectations over both tables; rows that break a rule go to quarantine, none is lost.

Every row of the ingested tables ends in exactly one file: the valid table, or `quarantine/TABLE_REASON.parquet`,
untouched, with the first reason that applies. Past a rule's limit the step fails, and the files stay for a look.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from hllm.artifacts import Manifest, clear, write_atomically
from hllm.data import duck
from hllm.data.marked import mark_interactions, mark_items
from hllm.data.schema import INTERACTIONS, RAW, Rule, interaction_rules, item_rules
from hllm.errors import DataError
from hllm.steps import Context

if TYPE_CHECKING:
    import duckdb

MILLISECONDS_SINCE = 7_258_118_400
"""2200-01-01 in seconds: a log that mostly lies behind it counts in a smaller unit."""


@dataclass(frozen=True)
class Finding:
    """What one expectation found."""

    rule: Rule
    failed: int
    total: int
    quarantined: int
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
    """Check, split, report; then fail if too much is wrong."""
    from hllm.data.expectations import Docs

    clear(context.output)
    settings, now = context.settings.validation, datetime.now(UTC)
    rules = {"items": item_rules(settings), "interactions": interaction_rules(settings, now)}
    source = context.inputs["ingest"]
    with duck.connect(context.work, context.settings.run.threads) as db:
        marked = {table: context.work / f"{table}_marked.parquet" for table in rules}
        mark_items(db, source / "items.parquet", marked["items"], rules["items"])
        mark_interactions(
            db,
            source / "interactions.parquet",
            marked["items"],
            marked["interactions"],
            rules["interactions"],
        )
        findings = []
        docs = Docs(context.output / "data_docs")
        for table, its_rules in rules.items():
            failed = docs.check_rows(table, its_rules, marked[table], context.settings.data.batch_rows)
            split = _split(db, source / f"{table}.parquet", marked[table], table, its_rules, context.output)
            findings += _findings(db, its_rules, source / f"{table}.parquet", marked[table], failed, split)
            context.rows[table] = pa.parquet.read_metadata(context.output / f"{table}.parquet").num_rows
        log = _log_facts(db, context, source, now)
    complaints = docs.check_log(log, settings)
    docs.build()
    context.rows["quarantined"] = sum(finding.quarantined for finding in findings)
    context.facts |= {"run": context.settings.run.name, **log}
    context.facts["quarantined"] = {
        f"{f.rule.table}_{f.rule.reason}": f.quarantined for f in findings if f.quarantined
    }
    report = [finding.as_json() for finding in findings] + complaints
    write_atomically(context.output / "validation.json", json.dumps(report, indent=1).encode())
    _judge(findings, complaints, context)


def _split(
    db: duckdb.DuckDBPyConnection, raw: Path, marked: Path, table: str, rules: Sequence[Rule], output: Path
) -> dict[str, int]:
    """Write the valid rows and one quarantine file per reason, all in the file's order; returns rows per reason."""
    names = pa.parquet.read_schema(raw).names
    canonical = INTERACTIONS.names if table == "interactions" else [name for name in names if name not in RAW]
    counts = dict(
        db.execute(
            f"SELECT reason, count(*) FROM {duck.parquet(marked)} WHERE reason IS NOT NULL GROUP BY reason"
        ).fetchall()
    )  # noqa: S608
    joined = f"{duck.numbered(raw)} AS raw JOIN {duck.parquet(marked)} AS marked USING (row)"
    valid = ", ".join(f"raw.{duck.name(name)}" for name in canonical)
    _copy(db, f"SELECT {valid} FROM {joined} WHERE reason IS NULL ORDER BY row", output / f"{table}.parquet")
    (output / "quarantine").mkdir(exist_ok=True)
    everything = ", ".join(f"raw.{duck.name(name)}" for name in names)
    for rule in rules:
        if rule.reason in counts:
            bad = f"SELECT {everything}, reason FROM {joined} WHERE reason = {duck.text(rule.reason)} ORDER BY row"  # noqa: S608
            _copy(db, bad, output / "quarantine" / f"{table}_{rule.reason}.parquet")
    return counts


def _copy(db: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    db.execute(f"COPY ({query}) TO {duck.text(path)} (FORMAT parquet, COMPRESSION zstd)")


def _findings(
    db: duckdb.DuckDBPyConnection,
    rules: Sequence[Rule],
    raw: Path,
    marked: Path,
    failed: Mapping[str, int],
    quarantined: Mapping[str, int],
) -> list[Finding]:
    total = pa.parquet.read_metadata(raw).num_rows
    found = []
    for rule in rules:
        examples: list[Any] = []
        if failed[rule.reason]:
            shown = f"SELECT DISTINCT ON (example) {_example(rule)} AS example, row FROM {duck.numbered(raw)} AS raw JOIN {duck.parquet(marked)} AS marked USING (row) WHERE marked.reason = {duck.text(rule.reason)}"  # noqa: S608
            query = f"SELECT example FROM ({shown} ORDER BY example, row) ORDER BY row LIMIT 3"  # noqa: S608
            examples = [row[0] for row in db.execute(query).fetchall()]
        found.append(
            Finding(rule, failed[rule.reason], total, quarantined.get(rule.reason, 0), tuple(examples))
        )
    return found


def _example(rule: Rule) -> str:
    if rule.example == "row":
        return "'row ' || (row + 1)"
    if rule.example == "label_text":
        return "coalesce(raw.label_raw, raw.label::VARCHAR)"
    if rule.example == "timestamp_raw":
        return "coalesce(raw.timestamp_raw, 'nothing')"
    return f"raw.{duck.name(rule.example)}"


def _log_facts(
    db: duckdb.DuckDBPyConnection, context: Context, source: Path, now: datetime
) -> dict[str, Any]:
    """The log as a whole, beside the previous run of the same name."""
    query = "SELECT count(DISTINCT user_id), count(DISTINCT item_id), min(timestamp), max(timestamp)"
    valid = context.output / "interactions.parquet"
    ((users, items, oldest, newest),) = db.execute(f"{query} FROM {duck.parquet(valid)}").fetchall()
    rows_read = pa.parquet.read_metadata(source / "interactions.parquet").num_rows
    found = {
        "rows_read": rows_read,
        "users": users,
        "items_with_events": items,
        "oldest": oldest,
        "newest": newest,
    }
    found["days_old"] = (now.timestamp() - newest) / 86_400 if newest is not None else None
    previous = _previous(context)
    if previous:
        found["previous_key"], found["previous_rows"], found["previous_newest"] = (
            previous.key,
            previous.facts["rows_read"],
            previous.facts["newest"],
        )
    return found


def _previous(context: Context) -> Manifest | None:
    """The newest finished validation of the same run name, other than this one."""
    name = context.settings.run.name
    before = [
        m for m in context.store.finished("validate") if m.key != context.key and m.facts.get("run") == name
    ]
    return before[-1] if before else None


def _judge(findings: Sequence[Finding], complaints: Sequence[Mapping[str, Any]], context: Context) -> None:
    """
    Raises:
        DataError: a rule's limit is passed, or the log as a whole is too small or too old.
    """
    too_many = [finding for finding in findings if not finding.passed]
    if too_many:
        worst = max(too_many, key=lambda finding: finding.share / max(finding.rule.limit, 1e-9))
        rule = worst.rule
        file = context.output / "quarantine" / f"{rule.table}_{rule.reason}.parquet"
        where = (
            f"They are in {file}."
            if worst.quarantined
            else "Each of them is in quarantine under an earlier reason."
        )
        others = [f"{other.failed:,} {other.rule.says}" for other in too_many if other is not worst]
        raise DataError(
            f"{worst.failed:,} of {worst.total:,} rows {rule.says}",
            where=rule.table,
            examples=worst.examples,
            remedy=f"{where} The limit is {100 * rule.limit:g} % ({rule.setting}). {_hint(worst, context)}".rstrip()
            + (f"\n  Also past their limits: {'; '.join(others)}." if others else ""),
        )
    for complaint in complaints:
        if not complaint["passed"]:
            raise DataError(complaint["says"], where="interactions", remedy=complaint["remedy"])


def _hint(finding: Finding, context: Context) -> str:
    unit = context.settings.data.timestamp_unit
    times = [value for value in finding.examples if isinstance(value, int)]
    if (
        finding.rule.reason == "future_timestamp"
        and times
        and finding.share > 0.5
        and min(times) > MILLISECONDS_SINCE
    ):
        micro = min(times) > MILLISECONDS_SINCE * 1000
        return f'These look like {"microseconds" if micro else "milliseconds"}: set data.timestamp_unit = "{"us" if micro else "ms"}".'
    if (
        finding.rule.reason == "early_timestamp"
        and finding.share > 0.5
        and unit in ("ms", "us")
        and times
        and min(times) >= 0
    ):
        return f'Are they seconds? data.timestamp_unit is "{unit}".'
    return finding.rule.remedy
