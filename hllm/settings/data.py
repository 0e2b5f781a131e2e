"""The log and the catalogue: where they are, what in them is refused, how they become histories."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hllm.settings.location import Location
from hllm.settings.section import Section


class Columns(Section):
    user_id: str = "user_id"
    """Column of the interactions file that names the user."""
    item_id: str = "item_id"
    """Column of both files that names the item."""
    timestamp: str = "timestamp"
    """Column of the interactions file with the time of the event. Empty: the file is ordered and has no
    times; row n gets `data.order_starts` + n seconds."""
    label: str = ""
    """Column with 0/1 labels; empty when there is none."""
    event: str = ""
    """Column with the kind of event (view, buy, ...); empty when there is none."""
    created_at: str = ""
    """Column of the items file with the item's creation time; empty when there is none."""
    texts: tuple[str, ...] = ("title",)
    """Text columns of the items file, in the order in which the Item LLM reads them."""


class Data(Section):
    source: Literal["movielens", "amazon", "table"] = "table"
    """`movielens`: ml-100k atomic files. `amazon`: `NAME.inter.json` + `NAME.item.json`, order only.
    `table`: Parquet, CSV or JSON lines with the names in `data.columns`."""
    path: Location = ""
    """Folder (or s3://) of a `movielens` or `amazon` source. Empty, for movielens: the copy inside the
    installed recbole wheel."""
    interactions: Location = ""
    """Log of a `table` source: .parquet, .csv, .tsv or .jsonl, local or in S3. The files of a folder,
    or of a pattern with `*`, are read in the order of their names."""
    items: Location = ""
    """Catalogue of a `table` source: .parquet, .csv, .tsv or .jsonl, local or in S3. The files of a
    folder, or of a pattern with `*`, are read in the order of their names."""
    columns: Columns = Columns()
    """How the columns of a `table` source are called."""
    timestamp_unit: Literal["s", "ms", "us", "ns", "iso"] = "s"
    """Unit of the log's timestamps: seconds, milliseconds, microseconds or nanoseconds since 1970, or ISO
    8601 text (UTC when it names no zone). Columns of dates or times bring their own unit."""
    created_at_unit: Literal["", "s", "ms", "us", "ns", "iso"] = ""
    """Unit of `data.columns.created_at`; empty: that of the log."""
    order_starts: int = 1_000_000_000
    """Sources without times: the n-th event of a user happens at this second + n."""
    positive_rating: float = 4.0
    """Ratings of at least this much get label 1, others 0 (movielens)."""
    batch_rows: int = Field(65_536, ge=1)
    """Rows read at a time: bounds memory, whatever the size of the log."""


class Validation(Section):
    not_before: str = "1990-01-01"
    """Events before this day (UTC) are quarantined."""
    max_future_hours: float = Field(0.0, ge=0)
    """How far in the future an event may lie before it is quarantined (clock skew)."""
    max_text_chars: int = Field(50_000, ge=1)
    """Items with a longer text are quarantined: it is nearly always a page scraped by mistake."""
    max_quarantined: float = Field(0.01, ge=0, le=1)
    """The largest share of rows of a table that may be quarantined before the step fails, for each reason not
    named below."""
    max_unknown_items: float = Field(0.001, ge=0, le=1)
    """The largest share of interactions whose item the catalogue lacks."""
    max_duplicates: float = Field(0.01, ge=0, le=1)
    """The largest share of events that repeat an earlier event (same user, item and time)."""
    max_empty_texts: float = Field(0.01, ge=0, le=1)
    """The largest share of items without any text."""
    min_rows_vs_previous: float = Field(0.5, ge=0)
    """A log with less than this share of the previous run's rows fails: half a log is worse than none."""
    max_days_stale: float = Field(0.0, ge=0)
    """Fail when the newest event is older than this many days; 0 turns the check off (historic data)."""
    max_days_behind_previous: float = Field(0.0, ge=0)
    """How many days older than the previous run's newest event the newest event may be. The same data again
    passes; a log without times is not asked."""


class Prepare(Section):
    k_core: int = Field(0, ge=0)
    """Drop users and items with fewer events than this, repeatedly until all have it; 0 keeps everything."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """`leave_one_out`: each user's last event is test, the one before validation.
    `temporal`: events from `valid_from` on are validation, from `test_from` on test."""
    valid_from: str = ""
    """First day of the validation period (temporal split), e.g. 1998-03-01."""
    test_from: str = ""
    """First day of the test period (temporal split)."""
    prompt: str = "Compress the following item information into an embedding: "
    """Fixed text before every item's fields."""
    fields: tuple[str, ...] = ()
    """Text fields that the Item LLM reads, in this order; empty: all of the catalogue, in its order."""
    field_template: str = "{name}: {value}"
    """How one text field is written."""
    field_separator: str = "\n"
    """What stands between two text fields."""
    max_tokens: int = Field(256, ge=4)
    """Tokens kept of an item, prompt included, [ITEM] not included."""
