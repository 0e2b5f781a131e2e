from __future__ import annotations

import numpy as np
import pytest

from hllm.report.changes import RECOMMENDED, changes
from hllm.settings import Settings
from tests.evaluation.world import SmallPackage, prepare, random_histories, unit


class TitledPackage(SmallPackage):
    def __init__(self, item_ids: list[str], item_vectors: np.ndarray) -> None:
        super().__init__(item_ids, item_vectors)
        self.places, self.titles = self.row_of, [f"Title of {item}" for item in item_ids]

    def interest_vectors(self, histories, times, asked_at):
        known = [[item for item in history if item in self.places] for history in histories]
        return super().interest_vectors(known, times, asked_at)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    histories = random_histories(np.random.default_rng(3), users=30, items=40)
    return prepare(tmp_path_factory.mktemp("prepared"), histories, items=40)


ITEMS = [f"i{item}" for item in range(40)]
VECTORS = unit(np.random.default_rng(1), 40, 8)


def test_the_same_model_changes_nothing(prepared):
    same = TitledPackage(ITEMS, VECTORS)
    found = changes(Settings(), prepared, same, same)
    assert (found["asked"], found["overlap"], found["unchanged"]) == (30, 1.0, 30)
    assert all(row["before"] == row["now"] for row in found["neighbours"])
    events = [row["events"] for row in found["neighbours"]]
    assert events == sorted(events, reverse=True)


def test_users_whose_ten_changed_most_come_first_and_see_nothing_they_had(prepared):
    champion = TitledPackage(ITEMS, VECTORS)
    moved = VECTORS.copy()
    moved[:12] = unit(np.random.default_rng(2), 12, 8)
    found = changes(Settings(), prepared, TitledPackage(ITEMS, moved), champion)
    kept = [user["kept"] for user in found["users"]]
    assert kept == sorted(kept)
    assert kept[0] < RECOMMENDED
    assert 0 < found["overlap"] < 1
    offsets = prepared.user_offsets
    for user in found["users"]:
        row = int(user["user_id"].removeprefix("u"))
        had = {f"i{item}" for item in prepared.event_items[offsets[row] : offsets[row + 1]]}
        assert not had & {item["item_id"] for item in (*user["before"], *user["now"])}
    for row in found["neighbours"]:  # beside the definition
        place = champion.places[row["item_id"]]
        cosines = VECTORS @ VECTORS[place]
        cosines[place] = -np.inf
        assert [item["item_id"] for item in row["before"]] == [f"i{at}" for at in np.argsort(-cosines)[:5]]


def test_models_of_other_catalogues_are_compared_where_they_meet(prepared):
    champion = TitledPackage(ITEMS[10:], VECTORS[10:])
    found = changes(Settings(), prepared, TitledPackage(ITEMS[:30], VECTORS[:30]), champion)
    both = set(ITEMS[10:30])
    assert {row["item_id"] for row in found["neighbours"]} <= both
    stranger = TitledPackage(["x", "y"], VECTORS[:2])
    nobody = changes(Settings(), prepared, stranger, champion)
    assert (nobody["asked"], nobody["users"], nobody["neighbours"]) == (0, [], [])
