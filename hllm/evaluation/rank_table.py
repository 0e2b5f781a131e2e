"""Ranks as a table: one row per model and held-out event, from which anyone can compute another metric."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hllm.errors import DataError
from hllm.models.common.ranking import HeldOut, Ranks


def rank_table(label: str, held_out: HeldOut, ranks: Ranks):  # type: ignore[no-untyped-def]
    """The ranks of one model as an Arrow table, one row per held-out event."""
    import pyarrow as arrow

    return arrow.table(
        {
            "model": arrow.array([label] * len(held_out), arrow.string()),
            "user_index": held_out.users_R,
            "item_index": held_out.targets_R,
            "position": held_out.positions_R,
            "rank_filtered": ranks.filtered_R,
            "rank_unfiltered": ranks.unfiltered_R,
        }
    )


def write_ranks(path: Path, held_out: HeldOut, ranks: Mapping[str, Ranks]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    tables = [rank_table(label, held_out, model) for label, model in ranks.items()]
    parquet.write_table(arrow.concat_tables(tables), path, compression="zstd")


def read_ranks(path: Path, label: str, held_out: HeldOut) -> Ranks:
    """The ranks of one model as they were written for the same held-out events."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, filters=[("model", "=", label)])
    if not np.array_equal(table["position"].to_numpy(), held_out.positions_R):
        raise DataError(
            f"the ranks of {label} belong to other held-out events",
            where=path,
            remedy="Run `hllm evaluate` again.",
        )
    return Ranks(table["rank_filtered"].to_numpy().copy(), table["rank_unfiltered"].to_numpy().copy())
