"""Training batches as a pure function of (seed, step): resuming needs no state but the step's number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.data.windows import cut_windows
from hllm.models.common.history import History
from hllm.models.common.packing import Packing, ragged
from hllm.models.common.recommender import Batch

# S windows, T targets, N negatives


class Batches:
    """Windows over the training part of all histories, shuffled anew each epoch, with the negatives of L_gen
    (HLLM, section 3.3)."""

    def __init__(
        self,
        prepared: Prepared,
        history_length: int,
        batch_size: int,
        negatives: int,
        seed: int,
        users: npt.NDArray[np.bool_] | None = None,
        cold_negatives: bool = True,
    ) -> None:
        """`users` (U,) says whose events train; all when left out. Without `cold_negatives`, items that have
        no training event are no negatives."""
        self.items, self.batch_size, self.seed = prepared.items, batch_size, seed
        self.event_items = np.asarray(prepared.event_items, dtype=np.int64)
        self.event_times = np.asarray(prepared.event_times)
        self.event_labels = np.asarray(prepared.event_labels)
        self.starts, self.ends = cut_windows(
            np.asarray(prepared.train_starts), np.asarray(prepared.train_ends), history_length
        )
        self.users = np.searchsorted(np.asarray(prepared.user_offsets), self.starts, side="right") - 1
        if users is not None:
            chosen = users[self.users]
            self.starts, self.ends, self.users = self.starts[chosen], self.ends[chosen], self.users[chosen]
        # One sorted key per (user, own training item) answers "is this negative the user's own?" by binary
        # search. Held-out events are not in it: leaving them out of the negatives would tell the model what
        # to predict.
        trained = ragged(
            np.asarray(prepared.train_starts),
            np.asarray(prepared.train_ends) - np.asarray(prepared.train_starts),
        )
        owner = np.repeat(
            np.arange(prepared.users), np.asarray(prepared.train_ends) - np.asarray(prepared.train_starts)
        )
        # Items that nobody had in training: as negatives they would be wrong for everybody.
        known = np.arange(prepared.items) if cold_negatives else np.unique(self.event_items[trained])
        self.known_items, self.negatives = known, min(negatives, len(known))
        self.own_keys = np.unique(owner * prepared.items + self.event_items[trained])
        self.text_I = numbered_texts(prepared)

    def labels(self) -> tuple[int, int]:
        """How many training targets of an epoch have label 0, and how many label 1."""
        lengths = self.ends - self.starts - 1
        targets = self.event_labels[ragged(self.starts + 1, lengths)]
        return int((targets == 0).sum()), int((targets == 1).sum())

    @property
    def windows(self) -> int:
        return len(self.starts)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.windows // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(self.windows)
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        lengths = self.ends[chosen] - self.starts[chosen] - 1
        chosen = chosen[np.argsort(lengths, kind="stable")]
        lengths = np.sort(lengths)
        positions = ragged(self.starts[chosen], lengths)
        targets_T, negatives_N = self.event_items[positions + 1], self._draw(step)
        return Batch(
            history=History(
                Packing(lengths),
                self.event_items[positions],
                self.event_times[positions],
                self.event_times[positions + 1],
            ),
            targets_T=targets_T,
            negatives_N=negatives_N,
            own_SN=self._own(self.users[chosen], negatives_N),
            target_texts_T=self.text_I[targets_T],
            negative_texts_N=self.text_I[negatives_N],
            labels_T=self.event_labels[positions + 1],
        )

    def _draw(self, step: int) -> npt.NDArray[np.int64]:
        """Uniform from the catalogue without repeats."""
        if self.negatives == len(self.known_items):
            return self.known_items
        drawn = np.random.default_rng((self.seed, 2, step)).choice(
            len(self.known_items), self.negatives, replace=False, shuffle=False
        )
        return self.known_items[drawn]

    def _own(
        self, users_S: npt.NDArray[np.int64], negatives_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        keys_SN = users_S[:, None] * self.items + negatives_N[None, :]
        places = np.minimum(np.searchsorted(self.own_keys, keys_SN), len(self.own_keys) - 1)
        return self.own_keys[places] == keys_SN


def training_users(users: int, share: float, seed: int) -> npt.NDArray[np.bool_] | None:
    """(U,) who is in a random share of the users, at least one of them; None when that is everybody. With one
    seed, a smaller share is part of a larger one."""
    if share >= 1:
        return None
    chosen = np.zeros(users, bool)
    chosen[np.random.default_rng((seed, 3)).permutation(users)[: max(1, round(share * users))]] = True
    return chosen


def numbered_texts(prepared: Prepared) -> npt.NDArray[np.int64]:
    """(I,) the first item that reads exactly as this one does, prompt and truncation included."""
    tokens, offsets = np.asarray(prepared.token_ids), np.asarray(prepared.token_offsets)
    first: dict[bytes, int] = {}
    return np.fromiter(
        (
            first.setdefault(tokens[offsets[item] : offsets[item + 1]].tobytes(), item)
            for item in range(prepared.items)
        ),
        np.int64,
        prepared.items,
    )
