"""The deployable model: user weights, item vectors and ids in one folder, with no Item LLM and no training
data.

model.json  user.safetensors  items.safetensors {"vectors": (I, D)}  items.parquet (item_id, title)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.artifacts import clear, write_atomically

# B histories, I items, D vector width


def write_package(
    folder: Path, train: Path, vectors_ID: npt.NDArray[np.float32], titles: Any, max_history: int
) -> None:
    """Pack a trained user model with the item vectors; `titles`: an Arrow table (item_id, title) aligned with
    the vectors."""
    import pyarrow.parquet as parquet
    from safetensors.numpy import save_file

    clear(folder)
    folder.mkdir(parents=True)
    shutil.copy(train / "user.safetensors", folder)
    shape = {**json.loads((train / "model.json").read_text("utf-8")), "max_history": max_history}
    save_file({"vectors": np.ascontiguousarray(vectors_ID, np.float32)}, folder / "items.safetensors")
    parquet.write_table(titles, folder / "items.parquet")
    write_atomically(folder / "model.json", json.dumps(shape, indent=1, sort_keys=True).encode())


@dataclass(frozen=True)
class Package:
    folder: Path

    @classmethod
    def open(cls, folder: Path | str) -> Package:
        return cls(Path(folder))

    @cached_property
    def shape(self) -> dict[str, Any]:
        return json.loads((self.folder / "model.json").read_text("utf-8"))

    @property
    def family(self) -> str:
        return str(self.shape["family"])

    @property
    def width(self) -> int:
        return int(self.shape["width"])

    @cached_property
    def item_vectors(self) -> npt.NDArray[np.float32]:
        """(I, D), unit length."""
        from safetensors.numpy import load_file

        return load_file(self.folder / "items.safetensors")["vectors"]

    @cached_property
    def item_ids(self) -> list[str]:
        return self._table["item_id"].to_pylist()

    @cached_property
    def titles(self) -> list[str]:
        return self._table["title"].to_pylist()

    @cached_property
    def _table(self) -> Any:
        import pyarrow.parquet as parquet

        return parquet.read_table(self.folder / "items.parquet")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {item: number for number, item in enumerate(self.item_ids)}

    @cached_property
    def _user_model(self) -> Any:
        from hllm.models.load import load_user_model

        return load_user_model(self.folder)

    def known(self, histories: Sequence[Sequence[str]]) -> list[npt.NDArray[np.int64]]:
        """The indices of each history's items that this model knows, in order."""
        return [
            np.array([self._index[item] for item in map(str, history) if item in self._index], np.int64)
            for history in histories
        ]

    def user_vectors(
        self,
        histories: Sequence[Sequence[str]],
        times: Sequence[Sequence[int]] | None = None,
        asked_at: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """(B, D), unit length; histories are item ids, oldest first. Unknown items are skipped; a history
        without any known item gives zeros: nothing is known of that user.

        `times` (seconds UTC, as long as the histories) and `asked_at` (one moment each) matter to models that
        read them; without them their times count as unknown.
        """
        from hllm.embedding.users import vectors_of_histories
        from hllm.models.history import UNKNOWN_TIME

        most = int(self.shape["max_history"])
        known = [items[-most:] for items in self.known(histories)]
        lengths = np.array([len(items) for items in known], np.int64)
        vectors = np.zeros((len(known), self.width), np.float32)
        some = np.flatnonzero(lengths)
        if not len(some):
            return vectors
        moments = np.full(int(lengths.sum()), UNKNOWN_TIME)
        if times is not None:
            moments = np.concatenate(
                [
                    np.array(
                        [at for item, at in zip(map(str, items), when, strict=True) if item in self._index],
                        np.int64,
                    )[-most:]
                    for items, when in zip(histories, times, strict=True)
                ]
            )
        asked = np.full(len(known), UNKNOWN_TIME) if asked_at is None else np.asarray(asked_at, np.int64)
        vectors[some] = vectors_of_histories(
            self._user_model,
            self.item_vectors,
            np.concatenate(known),
            moments,
            (np.cumsum(lengths) - lengths)[some],
            lengths[some],
            asked[some],
            256,
        )
        return vectors

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int, filter_history: bool = True
    ) -> list[list[tuple[str, float]]]:
        """The k best (item id, cosine) for each history, best first; nothing for a history without any known
        item."""
        vectors, known = self.user_vectors(histories), self.known(histories)
        found: list[list[tuple[str, float]]] = []
        for vector, items in zip(vectors, known, strict=True):
            if not len(items):
                found.append([])
                continue
            scores = self.item_vectors @ vector
            if filter_history:
                scores[items] = -np.inf
            best = np.argsort(-scores, kind="stable")[:k]
            found.append(
                [(self.item_ids[item], float(scores[item])) for item in best if np.isfinite(scores[item])]
            )
        return found
