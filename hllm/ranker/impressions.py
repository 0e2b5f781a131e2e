"""What a ranking model learns from: events with a label, in three periods one after another.

... prepare.test_from      the model behind the vectors was trained and chosen on what came before
... ranking.valid_from     these train the ranker
... ranking.test_from      these choose the ranker's best epoch
... end                    these test it
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.data.splits import seconds_of_day
from hllm.errors import ConfigError, DataError
from hllm.settings import Settings

Ints = npt.NDArray[np.int64]
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Periods:
    """Seconds UTC."""

    since: int
    valid_from: int
    test_from: int

    @classmethod
    def of(cls, settings: Settings) -> Periods:
        """Raises:
        ConfigError: the split is not temporal, a day is missing, or they are not in order.
        """
        if settings.prepare.split != "temporal":
            raise ConfigError(
                'a ranker needs prepare.split = "temporal"',
                where=f'prepare.split = "{settings.prepare.split}"',
                remedy="Otherwise the vectors have been trained on what happened after the ranker's rows.",
            )
        days = {
            "prepare.test_from": settings.prepare.test_from,
            "ranking.valid_from": settings.ranking.valid_from,
            "ranking.test_from": settings.ranking.test_from,
        }
        found = [seconds_of_day(name, day) for name, day in days.items()]
        if not found[0] < found[1] < found[2]:
            raise ConfigError(
                "the days must follow one another",
                where=", ".join(f"{name} = {day}" for name, day in days.items()),
            )
        return cls(*found)


@dataclass(frozen=True)
class Impressions:
    """R labelled events of the three periods, in time order."""

    users_R: Ints
    items_R: Ints
    times_R: Ints
    labels_R: Ints
    """1: liked, 0: not."""
    parts_R: Ints
    """Place in `PARTS`."""

    @classmethod
    def of(cls, prepared: Prepared, periods: Periods) -> Impressions:
        """Raises:
        DataError: the log has no labels, or a period has no labelled events of both kinds.
        """
        times_E, labels_E = np.asarray(prepared.event_times), np.asarray(prepared.event_labels)
        users_E = np.repeat(np.arange(prepared.users), np.diff(prepared.user_offsets))
        rows = np.flatnonzero((times_E >= periods.since) & (labels_E >= 0))
        rows = rows[np.argsort(times_E[rows], kind="stable")]
        times_R = times_E[rows]
        parts_R = np.searchsorted([periods.valid_from, periods.test_from], times_R, side="right")
        labels_R = labels_E[rows].astype(np.int64)
        for number, part in enumerate(PARTS):
            if len(np.unique(labels_R[parts_R == number])) < 2:
                raise DataError(
                    f"the {part} period has no labelled events of both kinds",
                    where="rank",
                    count=(int((parts_R == number).sum()), len(rows)),
                    remedy="Labels come from data.columns.label (or data.positive_rating); the periods from "
                    "prepare.test_from, ranking.valid_from and ranking.test_from.",
                )
        return cls(
            users_E[rows], np.asarray(prepared.event_items)[rows].astype(np.int64), times_R, labels_R, parts_R
        )

    def __len__(self) -> int:
        return len(self.labels_R)


def known_events(prepared: Prepared, before: int) -> tuple[Ints, Ints]:
    """Events of every user (U,) and of every item (I,) before a moment."""
    times_E = np.asarray(prepared.event_times)
    users_E = np.repeat(np.arange(prepared.users), np.diff(prepared.user_offsets))
    earlier = times_E < before
    return (
        np.bincount(users_E[earlier], minlength=prepared.users).astype(np.int64),
        np.bincount(np.asarray(prepared.event_items)[earlier], minlength=prepared.items).astype(np.int64),
    )
