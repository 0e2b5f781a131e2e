"""A model family's three verbs - vectors for items, vectors for users given histories, a loss for a batch -
and its pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.history import History
from hllm.models.common.packing import Packing, on_device, ragged

EXCLUDED = -1e4
"""A logit that weighs nothing, yet keeps the gradient finite where every negative is excluded."""

# T targets of all windows, N negatives, K distinct items of the batch, S windows, D vector width


@dataclass(frozen=True)
class Batch:
    """Windows of events, packed: at each of T positions a history event and the event that followed it."""

    history: History
    targets_T: npt.NDArray[np.int64]
    negatives_N: npt.NDArray[np.int64]
    own_SN: npt.NDArray[np.bool_]
    """Whether a negative is among the window's user's own training items."""
    target_texts_T: npt.NDArray[np.int64]
    negative_texts_N: npt.NDArray[np.int64]
    """Numbers of the items' texts: equal where two items read the same."""
    labels_T: npt.NDArray[np.int8] | None = None
    """1, 0 or -1 (unknown) of every target's event; discriminative objectives need them."""
    whole: Batch | None = None
    """The batch that this one is a part of; its loss is a share of the whole's."""

    @property
    def distinct_K(self) -> npt.NDArray[np.int64]:
        """(K,) every item that occurs, once, sorted."""
        return np.unique(np.concatenate([self.history.items_T, self.targets_T, self.negatives_N]))

    def part(self, windows_P: npt.NDArray[np.int64]) -> Batch:
        """Some of its windows (not decreasing), with all of its negatives. The losses of parts that together
        have every window once add up to the loss of the whole, and so do their gradients."""
        packing, history = self.history.packing, self.history
        lengths_P = packing.lengths_S[windows_P]
        rows = ragged(packing.starts_S[windows_P], lengths_P)
        cut: dict[str, Any] = {}
        for column in fields(self):
            values = getattr(self, column.name)
            if values is not None and column.name.endswith("_T"):
                cut[column.name] = values[rows]
            elif values is not None and column.name.endswith("_SN"):
                cut[column.name] = values[windows_P]
        return replace(
            self,
            **cut,
            history=History(
                Packing(lengths_P), history.items_T[rows], history.times_T[rows], history.next_times_T[rows]
            ),
            whole=self.whole or self,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it by name, to be looked at."""
        history = self.history
        arrays = {
            "lengths": history.packing.lengths_S,
            "items": history.items_T,
            "times": history.times_T,
            "targets": self.targets_T,
            "negatives": self.negatives_N,
            "own": self.own_SN,
        }
        if self.labels_T is not None:
            arrays["labels"] = self.labels_T
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


class Recommender(nn.Module):
    """Items and users in one space: an item side (`items`) and a user side (`user`), trained by InfoNCE."""

    def __init__(self, items: Any, user: nn.Module, temperature: float) -> None:
        super().__init__()
        self.items, self.user = items, user
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def item_vectors(self, items_K: npt.NDArray[np.integer]) -> Tensor:
        """(K,) item indices -> (K, D), unit length."""
        vectors_KD: Tensor = self.items(items_K)
        return vectors_KD

    def user_vectors(self, vectors_TD: Tensor, history: History) -> Tensor:
        """(T, D) item vectors of packed histories -> (T, D) next-interest vectors, unit length."""
        outputs_TD: Tensor = self.user(vectors_TD, history)
        return outputs_TD

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, from 1 to 100."""
        bounded: Tensor = _Bounded.apply(self.log_scale, 0.0, math.log(100.0))  # type: ignore[no-untyped-call]
        return bounded.exp()

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a whole batch; every distinct item is encoded once."""
        loss: Tensor = self(batch, batch.distinct_K, self.item_vectors(batch.distinct_K))
        return loss

    def forward(self, batch: Batch, distinct_K: npt.NDArray[np.int64], vectors_KD: Tensor) -> Tensor:
        """The loss of a batch, or a part's share of the whole's, from the vectors of all its items (and
        perhaps others), sorted."""
        device = vectors_KD.device
        # Not by indexing: on several threads its gradients add up in another order every time.
        history_TD, targets_TD, negatives_ND = (
            F.embedding(on_device(np.searchsorted(distinct_K, items), device), vectors_KD)
            for items in (batch.history.items_T, batch.targets_T, batch.negatives_N)
        )
        return self.windows_loss(batch, history_TD, targets_TD, negatives_ND)

    def windows_loss(
        self, batch: Batch, history_TD: Tensor, targets_TD: Tensor, negatives_ND: Tensor
    ) -> Tensor:
        """The loss from the vectors of history, targets and negatives."""
        return self.generative_loss(
            batch, self.user_vectors(history_TD, batch.history), targets_TD, negatives_ND
        )

    def generative_loss(
        self, batch: Batch, outputs_TD: Tensor, targets_TD: Tensor, negatives_ND: Tensor
    ) -> Tensor:
        """L_gen (HLLM, section 3.3): the mean InfoNCE over the batch's targets, or a part's share of it."""
        excluded_TN = no_negatives(batch, outputs_TD.device)
        generated = info_nce(outputs_TD, targets_TD, negatives_ND, excluded_TN, self.scale)
        if batch.whole is not None:
            generated = generated * (len(batch.targets_T) / len(batch.whole.targets_T))
        return generated


class _Bounded(torch.autograd.Function):
    """Clamps, and drops the gradient only where following it would lead further out: what once went past a
    bound, by an optimizer's momentum, can come back."""

    @staticmethod
    def forward(context: Any, value: Tensor, low: float, high: float) -> Tensor:
        context.save_for_backward(value)
        context.bounds = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (value,), (low, high) = context.saved_tensors, context.bounds
        outwards = ((value > high) & (gradient < 0)) | ((value < low) & (gradient > 0))
        return gradient.masked_fill(outwards, 0.0), None, None


def labels_of(batch: Batch) -> npt.NDArray[np.int8]:
    if batch.labels_T is None:
        raise ValueError("a discriminative objective is trained on labelled events")
    return batch.labels_T


def share_of_labels(batch: Batch) -> float:
    """What part of the labelled targets of its whole a batch has: 1 where it is one itself."""
    if batch.whole is None:
        return 1.0
    known, every = (int((labels_of(each) >= 0).sum()) for each in (batch, batch.whole))
    return known / max(every, 1)


def no_negatives(batch: Batch, device: torch.device) -> Tensor:
    """(T, N): the user's own items, and items that read exactly as the target does."""
    window_T = on_device(batch.history.packing.sequence_T, device)
    own_TN = on_device(batch.own_SN, device)[window_T]
    targets_T = on_device(batch.target_texts_T, device)
    negatives_N = on_device(batch.negative_texts_N, device)
    return own_TN | (targets_T[:, None] == negatives_N[None, :])


def info_nce(
    outputs_TD: Tensor,
    targets_TD: Tensor,
    negatives_ND: Tensor,
    excluded_TN: Tensor,
    scale: Tensor,
) -> Tensor:
    """L_gen (HLLM, section 3.3) with a learned temperature, mean over T; `excluded_TN` are no negatives.

    False negatives are known by their text. The paper's code masks by the cosine to the target instead, which
    the model can exploit: item vectors that collapse above the limit mask each other, and the loss falls.
    """
    with torch.autocast(
        outputs_TD.device.type, enabled=False
    ):  # a logit of up to 100 keeps one decimal in bf16
        outputs_TD, targets_TD, negatives_ND = outputs_TD.float(), targets_TD.float(), negatives_ND.float()
        positive_T = (outputs_TD * targets_TD).sum(-1) * scale
        negative_TN = outputs_TD @ negatives_ND.T * scale
        negative_TN = negative_TN.masked_fill(excluded_TN, EXCLUDED)
        return F.softplus(negative_TN.logsumexp(-1) - positive_T).mean()
