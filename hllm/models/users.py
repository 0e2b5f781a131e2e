"""The user side of a model: item vectors in, the next interest out, at every position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.backbone import word_vectors
from hllm.models.features import EventFeatures
from hllm.models.history import History
from hllm.models.packing import Packing, attend, run_packed

# T events of all histories one after another, D vector width, H heads


class DecoderUser(nn.Module):
    """The User LLM (HLLM, section 3.2): a decoder whose word embeddings are replaced by item vectors.

    Item vectors have unit length; a learned scale, starting at the backbone's own mean word-embedding length,
    gives them the size that the pretrained layers expect. Between towers of different widths a projection
    leads in and another out: the user's vector is as wide as an item's.
    """

    def __init__(self, decoder: Any, item_width: int = 0, features: EventFeatures | None = None) -> None:
        super().__init__()
        words = word_vectors(decoder)
        self.input_scale = nn.Parameter(words.norm(dim=1).mean())
        inside = words.shape[1]
        self.width = item_width or inside
        if self.width != inside:
            self.into = nn.Linear(self.width, inside, bias=False)
            self.out = nn.Linear(inside, self.width, bias=False)
            nn.init.orthogonal_(self.into.weight)
            nn.init.orthogonal_(self.out.weight)
        self.inside = inside
        self.features = features
        decoder.set_input_embeddings(nn.Identity())
        self.decoder = decoder

    def forward(self, vectors_TD: Tensor, history: History) -> Tensor:
        """(T, D) unit item vectors -> (T, D) unit next-interest vectors, causal within each history."""
        inputs_TD = self.into(vectors_TD) if self.inside != self.width else vectors_TD
        inputs_TD = inputs_TD * self.input_scale
        if self.features is not None:
            for feature_TD in self.features(history):
                inputs_TD = inputs_TD + feature_TD
        hidden_TD = run_packed(self.decoder, inputs_TD, history.packing)
        if self.inside != self.width:
            hidden_TD = self.out(hidden_TD)
        return F.normalize(hidden_TD.float(), dim=-1)


class SASRecUser(nn.Module):
    """Self-attention over item vectors (SASRec, Kang & McAuley 2018), pre-norm, positions counted back from
    the latest event."""

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
        positions_T = counted_back(packing, self.max_history).to(vectors_TD.device)
        hidden_TD = self.dropout(vectors_TD * self.input_scale + F.embedding(positions_T, self.positions))
        for block in self.blocks:
            hidden_TD = block(hidden_TD, packing)
        return F.normalize(self.norm(hidden_TD), dim=-1)


def counted_back(packing: Packing, max_history: int) -> Tensor:
    """(T,) position of each event, the latest of its history at `max_history` - 1."""
    if int(packing.lengths_S[-1]) > max_history:
        raise ValueError(
            f"a history of {packing.lengths_S[-1]} events, the model knows {max_history} positions"
        )
    lengths_T = packing.lengths_S[packing.sequence_T]
    return torch.from_numpy(max_history - lengths_T + packing.positions_T)


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
