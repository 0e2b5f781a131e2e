"""A model family's three verbs - vectors for items, vectors for users given histories, a loss for a batch -
and its pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.history import History
from hllm.models.hstu import HSTUUser
from hllm.models.items import CachedItems, IdItems, TextItems
from hllm.models.users import DecoderUser, SASRecUser

UserModel = DecoderUser | SASRecUser | HSTUUser

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
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


class Recommender(nn.Module):
    """Items and users in one space. HLLM = TextItems x DecoderUser (CachedItems in stage 2), SASRec = IdItems
    x SASRecUser, HSTU = IdItems x HSTUUser."""

    def __init__(
        self,
        items: TextItems | IdItems | CachedItems,
        user: UserModel,
        temperature: float,
    ) -> None:
        super().__init__()
        self.items, self.user = items, user
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def item_vectors(self, items_K: npt.NDArray[np.integer]) -> Tensor:
        """(K,) item indices -> (K, D), unit length."""
        return self.items(items_K)

    def user_vectors(self, vectors_TD: Tensor, history: History) -> Tensor:
        """(T, D) item vectors of packed histories -> (T, D) next-interest vectors, unit length."""
        return self.user(vectors_TD, history)

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, clamped to [1, 100]."""
        return self.log_scale.clamp(0.0, math.log(100.0)).exp()

    def loss(self, batch: Batch) -> Tensor:
        """Mean InfoNCE over the batch's targets. Every distinct item is encoded once."""
        distinct_K, where = np.unique(
            np.concatenate([batch.history.items_T, batch.targets_T, batch.negatives_N]), return_inverse=True
        )
        vectors_KD = self.item_vectors(distinct_K)
        history, target, negative = np.split(where, [len(batch.targets_T), 2 * len(batch.targets_T)])
        device = vectors_KD.device
        outputs_TD = self.user_vectors(vectors_KD[torch.from_numpy(history).to(device)], batch.history)
        return info_nce(
            outputs_TD,
            vectors_KD[torch.from_numpy(target).to(device)],
            vectors_KD[torch.from_numpy(negative).to(device)],
            no_negatives(batch, device),
            self.scale,
        )


def no_negatives(batch: Batch, device: torch.device) -> Tensor:
    """(T, N): the user's own items, and items that read exactly as the target does."""
    window_T = torch.from_numpy(batch.history.packing.sequence_T).to(device)
    own_TN = torch.from_numpy(batch.own_SN).to(device)[window_T]
    targets_T = torch.from_numpy(batch.target_texts_T).to(device)
    negatives_N = torch.from_numpy(batch.negative_texts_N).to(device)
    return own_TN | (targets_T[:, None] == negatives_N[None, :])


def info_nce(
    outputs_TD: Tensor,
    targets_TD: Tensor,
    negatives_ND: Tensor,
    excluded_TN: Tensor,
    scale: Tensor,
) -> Tensor:
    """L_gen of the HLLM paper with a learned temperature, mean over T; `excluded_TN` are no negatives.

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
