"""SASRec (Kang & McAuley 2018): causal self-attention over item vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.history import History, counted_back
from hllm.models.common.packing import Packing, attend, on_device

# T events of all histories one after another, D vector width


class SASRecUser(nn.Module):
    """Self-attention over item vectors (SASRec, Kang & McAuley 2018; HLLM, tables 4 to 6), pre-norm,
    positions counted back from the latest event."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float, max_history: int) -> None:
        super().__init__()
        self.width, self.max_history = width, max_history
        self.input_scale = nn.Parameter(torch.tensor(float(width) ** 0.5))
        self.positions = nn.Parameter(torch.randn(max_history, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(SASRecBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors_TD: Tensor, history: History) -> Tensor:
        """(T, D) -> (T, D), unit length."""
        packing = history.packing
        positions_T = on_device(counted_back(packing, self.max_history), vectors_TD.device)
        hidden_TD = self.dropout(vectors_TD * self.input_scale + F.embedding(positions_T, self.positions))
        for block in self.blocks:
            hidden_TD = block(hidden_TD, packing)
        return F.normalize(self.norm(hidden_TD), dim=-1)


class SASRecBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        query, key, value = self.projections(self.attention_norm(hidden_TD)).chunk(3, -1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in (query, key, value)
        )
        attended = attend(query, key, value, packing, None, self.attention_dropout if self.training else 0.0)
        hidden_TD = hidden_TD + self.dropout(self.out(attended.transpose(0, 1).flatten(1)))
        return hidden_TD + self.dropout(self.feed(self.feed_norm(hidden_TD)))
