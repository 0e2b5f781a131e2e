from __future__ import annotations

import numpy as np
import pytest

from hllm.errors import DataError
from hllm.serving.retriever import Retriever
from tests.evaluation.world import SmallPackage, unit


class TitledPackage(SmallPackage):
    """As the deployed package, with a user model that takes the mean."""

    def __init__(self, items: int = 30) -> None:
        super().__init__([f"i{item}" for item in range(items)], unit(np.random.default_rng(4), items, 8))
        self.places, self.titles = self.row_of, [f"Item {item}" for item in range(items)]

    def interest_vectors(self, histories, times=None, asked_at=None):
        return super().interest_vectors(histories, times, asked_at)


@pytest.mark.parametrize("approximate", [False, True])
def test_the_nearest_items_with_their_titles_and_without_what_was_seen(approximate):
    package = TitledPackage()
    history = ["i3", "i7"]
    found = Retriever.of(package, approximate).for_history(history, 5)
    cosines = package.item_vectors @ package.interest_vectors([history])[0]
    cosines[[3, 7]] = -np.inf
    assert [one.item_id for one in found] == [f"i{item}" for item in np.argsort(-cosines)[:5]]
    assert all(one.title == f"Item {one.item_id[1:]}" for one in found)
    if not approximate:  # its scores are cosines of unit vectors, and a mean of two is shorter
        assert [one.score for one in found] == pytest.approx(np.sort(cosines)[::-1][:5].tolist(), abs=1e-6)


def test_seen_items_that_the_model_does_not_know_do_not_matter():
    package = TitledPackage()
    vector = package.item_vectors[4]
    found = Retriever.of(package).for_vector(vector, ["i4", "sold out long ago"], 3)
    assert "i4" not in {one.item_id for one in found}
    assert len(found) == 3


def test_unknown_items_are_named():
    retriever = Retriever.of(TitledPackage())
    with pytest.raises(DataError, match=r"does not know \(2 of 3\) \(e.g. 'x', 'y'\)") as error:
        retriever.for_history(["i1", "x", "y"], 5)
    assert "30 items, such as 'i0', 'i1', 'i2'" in str(error.value)
    with pytest.raises(DataError, match="history: holds no item"):
        retriever.for_history([], 5)
