"""The two canonical tables, and beside them the expectations that protect them.

    items          item_id, any number of text columns, optional created_at (int64 seconds UTC)
    interactions   user_id, item_id, timestamp (int64 seconds UTC), label (0, 1 or null), event

A `*_raw` column holds the text of a cell that could not be read and is gone after validation.

Validation looks at each table through a view (`marked`, one row per row) in which everything that takes more
than one row to know is a column: whether the catalogue knows the item, whether the event repeats an earlier one,
how long an item's text is. So every rule is one expectation about one column, and SQL can select the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from hllm.errors import ConfigError
from hllm.settings import Validation

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("event", pa.string()),
    ]
)
RAW = ("timestamp_raw", "label_raw", "created_at_raw")
RESERVED = {"item_id", "item_index", "created_at", "created_at_raw", "train_events", "reason", "row"}
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
    """The batch with exactly the schema's columns; a column that the source lacks is null."""
    columns = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.record_batch(columns, schema=schema)


@dataclass(frozen=True)
class Rule:
    """One row-level expectation and the rows that break it."""

    table: str
    reason: str
    column: str
    """The column of the marked view that the expectation is about; examples in messages come from `example`."""
    bad: str
    """SQL over the marked view: true for rows that break the rule."""
    says: str
    """`214 of 100,000 rows <says>`."""
    expectation: str
    """Great Expectations class."""
    arguments: Mapping[str, Any]
    limit: float
    setting: str
    """The setting that holds the limit."""
    example: str
    """Column of the ingested table whose values stand in the message."""
    remedy: str = ""

    def build(self) -> Any:
        """The expectation. `mostly` is the limit, so that Great Expectations comes to our verdict."""
        import great_expectations as gx

        kind = getattr(gx.expectations, self.expectation)
        return kind(
            column=self.column, mostly=1.0 - self.limit, meta={"reason": self.reason}, **self.arguments
        )


def item_rules(validation: Validation) -> list[Rule]:
    """In the order in which a row's reason is chosen."""
    default, unique = (
        (validation.max_quarantined, "validation.max_quarantined"),
        (validation.max_duplicates, "validation.max_duplicates"),
    )
    empty = (validation.max_empty_texts, "validation.max_empty_texts")
    return [
        Rule("items", "missing_item_id", "item_id", "item_id IS NULL", "have no item id", "ExpectColumnValuesToNotBeNull", {}, *default, example="row"),
        Rule("items", "unreadable_created_at", "created_at_unreadable", "created_at_unreadable", "have a creation time that cannot be read",
             "ExpectColumnValuesToBeInSet", {"value_set": [False]}, *default, example="created_at_raw", remedy="See data.timestamp_unit."),
        Rule("items", "empty_text", "text_chars", "text_chars < 1", "have no text at all",
             "ExpectColumnValuesToBeBetween", {"min_value": 1}, *empty, example="item_id", remedy="data.columns.texts names the text columns."),
        Rule("items", "long_text", "text_chars", f"text_chars > {validation.max_text_chars}",
             f"have a text of more than {validation.max_text_chars:,} characters (validation.max_text_chars)",
             "ExpectColumnValuesToBeBetween", {"max_value": validation.max_text_chars}, *default, example="item_id"),
        Rule("items", "duplicate_item", "repeats", "repeats", "repeat the id of an earlier item",
             "ExpectColumnValuesToBeInSet", {"value_set": [False]}, *unique, example="item_id"),
    ]  # fmt: skip


def interaction_rules(validation: Validation, now: datetime) -> list[Rule]:
    """In the order in which a row's reason is chosen."""
    default, unique = (
        (validation.max_quarantined, "validation.max_quarantined"),
        (validation.max_duplicates, "validation.max_duplicates"),
    )
    unknown = (validation.max_unknown_items, "validation.max_unknown_items")
    earliest, latest = window(validation, now)
    table = "interactions"
    return [
        Rule(table, "missing_user_id", "user_id", "user_id IS NULL", "have no user id", "ExpectColumnValuesToNotBeNull", {}, *default, example="row"),
        Rule(table, "missing_item_id", "item_id", "item_id IS NULL", "have no item id", "ExpectColumnValuesToNotBeNull", {}, *default, example="row"),
        Rule(table, "unreadable_timestamp", "timestamp", "timestamp IS NULL", "have no timestamp that can be read",
             "ExpectColumnValuesToNotBeNull", {}, *default, example="timestamp_raw", remedy="See data.timestamp_unit."),
        Rule(table, "early_timestamp", "timestamp", f"timestamp < {earliest}", f"lie before {validation.not_before} (validation.not_before)",
             "ExpectColumnValuesToBeBetween", {"min_value": earliest}, *default, example="timestamp"),
        Rule(table, "future_timestamp", "timestamp", f"timestamp > {latest}", "lie in the future",
             "ExpectColumnValuesToBeBetween", {"max_value": latest}, *default, example="timestamp"),
        Rule(table, "bad_label", "label", "label NOT IN (0, 1)", "have a label that is neither 0 nor 1",
             "ExpectColumnValuesToBeInSet", {"value_set": [0, 1]}, *default, example="label_text"),
        Rule(table, "unknown_item", "catalogue", "catalogue = 'unknown'", "name an item that the catalogue lacks",
             "ExpectColumnValuesToNotBeInSet", {"value_set": ["unknown"]}, *unknown, example="item_id"),
        Rule(table, "quarantined_item", "catalogue", "catalogue = 'quarantined'", "name an item whose own row is in quarantine",
             "ExpectColumnValuesToNotBeInSet", {"value_set": ["quarantined"]}, *default, example="item_id"),
        Rule(table, "duplicate_event", "repeats", "repeats", "repeat an earlier event (same user, item and second)",
             "ExpectColumnValuesToBeInSet", {"value_set": [False]}, *unique, example="item_id"),
    ]  # fmt: skip


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
    return int(earliest.timestamp()), int((now + timedelta(hours=validation.max_future_hours)).timestamp())
