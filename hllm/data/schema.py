"""The two canonical tables, and beside them the expectations that protect them.

    items          item_id, any number of text columns, optional created_at (int64 seconds UTC)
    interactions   user_id, item_id, timestamp (int64 seconds UTC) and nanos (nanoseconds within the second,
                   null for 0), label (0, 1 or null), event

Events are ordered by (timestamp, nanos), then as in the file. What models read of a time is its second.

A `*_raw` column holds the text of a cell that could not be read and is gone after validation.

Validation looks at each table through a view (`hllm.data.validation_view`, one row per row) in which
everything that takes more than one row to know is a column: whether the catalogue knows the item, whether the
event repeats an earlier one, how long an item's text is. So every rule is one expectation about one column,
and SQL selects exactly the rows that the expectation objects to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from hllm.errors import ConfigError, DataError
from hllm.settings import Validation

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("nanos", pa.int32()),
        ("label", pa.int8()),
        ("event", pa.string()),
    ]
)
RAW = ("timestamp_raw", "label_raw", "created_at_raw")
LONGEST_ID = 1_000
"""Bytes of an id. A PostgreSQL index row ends at 2,704, with the names that Feast adds to the id."""
RESERVED = {"item_id", "item_index", "created_at", "train_events", "reason", "row", *RAW}
"""Names that a text column of the catalogue cannot have."""


def interactions_schema() -> pa.Schema:
    """Of the ingested log: canonical columns, and what stood in cells that could not be read."""
    return INTERACTIONS.append(pa.field("timestamp_raw", pa.string())).append(
        pa.field("label_raw", pa.string())
    )


def items_schema(names: list[str]) -> pa.Schema:
    """Of an ingested catalogue with these columns: everything that is not ours is a text."""
    return pa.schema([(name, pa.int64() if name == "created_at" else pa.string()) for name in names])


def text_columns(names: list[str]) -> list[str]:
    return [name for name in names if name not in ("item_id", "created_at", *RAW)]


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with exactly the schema's columns; a column that the source lacks is null.

    Raises:
        DataError: the batch has a column that the batches before it had not.
    """
    if late := [name for name in batch.schema.names if name not in schema.names]:
        raise DataError("has columns that its beginning has not", examples=late)
    columns = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.record_batch(columns, schema=schema)


@dataclass(frozen=True)
class Rule:
    """One row-level expectation and the rows that break it: `214 of 100,000 rows <says>`."""

    table: str
    reason: str
    says: str
    column: str
    """Column of the marked view that the expectation is about."""
    bad: str
    """SQL over the marked view: true for rows that break the rule."""
    expectation: str
    """Great Expectations class, and its arguments."""
    arguments: Mapping[str, Any]
    limit: float
    setting: str
    """The setting that holds the limit."""
    example: str
    """What stands in the message: a column of the ingested table, or `row`."""
    remedy: str = ""

    def build(self) -> Any:
        """The expectation. `mostly` is the limit, so that Great Expectations comes to our verdict."""
        import great_expectations as gx

        kind = getattr(gx.expectations, self.expectation)
        return kind(
            column=self.column, mostly=1.0 - self.limit, meta={"reason": self.reason}, **self.arguments
        )


