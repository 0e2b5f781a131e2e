"""Cold, long-tail and other: where a recommender earns its keep is not where most events are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.models.common.ranking import HeldOut, training_counts
from hllm.settings import Evaluation

NAMES = ("cold", "long_tail", "other")


def segments(prepared: Prepared, held_out: HeldOut, settings: Evaluation) -> dict[str, npt.NDArray[np.bool_]]:
    """Which held-out events belong to each segment, by training events of their item and of their user."""
    of_item = training_counts(prepared)[held_out.targets_R]
    of_user = prepared.user_table(["train_events"])["train_events"].to_numpy()[held_out.users_R]
    return {
        **split("item", of_item, settings.cold_item_events, settings.long_tail_item_events),
        **split("user", of_user, settings.cold_user_events, settings.long_tail_user_events),
    }


def split(
    kind: str, events_R: npt.NDArray[np.int64], cold: int, long_tail: int
) -> dict[str, npt.NDArray[np.bool_]]:
    """At most `cold` events: cold. More, but at most `long_tail`: long tail. The rest: other."""
    is_cold, is_tail = events_R <= cold, (events_R > cold) & (events_R <= long_tail)
    return dict(
        zip(
            (f"{kind}:{name}" for name in NAMES),
            (is_cold, is_tail, events_R > max(cold, long_tail)),
            strict=True,
        )
    )


SEGMENTS = {"cold": "cold", "long_tail": "long tail", "other": "other"}
FEW_USERS = 30
"""An interval from fewer users is not to be trusted."""


def segment_name(segment: str) -> str:
    kind, _, name = segment.partition(":")
    return f"{SEGMENTS[name]} {kind}s"


def segment_limit(segment: str, limits: Mapping[str, int]) -> str:
    """`1 to 29 training events`."""
    kind, _, name = segment.partition(":")
    cold, tail = limits[f"{kind}:cold"], limits[f"{kind}:long_tail"]
    if name == "cold":
        return f"at most {cold:,} training events" if cold else "no training events"
    if name == "other":
        return f"more than {max(cold, tail):,} training events"
    return f"{cold + 1:,} to {tail:,} training events"
