"""Which events train, which are held out for validation and for the test."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from hllm.data.prepared import write_arrays
from hllm.errors import ConfigError, DataError
from hllm.settings import Prepare

if TYPE_CHECKING:
    import duckdb

LEAST_EVENTS = 3
"""Leave-one-out: users with fewer events only train."""


@dataclass(frozen=True)
class HeldOut:
    item_train_events: npt.NDArray[np.int64]
    """Training events of each item."""
    valid: int
    test: int


def write_splits(db: duckdb.DuckDBPyConnection, output: Path, settings: Prepare) -> HeldOut:
    """train_ends, valid_ends and users.parquet.

    Raises:
        ConfigError: a temporal split without its days.
        DataError: nothing is held out.
    """
    train = _train_counts(db, settings)
    users = db.sql("SELECT user_index, user_id, events FROM users ORDER BY user_index").to_arrow_table()
    events = users.column("events").to_numpy()
    starts = np.cumsum(events) - events
    # What comes first has no history to be predicted from: a user's first event is never held out.
    train_ends = starts + np.maximum(train["trained"], 1)
    valid_ends = np.maximum(starts + train["validated"], train_ends)
    write_arrays(output, train_ends=train_ends, valid_ends=valid_ends)
    users = users.append_column("train_events", pa.array(train["trained"], pa.int64()))
    pa.parquet.write_table(users, output / "users.parquet", compression="zstd")
    held_out = HeldOut(
        train["by_item"],
        valid=int((valid_ends - train_ends).sum()),
        test=int((starts + events - valid_ends).sum()),
    )
    if not held_out.test or not held_out.valid:
        _refuse("test" if not held_out.test else "validation", settings)
    return held_out


def _train_counts(db: duckdb.DuckDBPyConnection, settings: Prepare) -> dict[str, npt.NDArray[np.int64]]:
    """Per user: events that train, events that train or validate. Per item: events that train."""
    if settings.split == "leave_one_out":
        held = f"if(events >= {LEAST_EVENTS}, 1, 0)"
        kept = f"events - 2 * {held} AS trained, events - {held} AS validated"
        counts = db.execute(f"SELECT {kept} FROM users ORDER BY user_index")
        per_user = counts.fetchnumpy()
        trains = f"""
            SELECT item_index FROM (
                SELECT item_index, count(*) OVER (PARTITION BY user_index) AS n,
                    row_number() OVER (
                        PARTITION BY user_index ORDER BY timestamp, nanos, row) AS place FROM events
            ) WHERE n < {LEAST_EVENTS} OR place <= n - 2
        """
    else:
        valid_from, test_from = _days(settings)
        per_user = db.execute(
            f"""
            SELECT count(*) FILTER (timestamp < {valid_from}) AS trained,
                count(*) FILTER (timestamp < {test_from}) AS validated
            FROM events GROUP BY user_index ORDER BY user_index
            """
        ).fetchnumpy()
        trains = f"SELECT item_index FROM events WHERE timestamp < {valid_from}"
    by_item = db.execute(
        f"""
        SELECT coalesce(counted.n, 0) AS n FROM items LEFT JOIN
            (SELECT item_index, count(*) AS n FROM ({trains}) GROUP BY item_index) AS counted
            USING (item_index)
        ORDER BY item_index
        """
    ).fetchnumpy()
    found = {"trained": per_user["trained"], "validated": per_user["validated"], "by_item": by_item["n"]}
    return {name: np.asarray(counts, np.int64) for name, counts in found.items()}


def _days(settings: Prepare) -> tuple[int, int]:
    valid_from, test_from = (
        seconds_of_day(f"prepare.{name}", getattr(settings, name)) for name in ("valid_from", "test_from")
    )
    if valid_from >= test_from:
        days = f"prepare.valid_from ({settings.valid_from}) must lie before prepare.test_from"
        raise ConfigError(f"{days} ({settings.test_from})")
    return valid_from, test_from


def seconds_of_day(name: str, day: str) -> int:
    """The first second (UTC) of the day that the setting `name` gives.

    Raises:
        ConfigError: it is not a day.
    """
    try:
        moment = datetime.fromisoformat(day)
    except ValueError:
        raise ConfigError(
            f'{name}: prepare.split = "temporal" needs a day, got {day!r}',
            remedy="Write it as 1998-03-01.",
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _refuse(part: str, settings: Prepare) -> None:
    if settings.split == "leave_one_out":
        raise DataError(f"no user has {LEAST_EVENTS} events, so none can be held out", where="prepare")
    raise DataError(
        f"no event of a user with earlier events falls into the {part} period",
        where="prepare",
        remedy=f"prepare.valid_from is {settings.valid_from}, prepare.test_from is {settings.test_from}.",
    )