class Suite:
    """Collects a table's rules; a row's reason is the first rule that it breaks."""

    def __init__(self, table: str, validation: Validation) -> None:
        self.table, self.validation = table, validation
        self.rules: list[Rule] = []

    def not_null(self, column: str, reason: str, says: str, **more: str) -> None:
        self._add(column, reason, says, f"{column} IS NULL", "ExpectColumnValuesToNotBeNull", {}, **more)

    def at_least(self, column: str, value: int, reason: str, says: str, **more: str) -> None:
        expectation = "ExpectColumnValuesToBeBetween"
        self._add(column, reason, says, f"{column} < {value}", expectation, {"min_value": value}, **more)

    def at_most(self, column: str, value: int, reason: str, says: str, **more: str) -> None:
        expectation = "ExpectColumnValuesToBeBetween"
        self._add(column, reason, says, f"{column} > {value}", expectation, {"max_value": value}, **more)

    def one_of(self, column: str, values: tuple[int, ...], reason: str, says: str, **more: str) -> None:
        arguments = {"value_set": list(values)}
        bad = f"{column} NOT IN ({', '.join(map(str, values))})"
        self._add(column, reason, says, bad, "ExpectColumnValuesToBeInSet", arguments, **more)

    def never(self, column: str, value: str | bool, reason: str, says: str, **more: str) -> None:
        bad = column if value is True else f"{column} = '{value}'"
        arguments = {"value_set": [value]}
        self._add(column, reason, says, bad, "ExpectColumnValuesToNotBeInSet", arguments, **more)

    def unfit(self, kind: str) -> None:
        """Found here, not when a store refuses to take it."""
        self.never(
            f"{kind}_id_unfit",
            True,
            f"unfit_{kind}_id",
            f"have control characters or more than {LONGEST_ID:,} bytes in {kind}_id",
            example=f"{kind}_id",
            remedy="PostgreSQL takes no NUL, and no index holds a longer id.",
        )

    def _add(
        self,
        column: str,
        reason: str,
        says: str,
        bad: str,
        expectation: str,
        arguments: Mapping[str, Any],
        limit: str = "max_quarantined",
        example: str = "",
        remedy: str = "",
    ) -> None:
        share, setting = getattr(self.validation, limit), f"validation.{limit}"
        self.rules.append(
            Rule(
                self.table,
                reason,
                says,
                column,
                bad,
                expectation,
                arguments,
                share,
                setting,
                example or column,
                remedy,
            )
        )


def item_rules(validation: Validation) -> list[Rule]:
    longest = validation.max_text_chars
    suite = Suite("items", validation)
    suite.not_null("item_id", "missing_item_id", "have no item id", example="row")
    suite.unfit("item")
    suite.never(
        "created_at_unreadable",
        True,
        "unreadable_created_at",
        "have a creation time that cannot be read",
        example="created_at_raw",
    )
    suite.at_least(
        "text_chars",
        1,
        "empty_text",
        "have no text at all",
        limit="max_empty_texts",
        example="item_id",
        remedy="data.columns.texts names the text columns.",
    )
    suite.at_most(
        "text_chars",
        longest,
        "long_text",
        f"have more than {longest:,} characters of text (validation.max_text_chars)",
        example="item_id",
    )
    suite.never(
        "repeats",
        True,
        "duplicate_item",
        "repeat the id of an earlier item",
        limit="max_duplicates",
        example="item_id",
    )
    return suite.rules


def interaction_rules(validation: Validation, now: datetime) -> list[Rule]:
    earliest, latest = window(validation, now)
    suite = Suite("interactions", validation)
    suite.not_null("user_id", "missing_user_id", "have no user id", example="row")
    suite.not_null("item_id", "missing_item_id", "have no item id", example="row")
    suite.unfit("user")
    suite.unfit("item")
    suite.not_null(
        "timestamp",
        "unreadable_timestamp",
        "have no timestamp that can be read",
        example="timestamp_raw",
    )
    suite.at_least(
        "timestamp",
        earliest,
        "early_timestamp",
        f"lie before {validation.not_before} (validation.not_before)",
    )
    suite.at_most("timestamp", latest, "future_timestamp", "lie in the future")
    suite.one_of("label", (0, 1), "bad_label", "have a label that is neither 0 nor 1")
    suite.never(
        "catalogue",
        "unknown",
        "unknown_item",
        "name an item that the catalogue lacks",
        limit="max_unknown_items",
        example="item_id",
    )
    suite.never(
        "catalogue",
        "quarantined",
        "quarantined_item",
        "name an item whose own row is in quarantine",
        example="item_id",
    )
    suite.never(
        "repeats",
        True,
        "duplicate_event",
        "repeat an earlier event (same user, item and time)",
        limit="max_duplicates",
        example="item_id",
    )
    return suite.rules


def window(validation: Validation, now: datetime) -> tuple[int, int]:
    """The seconds between which an event may lie."""
    try:
        earliest = datetime.fromisoformat(validation.not_before)
    except ValueError:
        raise ConfigError(
            f"validation.not_before: not a day, got {validation.not_before!r}",
            remedy="Write it as 1990-01-31.",
        ) from None
    earliest = earliest if earliest.tzinfo else earliest.replace(tzinfo=UTC)
    latest = now + timedelta(hours=validation.max_future_hours)
    return int(earliest.timestamp()), int(latest.timestamp())
