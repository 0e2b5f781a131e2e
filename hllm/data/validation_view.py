"""The marked view of each table: one row per row, with every rule's question answered in a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet

from hllm.data.engine import duck
from hllm.data.ids import NO_ID
from hllm.data.schema import LONGEST_ID, Rule, text_columns

if TYPE_CHECKING:
    import duckdb


def mark_items(db: duckdb.DuckDBPyConnection, raw: Path, marked: Path, rules: Sequence[Rule]) -> None:
    names = pa.parquet.read_schema(raw).names
    texts = text_columns(names)
    # What the eye does not see is no text: white space, control characters, marks that only format.
    visible = [
        f"length(regexp_replace(coalesce({duck.name(name)}, ''), '[\\p{{Z}}\\p{{C}}]+', '', 'g'))"
        for name in texts
    ]
    lengths = [f"length(coalesce({duck.name(name)}, ''))" for name in texts]
    unreadable = "created_at_raw IS NOT NULL" if "created_at_raw" in names else "false"
    columns = f"""
        row,
        {_known_id("item_id")} AS item_id,
        {_unfit("item_id")} AS item_id_unfit,
        {unreadable} AS created_at_unreadable,
        CASE WHEN {" + ".join(visible) or 0} = 0 THEN 0 ELSE {" + ".join(lengths) or 0} END AS text_chars
    """
    _write(db, f"SELECT {columns} FROM {duck.numbered(raw)}", "item_id", marked, rules)


def mark_interactions(
    db: duckdb.DuckDBPyConnection, raw: Path, items: Path, marked: Path, rules: Sequence[Rule]
) -> None:
    """`items` is the marked catalogue."""
    catalogue = f"""
        SELECT item_id, bool_or(reason IS NULL) AS valid FROM {duck.parquet(items)}
        WHERE item_id IS NOT NULL GROUP BY item_id
    """
    query = f"""
        SELECT log.*, CASE
            WHEN log.item_id IS NULL THEN NULL
            WHEN known.valid THEN 'known'
            WHEN known.item_id IS NULL THEN 'unknown'
            ELSE 'quarantined' END AS catalogue
        FROM (
            SELECT row, {_known_id("user_id")} AS user_id, {_known_id("item_id")} AS item_id, timestamp,
                coalesce(nanos, 0) AS nanos,
                {_unfit("user_id")} AS user_id_unfit, {_unfit("item_id")} AS item_id_unfit,
                CASE WHEN label_raw IS NULL THEN label ELSE -1 END AS label
            FROM {duck.numbered(raw)}
        ) AS log LEFT JOIN ({catalogue}) AS known ON log.item_id = known.item_id
    """
    _write(db, query, "user_id, item_id, timestamp, nanos", marked, rules)


def _write(
    db: duckdb.DuckDBPyConnection, view: str, unique: str, marked: Path, rules: Sequence[Rule]
) -> None:
    """Add `repeats` (later ones among the otherwise good rows of equal `unique` columns) and `reason`.

    Counting first, and joining the few that are there more than once: both spill, where numbering the rows of
    each group within a window would need memory that grows with the log.
    """
    single = [rule for rule in rules if rule.bad != "repeats"]
    reason = "CASE " + " ".join(f"WHEN {rule.bad} THEN {duck.text(rule.reason)}" for rule in single) + " END"
    (repeated,) = (rule.reason for rule in rules if rule.bad == "repeats")
    judged = f"(SELECT *, {reason} AS fault FROM ({view}))"
    db.execute(
        f"""
        CREATE OR REPLACE TABLE repeated AS
        SELECT {unique}, min(row) AS first FROM {judged} WHERE fault IS NULL
        GROUP BY {unique} HAVING count(*) > 1
        """
    )
    db.execute(
        f"""
        COPY (
            SELECT judged.* EXCLUDE (fault), fault IS NULL AND coalesce(row > first, false) AS repeats,
                CASE WHEN repeats THEN {duck.text(repeated)} ELSE fault END AS reason
            FROM {judged} AS judged LEFT JOIN repeated USING ({unique})
            ORDER BY row
        ) TO {duck.text(marked)} (FORMAT parquet, COMPRESSION zstd)
        """
    )
    db.execute("DROP TABLE repeated")


def _unfit(column: str) -> str:
    """Line breaks and tabs are common in ids that people typed, and harm nobody."""
    control = "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]"
    return f"coalesce(strlen({column}) > {LONGEST_ID} OR regexp_matches({column}, '{control}'), false)"


def _known_id(column: str) -> str:
    missing = ", ".join(map(duck.text, NO_ID))
    return f"CASE WHEN trim({column}) = '' OR {column} IN ({missing}) THEN NULL ELSE {column} END"
