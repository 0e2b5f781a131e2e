"""Recommendations from the deployed package alone: no training data, no Item LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hllm.embedding.package import Package
from hllm.errors import DataError
from hllm.serving.index import ApproximateIndex, ExactIndex


@dataclass(frozen=True)
class Recommendation:
    item_id: str
    title: str
    score: float
    """Cosine of the user's and the item's vector."""


@dataclass(frozen=True)
class Retriever:
    package: Package
    index: ExactIndex | ApproximateIndex

    @classmethod
    def of(cls, package: Package, approximate: bool = False) -> Retriever:
        """`approximate` pays from some 100,000 items on; building its index takes a while."""
        vectors = package.item_vectors
        return cls(package, ApproximateIndex.build(vectors) if approximate else ExactIndex(vectors))

    def for_history(self, history: Sequence[str], k: int) -> list[Recommendation]:
        """What comes after these items (oldest first), none of them among it.

        Raises:
            DataError: the history is empty, or the model does not know an item of it.
        """
        if not history:
            raise DataError("holds no item", where="history", remedy="Name at least one item.")
        place = self.package.places
        unknown = [item for item in history if item not in place]
        if unknown:
            raise DataError(
                "items that the model does not know",
                where="history",
                count=(len(unknown), len(history)),
                examples=unknown,
                remedy=f"Its catalogue has {len(place):,} items, such as "
                f"{', '.join(map(repr, self.package.item_ids[:3]))}.",
            )
        return self.for_vector(self.package.interest_vectors([list(history)])[0], history, k)

    def for_vector(
        self, vector_D: npt.NDArray[np.float32], seen: Sequence[str], k: int
    ) -> list[Recommendation]:
        """The k nearest items that are not among `seen`; ids that the model does not know do not matter."""
        left_out = np.array(
            [self.package.places[item] for item in seen if item in self.package.places], np.int64
        )
        items_QK, scores_QK = self.index.search(vector_D[None], k, [left_out])
        return [
            Recommendation(self.package.item_ids[item], self.package.titles[item] or "", float(score))
            for item, score in zip(items_QK[0], scores_QK[0], strict=True)
            if item >= 0
        ]
