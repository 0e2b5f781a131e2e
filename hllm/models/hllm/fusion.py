"""Discriminative recommendation (HLLM, section 3.3): would this user like this candidate? Two forms.

Early fusion: the candidate is appended to the history, the User LLM's output there goes through a head. The
more accurate form; the User LLM runs for every candidate (over its position alone, see
`hllm.models.hllm.probes`).
Late fusion: the learned [USER] vector is appended, its output is the user's vector, and user and candidate go
into the head together. One user vector serves all candidates, also outside of this model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# P candidates, D width of item and user vectors, I width inside the User LLM


def head(width: int, inner: int) -> nn.Sequential:
    """(P, width) -> (P, 1). It starts at zero: no opinion, and no disturbance of pretrained layers at
    first."""
    last = nn.Linear(inner, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, inner), nn.SiLU(), last)


class EarlyFusion(nn.Module):
    """The prediction head over the User LLM's output at the candidate (HLLM, section 3.3; tables 13, 14)."""

    name = "early_fusion"

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.head = head(inside, inside)

    def forward(self, hidden_PI: Tensor) -> Tensor:
        """(P, I) -> (P,) logits."""
        return in_full(self.head, hidden_PI)


class LateFusion(nn.Module):
    """The [USER] vector, and the prediction head over a user's and a candidate's vector (HLLM, section 3.3).

    To an MLP of both vectors and their product comes their cosine with a learned weight: the inner product
    that the feature store computes of published vectors then means something by itself.
    """

    name = "late_fusion"

    def __init__(self, inside: int, width: int, word_length: float) -> None:
        super().__init__()
        # As long as the vectors that the pretrained layers expect.
        self.user_token = nn.Parameter(F.normalize(torch.randn(inside), dim=0) * word_length)
        self.head = head(3 * width, width)
        self.cosine_weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, users_PD: Tensor, candidates_PD: Tensor) -> Tensor:
        """(P, D) user and (P, D) item vectors, unit length -> (P,) logits."""
        product_PD = users_PD * candidates_PD
        together = torch.cat([users_PD, candidates_PD, product_PD], -1)
        return in_full(self.head, together) + self.cosine_weight * product_PD.sum(-1)


def in_full(head: nn.Sequential, inputs_PI: Tensor) -> Tensor:
    """(P,) logits in fp32 whatever the models before compute in: in bf16 many of some thousand candidates
    would share their score."""
    with torch.autocast(inputs_PI.device.type, enabled=False):
        logits_P: Tensor = head(inputs_PI.float()).squeeze(-1)
        return logits_P


def classification(logits_T: Tensor, labels_T: Tensor) -> Tensor:
    """L_cls (HLLM, section 3.3): mean binary cross entropy over the targets with a label of 0 or 1; others do
    not count."""
    known_T = (labels_T >= 0).float()
    with torch.autocast(logits_T.device.type, enabled=False):
        losses_T = F.binary_cross_entropy_with_logits(
            logits_T.float(), labels_T.clamp_min(0).float(), reduction="none"
        )
        return (losses_T * known_T).sum() / known_T.sum().clamp_min(1.0)
