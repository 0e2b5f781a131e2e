"""The items nearest to a user's vector: an exact index, and an approximate one for large catalogues.

Q queries, I items, D vector width, K results. Vectors have unit length, so the inner product is the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.errors import DataError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Found = tuple[Ints, Floats]
"""Items (Q, K) and their cosines (Q, K), best first; -1 and -inf where there are fewer."""
LINKS, BUILD_EFFORT, SEARCH_EFFORT = 32, 100, 128
"""HNSW: links of an item, candidates kept while building and while searching (faiss: M, efConstruction,
efSearch)."""
QUERIES_AT_ONCE = 64


class ExactIndex:
    """Every item is compared: nothing to build, nothing missed. Equal scores come in catalogue order."""

    def __init__(self, vectors_ID: Floats) -> None:
        self.vectors_ID = np.asarray(vectors_ID, np.float32)

    def search(self, queries_QD: Floats, k: int, without: Sequence[Ints] = ()) -> Found:
        """The k nearest items of each query; `without`: for each query the items that are left out."""
        k = min(k, len(self.vectors_ID))
        items_QK, scores_QK = _nothing(len(queries_QD), k)
        for begin in range(0, len(queries_QD), QUERIES_AT_ONCE):
            part = slice(begin, begin + QUERIES_AT_ONCE)
            scores_BI = np.asarray(queries_QD[part], np.float32) @ self.vectors_ID.T
            for row, left_out in enumerate(without[part] if len(without) else ()):
                scores_BI[row, left_out] = -np.inf
            for row, scores_I in enumerate(scores_BI):
                best = _best(scores_I, k)
                best = best[np.isfinite(scores_I[best])]
                items_QK[begin + row, : len(best)] = best
                scores_QK[begin + row, : len(best)] = scores_I[best]
        return items_QK, scores_QK


class ApproximateIndex:
    """A graph of near neighbours (HNSW, in faiss): far fewer items are compared, a few are missed."""

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def build(cls, vectors_ID: Floats) -> ApproximateIndex:
        import faiss

        index = faiss.IndexHNSWFlat(
            vectors_ID.shape[1], LINKS
        )  # unit vectors: the nearest have the best cosine
        index.hnsw.efConstruction = BUILD_EFFORT
        index.add(np.ascontiguousarray(vectors_ID, np.float32))
        return cls(index)

    def save(self, path: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(path))

    @classmethod
    def open(cls, path: Path) -> ApproximateIndex:
        """Raises:
        DataError: there is no index in the file.
        """
        import faiss

        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise DataError(f"is no index: {str(error).splitlines()[0]}", where=path) from None

    def search(
        self, queries_QD: Floats, k: int, without: Sequence[Ints] = (), effort: int = SEARCH_EFFORT
    ) -> Found:
        """As `ExactIndex.search`; more `effort` misses fewer items and takes longer."""
        import faiss

        asked = min(k + max((len(items) for items in without), default=0), self.index.ntotal)
        search = faiss.SearchParametersHNSW(efSearch=max(effort, 2 * asked))  # type: ignore[attr-defined]
        distances_QA, near_QA = self.index.search(
            np.ascontiguousarray(queries_QD, np.float32), asked, params=search
        )
        items_QK, scores_QK = _nothing(len(near_QA), min(k, self.index.ntotal))
        for row, near_A in enumerate(near_QA):
            kept = near_A >= 0
            if len(without):
                kept &= ~np.isin(near_A, without[row])
            best = np.flatnonzero(kept)[:k]
            items_QK[row, : len(best)] = near_A[best]
            scores_QK[row, : len(best)] = 1 - distances_QA[row, best] / 2  # |a - b|^2 = 2 - 2 cos
        return items_QK, scores_QK


def _nothing(queries: int, k: int) -> Found:
    return np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32)


def _best(scores_I: Floats, k: int) -> Ints:
    """Places of the k highest scores, best first; of equal scores the first place."""
    if k < len(scores_I):
        limit = np.partition(scores_I, len(scores_I) - k)[len(scores_I) - k]
        surely = np.flatnonzero(scores_I > limit)
        among = np.concatenate([surely, np.flatnonzero(scores_I == limit)[: k - len(surely)]])
    else:
        among = np.arange(len(scores_I))
    return np.asarray(among[np.lexsort((among, -scores_I[among]))][:k], np.int64)
