"""What would change for people: recommendations of users, neighbours of well-known items.

The candidate beside the champion: both are asked through their deployable packages, about the same users and
the same catalogue.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.embedding.package import Package
from hllm.serving.index import ExactIndex
from hllm.settings import Settings

Ints = npt.NDArray[np.int64]
NEIGHBOURS, KNOWN_ITEMS = 5, 8
RECOMMENDED, USERS_SHOWN = 10, 8
MOST_USERS = 2_000
"""Users who are asked about: all up to so many, random ones of more."""


def changes(settings: Settings, prepared: Prepared, candidate: Package, champion: Package) -> dict[str, Any]:
    """For the report: `neighbours` of the items with the most training events, and the `users` whose first
    ten changed most, with `overlap`, the share of the first ten that stays, over all users asked about."""
    return {
        "neighbours": _neighbours(prepared, candidate, champion),
        **_users(settings, prepared, candidate, champion),
    }


def _neighbours(prepared: Prepared, candidate: Package, champion: Package) -> list[dict[str, Any]]:
    """The best-known items that both models know, and what each holds nearest to them."""
    table = prepared.item_table(["item_id", "title", "train_events"]).to_pydict()
    order = np.argsort(-np.asarray(table["train_events"]), kind="stable")
    both = (
        row
        for row in order
        if table["item_id"][row] in candidate.places and table["item_id"][row] in champion.places
    )
    found = []
    for _, row in zip(range(KNOWN_ITEMS), both, strict=False):
        item = table["item_id"][row]
        now, before = (_nearest(package, item) for package in (candidate, champion))
        found.append(
            {
                "item_id": item,
                "title": table["title"][row] or item,
                "events": int(table["train_events"][row]),
                "before": _named(champion, before),
                "now": _named(candidate, now),
            }
        )
    return found


def _nearest(package: Package, item: str) -> Ints:
    place = package.places[item]
    found_1K, _ = ExactIndex(package.item_vectors).search(
        package.item_vectors[place][None], NEIGHBOURS, [np.array([place])]
    )
    return found_1K[0][found_1K[0] >= 0]


def _users(settings: Settings, prepared: Prepared, candidate: Package, champion: Package) -> dict[str, Any]:
    offsets = np.asarray(prepared.user_offsets)
    active = np.flatnonzero(np.diff(offsets))
    drawn = np.random.default_rng(settings.run.seed).permutation(len(active))[:MOST_USERS]
    asked = np.sort(active[drawn])
    ids = prepared.item_table(["item_id"])["item_id"].to_pylist()
    users = prepared.user_table(["user_id"])["user_id"].to_pylist()
    histories, times, moments = [], [], np.full(len(asked), int(prepared.event_times.max()))
    for user in asked:
        span = slice(offsets[user], offsets[user + 1])  # each package takes as much of it as it reads
        histories.append([ids[item] for item in prepared.event_items[span]])
        times.append(prepared.event_times[span].tolist())
    seen = [{ids[item] for item in prepared.event_items[offsets[user] : offsets[user + 1]]} for user in asked]
    known = [
        row
        for row, history in enumerate(histories)
        if _knows(champion, history) and _knows(candidate, history)
    ]
    if not known:
        return {"asked": 0, "overlap": None, "unchanged": 0, "users": []}
    now, before = (
        _recommended(
            package,
            [histories[row] for row in known],
            [times[row] for row in known],
            moments[known].tolist(),
            [seen[row] for row in known],
        )
        for package in (candidate, champion)
    )
    kept = np.array([len(set(mine) & set(theirs)) for mine, theirs in zip(now, before, strict=True)])
    most_changed = np.argsort(kept, kind="stable")[:USERS_SHOWN]
    names = [dict(zip(package.item_ids, package.titles, strict=True)) for package in (candidate, champion)]

    def titled(item: str) -> dict[str, str]:
        return {"item_id": item, "title": names[0].get(item) or names[1].get(item) or item}

    return {
        "asked": len(known),
        "overlap": float(kept.mean() / RECOMMENDED),
        "unchanged": int((kept == RECOMMENDED).sum()),
        "users": [
            {
                "user_id": users[asked[known[row]]],
                "events": int(offsets[asked[known[row]] + 1] - offsets[asked[known[row]]]),
                "kept": int(kept[row]),
                "history": [titled(item) for item in histories[known[row]][-NEIGHBOURS:]],
                "before": [titled(item) for item in before[row][:NEIGHBOURS]],
                "now": [titled(item) for item in now[row][:NEIGHBOURS]],
            }
            for row in most_changed
        ],
    }


def _knows(package: Package, history: list[str]) -> bool:
    return any(item in package.places for item in history)


def _recommended(
    package: Package,
    histories: list[list[str]],
    times: list[list[int]],
    moments: list[int],
    seen: list[set[str]],
) -> list[list[str]]:
    """The first ten of each user, without what they have had."""
    vectors_UD = package.interest_vectors(histories, times, moments)
    left_out = [
        np.array([package.places[item] for item in items if item in package.places], np.int64)
        for items in seen
    ]
    found_UK, _ = ExactIndex(package.item_vectors).search(vectors_UD, RECOMMENDED, left_out)
    return [[package.item_ids[item] for item in row if item >= 0] for row in found_UK]


def _named(package: Package, rows: Ints) -> list[dict[str, str]]:
    return [
        {"item_id": package.item_ids[row], "title": package.titles[row] or package.item_ids[row]}
        for row in rows
    ]
