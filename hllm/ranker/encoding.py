"""Features as numbers that a network can take: fitted on the training rows, kept with the weights as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.ranker.features import Features

# R rows, N numbers, C categories

UNKNOWN = 0
PRIOR_EVENTS = 10.0
"""A share of likes counts as if so many events with the average share had come before."""
NUMBERS = 8
"""Log of events, share of likes, log of the seconds since the last event, and whether all that is missing:
of the user and of the item."""


@dataclass(frozen=True)
class Encoded:
    users_R: npt.NDArray[np.int64]
    items_R: npt.NDArray[np.int64]
    numbers_RN: npt.NDArray[np.float32]
    categories_RC: npt.NDArray[np.float32]
    """The item's categories, as shares that sum to one."""


@dataclass(frozen=True)
class Encoding:
    users: list[str]
    items: list[str]
    categories: list[str]
    like_rate: float
    means: list[float]
    scales: list[float]

    @classmethod
    def fitted(cls, features: Features, labels_R: npt.NDArray[np.int64], least_events: int = 2) -> Encoding:
        """Ids with fewer rows than `least_events` count as unknown, so that unknown is something to learn."""
        rate = float(labels_R.mean())
        raw_RN = _numbers(features, rate)
        words = Counter(word for words in features.categories_R for word in words)
        return cls(
            users=_often(features.user_ids_R, least_events),
            items=_often(features.item_ids_R, least_events),
            categories=sorted(words),
            like_rate=rate,
            means=raw_RN.mean(axis=0).tolist(),
            scales=np.maximum(raw_RN.std(axis=0), 1e-6).tolist(),
        )

    def __call__(self, features: Features) -> Encoded:
        numbers_RN = (_numbers(features, self.like_rate) - np.array(self.means)) / np.array(self.scales)
        place = {word: number for number, word in enumerate(self.categories)}
        shares_RC = np.zeros((len(features), max(len(place), 1)), np.float32)
        for row, words in enumerate(features.categories_R):
            known = [place[word] for word in words if word in place]
            shares_RC[row, known] = 1 / max(len(known), 1)
        return Encoded(
            _places(features.user_ids_R, self.users),
            _places(features.item_ids_R, self.items),
            numbers_RN.clip(-5, 5).astype(np.float32),
            shares_RC,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _often(ids_R: npt.NDArray[np.object_], least: int) -> list[str]:
    return sorted(name for name, count in Counter(ids_R.tolist()).items() if count >= least)


def _places(ids_R: npt.NDArray[np.object_], known: list[str]) -> npt.NDArray[np.int64]:
    place = {name: number + 1 for number, name in enumerate(known)}
    return np.array([place.get(name, UNKNOWN) for name in ids_R], np.int64)


def _numbers(features: Features, like_rate: float) -> npt.NDArray[np.float64]:
    columns = []
    for first in (0, 3):
        events_R, likes_R, last_R = features.counts_R6[:, first : first + 3].T
        missing_R = np.isnan(events_R)
        events_R, likes_R = np.nan_to_num(events_R), np.nan_to_num(likes_R)
        ago_R = np.where(np.isnan(last_R), np.nan, np.maximum(features.times_R - last_R, 0))
        columns += [
            np.log1p(events_R),
            (likes_R + PRIOR_EVENTS * like_rate) / (events_R + PRIOR_EVENTS),
            np.nan_to_num(np.log1p(ago_R), nan=LONG_AGO),
            missing_R.astype(np.float64),
        ]
    return np.stack(columns, axis=1)


LONG_AGO = float(np.log1p(365 * 86_400))
"""Of what has never happened."""
