"""HSTU (Zhai et al. 2024, arXiv 2402.17152): attention without softmax, biased by position and time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.history import UNKNOWN_TIME, History, counted_back
from hllm.models.common.packing import Packing, on_device

BUCKETS = 129
# T events of all histories, C histories of one length L, H heads, E width of a head, D vector width


class HSTUUser(nn.Module):
    """Item vectors in, next interest out: (T, D) -> (T, D), unit length; positions counted back from the
    latest event, as in the other ID-based family."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float, max_history: int) -> None:
        super().__init__()
        self.width, self.max_history = width, max_history
        self.input_scale = nn.Parameter(torch.tensor(float(width) ** 0.5))
        self.positions = nn.Parameter(torch.randn(max_history, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(HSTUBlock(width, heads, dropout, max_history) for _ in range(layers))

    def forward(self, vectors_TD: Tensor, history: History) -> Tensor:
        packing = history.packing
        positions_T = on_device(counted_back(packing, self.max_history), vectors_TD.device)
        hidden_TD = self.dropout(vectors_TD * self.input_scale + F.embedding(positions_T, self.positions))
        buckets = [on_device(bucket_CLL, vectors_TD.device) for bucket_CLL in time_buckets(history)]
        for block in self.blocks:
            hidden_TD = block(hidden_TD, packing, buckets)
        return F.normalize(hidden_TD, dim=-1)


def time_buckets(history: History) -> list[npt.NDArray[np.int64]]:
    """For each run of equal lengths (C, L, L): the bucket of the time from event j to the question that
    position i answers, which is the next event's time: floor(ln(max(|dt|, 1)) / 0.301), at most 128. Bucket 0
    where a time is unknown."""
    found, start = [], 0
    for count, length in history.packing.groups:
        part = slice(start, start + count * length)
        start = part.stop
        asked_CL = history.next_times_T[part].reshape(count, length)
        times_CL = history.times_T[part].reshape(count, length)
        known_CLL = (asked_CL != UNKNOWN_TIME)[:, :, None] & (times_CL != UNKNOWN_TIME)[:, None, :]
        apart_CLL = np.where(known_CLL, asked_CL[:, :, None] - times_CL[:, None, :], 0)
        buckets_CLL = np.floor(np.log(np.maximum(np.abs(apart_CLL), 1)) / 0.301).clip(0, BUCKETS - 1)
        found.append(buckets_CLL.astype(np.int64))
    return found


class HSTUBlock(nn.Module):
    """[U, V, Q, K] = SiLU(LN(X) W);  A = SiLU(Q K^T + rab_pos + rab_time) / n, causal;
    Y = X + f(Dropout(U * LN(A V))). The biases are shared over heads and belong to the layer; of the paper's
    2n - 1 position weights causal attention reads n."""

    def __init__(self, width: int, heads: int, dropout: float, max_history: int) -> None:
        super().__init__()
        self.heads, self.attention_dropout, self.longest = heads, dropout, max_history
        self.norm, self.attended_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections = nn.Linear(width, 4 * width)
        nn.init.normal_(self.projections.weight, std=1 / math.sqrt(width))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.position_bias = nn.Parameter(torch.randn(max_history) * 0.02)
        self.time_bias = nn.Parameter(torch.randn(BUCKETS) * 0.02)

    def forward(self, hidden_TD: Tensor, packing: Packing, buckets: list[Tensor]) -> Tensor:
        gate_TD, value_TD, query_TD, key_TD = F.silu(self.projections(self.norm(hidden_TD))).chunk(4, -1)
        sizes = [count * length for count, length in packing.groups]
        parts = []
        for (count, length), bucket_CLL, *three in zip(
            packing.groups,
            buckets,
            query_TD.split(sizes),
            key_TD.split(sizes),
            value_TD.split(sizes),
            strict=True,
        ):
            query_CHLE, key_CHLE, value_CHLE = (
                part.unflatten(0, (count, length)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in three
            )
            places_L = torch.arange(length, device=hidden_TD.device)
            apart_LL = places_L[:, None] - places_L[None, :]
            # Not by indexing: on several threads its gradients add up in another order every time.
            bias_LL1 = F.embedding(apart_LL.clamp_min(0), self.position_bias[:, None])
            bias_CLL = (bias_LL1 + F.embedding(bucket_CLL, self.time_bias[:, None])).squeeze(-1)
            scores_CHLL = query_CHLE @ key_CHLE.transpose(-1, -2) + bias_CLL[:, None]
            weights_CHLL = (F.silu(scores_CHLL) / self.longest).masked_fill(apart_LL < 0, 0.0)
            parts.append((weights_CHLL @ value_CHLE).transpose(1, 2).flatten(2).flatten(0, 1))
        attended_TD = gate_TD * self.attended_norm(torch.cat(parts))
        return hidden_TD + self.out(self.dropout(attended_TD))
