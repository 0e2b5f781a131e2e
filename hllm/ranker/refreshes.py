"""What a feature store could have known when: the refreshes of a period, and what had happened before each.

E events, S refreshes of an entity (a user or an item). Every `every` seconds from `since` on, the features of
all entities with new events are computed from the events *before* that moment, and can be read `lag` seconds
later. So a row of a ranking model's training table never meets a feature that saw the row itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Refreshes:
    """Refresh s knows the events [starts_S[s], ends_S[s]) of its entity."""

    entities_S: Ints
    starts_S: Ints
    ends_S: Ints
    as_of_S: Ints
    """Every event known at refresh s happened before this second (UTC)."""
    available_S: Ints
    """From this second on its features can be read."""

    def __len__(self) -> int:
        return len(self.entities_S)

    def latest(self) -> Ints:
        """The last refresh of every entity: what can be read after the period."""
        newest = np.append(np.diff(self.entities_S) != 0, True) if len(self) else np.zeros(0, bool)
        return np.flatnonzero(newest)


def refreshes(
    offsets: Ints, times_E: Ints, *, since: int, every: int, lag: int, everyone: bool = False
) -> Refreshes:
    """Refreshes of entities whose events are [offsets[n], offsets[n + 1]), each in time order.

    The first one, at `since`, is for entities with earlier events; with `everyone`, for those without any,
    too. Later ones only where something has happened: the features before still hold.
    """
    counts = np.diff(offsets)
    entity_E = np.repeat(np.arange(len(counts)), counts)
    number_E = np.where(times_E < since, 0, (times_E - since) // every + 1)
    changes = (np.diff(entity_E) != 0) | (np.diff(number_E) != 0)
    last_E = np.flatnonzero(np.append(changes, True)) if len(entity_E) else np.zeros(0, np.int64)
    entities, numbers, ends = entity_E[last_E], number_E[last_E], last_E + 1
    if everyone:
        known = np.zeros(len(counts), bool)
        known[entities[numbers == 0]] = True
        unknown = np.flatnonzero(~known)
        entities = np.concatenate([entities, unknown])
        numbers = np.concatenate([numbers, np.zeros(len(unknown), np.int64)])
        ends = np.concatenate([ends, offsets[unknown]])
        order = np.lexsort((numbers, entities))
        entities, numbers, ends = entities[order], numbers[order], ends[order]
    as_of = since + numbers * every
    return Refreshes(entities, np.asarray(offsets)[entities], ends, as_of, as_of + lag)
