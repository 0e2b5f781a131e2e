"""Valid rows here, bad rows there with their reason: every row of a table in exactly one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from hllm.data.engine import duck
from hllm.data.schema import INTERACTIONS, RAW, Rule

if TYPE_CHECKING:
    import duckdb


class Split:
    """An ingested table beside its marked view. All files keep the table's order."""

    def __init__(self, db: duckdb.DuckDBPyConnection, table: str, raw: Path, marked: Path) -> None:
        self.db, self.table = db, table
        self.columns = pa.parquet.read_schema(raw).names
        self.joined = f"{duck.numbered(raw)} AS raw JOIN {duck.parquet(marked)} AS marked USING (row)"

    def write(self, output: Path, rules: Sequence[Rule]) -> dict[str, int]:
        """TABLE.parquet with valid rows, quarantine/TABLE_REASON.parquet with others; rows per reason."""
        canonical = INTERACTIONS.names
        if self.table == "items":
            canonical = [name for name in self.columns if name not in RAW]
        self._copy(canonical, "", "reason IS NULL", output / f"{self.table}.parquet")
        (output / "quarantine").mkdir(exist_ok=True)
        counted = f"SELECT reason, count(*) FROM {self.joined} WHERE reason IS NOT NULL GROUP BY reason"
        counts = dict(self.db.execute(counted).fetchall())
        for rule in rules:
            if rule.reason in counts:
                path = output / "quarantine" / f"{self.table}_{rule.reason}.parquet"
                self._copy(self.columns, ", reason", f"reason = {duck.text(rule.reason)}", path)
        return counts

    def examples(self, rule: Rule) -> tuple[Any, ...]:
        """Three different values that break the rule, the earliest rows first."""
        shown = f"raw.{duck.name(rule.example)}"
        if rule.example == "row":
            shown = "'row ' || (row + 1)"
        elif rule.example == "label":
            shown = "coalesce(raw.label_raw, raw.label::VARCHAR)"
        elif rule.example == "timestamp_raw":
            shown = "coalesce(raw.timestamp_raw, 'nothing')"
        bad = rule.bad.replace(rule.column, f"marked.{rule.column}")
        query = f"""
            SELECT {shown} AS example FROM {self.joined} WHERE {bad}
            GROUP BY example ORDER BY min(row) LIMIT 3
        """
        return tuple(row[0] for row in self.db.execute(query).fetchall())

    def _copy(self, columns: Sequence[str], more: str, where: str, path: Path) -> None:
        chosen = ", ".join(f"raw.{duck.name(name)}" for name in columns)
        query = f"SELECT {chosen}{more} FROM {self.joined} WHERE {where} ORDER BY row"
        self.db.execute(f"COPY ({query}) TO {duck.text(path)} (FORMAT parquet, COMPRESSION zstd)")
