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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hllm.errors import ConfigError
from hllm.models.family import family
from hllm.work.artifacts import clear, write_atomically

if TYPE_CHECKING:
    from hllm.embedding.histories import Histories

# I items, D vector width


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
    def max_history(self) -> int:
        """The latest events that it reads of a history."""
        return int(self.shape["max_history"])

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
    def places(self) -> dict[str, int]:
        """Item id -> its row among the vectors."""
        return {item: number for number, item in enumerate(self.item_ids)}

    @cached_property
    def _user_model(self) -> Any:
        from hllm.models.load import load_user_model

        return load_user_model(self.folder)

    def known(self, histories: Sequence[Sequence[str]]) -> list[npt.NDArray[np.int64]]:
        """The indices of each history's items that this model knows, in order."""
        return [
            np.array([self.places[item] for item in map(str, history) if item in self.places], np.int64)
            for history in histories
        ]

    @property
    def objective(self) -> str:
        """What was learned: generative, early_fusion or late_fusion."""
        return str(self.shape.get("objective", "generative"))

    @property
    def reads_times(self) -> bool:
        """Whether it matters to the model when things happened."""
        asked = getattr(family(self.family).module, "reads_times", None)
        return bool(asked and asked(self.shape))

    def user_vectors(
        self,
        histories: Sequence[Sequence[str]],
        times: Sequence[Sequence[int]] | None = None,
        asked_at: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """The vectors that are published: (B, D), unit length; histories are item ids, oldest first. Unknown
        items are skipped; a history without any known item gives zeros: nothing is known of that user.

        `times` (seconds UTC, as long as the histories) and `asked_at` (one moment each) matter to models that
        read them; without them their times count as unknown.
        """
        return self._vectors(self._asked(histories, times, asked_at), published=True)

    def interest_vectors(
        self,
        histories: Sequence[Sequence[str]],
        times: Sequence[Sequence[int]] | None = None,
        asked_at: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """The predicted next interests, which rank the catalogue: (B, D) as `user_vectors`, and the same
        vectors but for late fusion, whose published ones are the outputs at [USER]."""
        return self._vectors(self._asked(histories, times, asked_at), published=False)

    def scores(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[str]],
        times: Sequence[Sequence[int]] | None = None,
        asked_at: Sequence[int] | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """How probable it is that each user likes each of their candidates (item ids): 0 to 1, in their
        order; nan for an unknown item, and for every item of a user of whom nothing is known.

        Raises:
            ConfigError: the model was trained generatively and has no probabilities.
        """
        if self.objective == "generative":
            raise ConfigError(
                "was trained generatively: it ranks items, and has no probability of an item",
                where=f"model {self.folder}",
                remedy="Train with an objective that judges candidates (hllm.objective).",
            )
        from hllm.embedding.scores import scores_of_candidates

        asked = self._asked(histories, times, asked_at)
        shown = [
            np.array([self.places.get(str(item), -1) for item in items], np.int64)
            for _, items in zip(histories, candidates, strict=True)
        ]
        found = [np.full(len(items), np.nan, np.float32) for items in shown]
        some = np.array([row for row in np.flatnonzero(asked.lengths_R) if (shown[row] >= 0).any()], np.int64)
        if not len(some):
            return found
        known = [np.flatnonzero(shown[row] >= 0) for row in some]
        counts = np.array([len(places) for places in known])
        scores = scores_of_candidates(
            self._user_model,
            self.item_vectors,
            asked.take(some),
            np.concatenate([shown[row][places] for row, places in zip(some, known, strict=True)]),
            counts,
            256,
        )
        for row, places, values in zip(some, known, np.split(scores, np.cumsum(counts)[:-1]), strict=True):
            found[row][places] = values
        return found

    def _vectors(self, asked: Histories, published: bool) -> npt.NDArray[np.float32]:
        from hllm.embedding.users import vectors_of_histories

        vectors = np.zeros((len(asked), self.width), np.float32)
        some = np.flatnonzero(asked.lengths_R)
        if len(some):
            vectors[some] = vectors_of_histories(
                self._user_model,
                self.item_vectors,
                asked.take(some),
                256,
                published=published,
            )
        return vectors

    def _asked(
        self,
        histories: Sequence[Sequence[str]],
        times: Sequence[Sequence[int]] | None,
        asked_at: Sequence[int] | None,
    ) -> Histories:
        """The known items of each history; those of which nothing is known are empty."""
        from hllm.embedding.histories import Histories
        from hllm.models.common.history import UNKNOWN_TIME

        most = self.max_history
        known = [items[-most:] for items in self.known(histories)]
        lengths = np.array([len(items) for items in known], np.int64)
        moments = np.full(int(lengths.sum()), UNKNOWN_TIME)
        if times is not None and len(known):
            moments = np.concatenate(
                [
                    np.array(
                        [at for item, at in zip(map(str, items), when, strict=True) if item in self.places],
                        np.int64,
                    )[-most:]
                    for items, when in zip(histories, times, strict=True)
                ]
            )
        asked = np.full(len(known), UNKNOWN_TIME) if asked_at is None else np.asarray(asked_at, np.int64)
        items = np.concatenate(known) if known else np.empty(0, np.int64)
        return Histories(items, moments, np.cumsum(lengths) - lengths, lengths, asked)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int,
        filter_history: bool = True,
        times: Sequence[Sequence[int]] | None = None,
        asked_at: Sequence[int] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The k best (item id, cosine) for each history, best first; nothing for a history without any known
        item."""
        vectors, known = self.interest_vectors(histories, times, asked_at), self.known(histories)
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
