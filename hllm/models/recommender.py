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

from hllm.models.fusion import classification
from hllm.models.history import History
from hllm.models.hstu import HSTUUser
from hllm.models.items import CachedItems, IdItems, TextItems
from hllm.models.probes import Probes
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
    labels_T: npt.NDArray[np.int8] | None = None
    """1, 0 or -1 (unknown) of every target's event; discriminative objectives need them."""

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
    """Items and users in one space. HLLM = TextItems x DecoderUser (CachedItems in stage 2), SASRec = IdItems
    x SASRecUser, HSTU = IdItems x HSTUUser."""

    def __init__(
        self,
        items: TextItems | IdItems | CachedItems,
        user: UserModel,
        temperature: float,
        generative_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.items, self.user = items, user
        self.generative_weight = generative_weight
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
        """Generative: L_gen, the mean InfoNCE over the batch's targets. Discriminative:
        L_dis = lambda L_gen + L_cls, with lambda `generative_weight`. Every distinct item is encoded once."""
        distinct_K, where = np.unique(
            np.concatenate([batch.history.items_T, batch.targets_T, batch.negatives_N]), return_inverse=True
        )
        vectors_KD = self.item_vectors(distinct_K)
        history, target, negative = np.split(where, [len(batch.targets_T), 2 * len(batch.targets_T)])
        device = vectors_KD.device
        history_TD, targets_TD, negatives_ND = (
            vectors_KD[torch.from_numpy(rows).to(device)] for rows in (history, target, negative)
        )
        if isinstance(self.user, DecoderUser) and self.user.fusion is not None:
            probes = Probes.of_targets(batch.history, batch.targets_T)
            outputs_TD, logits_T = self.user.judge(history_TD, batch.history, targets_TD, probes)
            judged = classification(logits_T, torch.from_numpy(labels_of(batch)).to(device))
        else:
            outputs_TD, judged = self.user_vectors(history_TD, batch.history), None
        generated = info_nce(outputs_TD, targets_TD, negatives_ND, no_negatives(batch, device), self.scale)
        return generated if judged is None else self.generative_weight * generated + judged


def labels_of(batch: Batch) -> npt.NDArray[np.int8]:
    if batch.labels_T is None:
        raise ValueError("a discriminative objective is trained on labelled events")
    return batch.labels_T


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
