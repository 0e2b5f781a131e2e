"""The Item LLM: an item's text in, a unit vector out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.backbone import word_vectors
from hllm.models.common.lora import merged_state
from hllm.models.common.packing import (
    Packing,
    inference_precision,
    on_device,
    ragged,
    run_packed,
    run_packed_to_last,
)

# K distinct items, T tokens, D vector width
Items = npt.NDArray[np.integer]

READ_TOGETHER = 256
"""Texts that a frozen tower reads at once, to remember them."""


class TextItems(nn.Module):
    """The Item LLM (HLLM, section 3.2): prompt and text, then the learned [ITEM] vector, whose last hidden
    state is the item; or (table 10) the mean of the text's last hidden states, without [ITEM].

    Only word embeddings of tokens that the catalogue uses are trained: the others would never receive a
    gradient, so the result is the same, and the optimizer need not walk over a vocabulary of 50,000 for a few
    thousand words.
    """

    reads_texts = True
    """An item costs a pass over its text: processes share the items of a batch, the longest apart."""

    def __init__(self, decoder: Any, whiten: bool = False, vector: str = "item_token") -> None:
        super().__init__()
        words = word_vectors(decoder)
        decoder.set_input_embeddings(nn.Identity())
        self.decoder = decoder
        self.words = nn.Parameter(words.clone())
        self.width = words.shape[1]
        self.vector = vector
        if vector == "item_token":
            # Zero makes a query of zero (without biases): the first layer attends evenly to the text.
            self.item_token = nn.Parameter(torch.zeros_like(words[0]))
        if whiten:
            self.centre = nn.Parameter(torch.zeros(self.width))
            self.projection = nn.Parameter(torch.eye(self.width))
        self.whiten = whiten
        self.all_words: Tensor | None = None
        self.used_words: Tensor | None = None
        self.remembered: Tensor | None = None

    def attach(
        self, token_ids_T: npt.NDArray[np.int32], token_offsets: npt.NDArray[np.int64], trim: bool = False
    ) -> None:
        """Say where the catalogue's tokens are; with `trim`, keep only their word embeddings trainable."""
        self.token_offsets = np.asarray(token_offsets)
        self.token_ids = np.asarray(token_ids_T)
        if trim and self.used_words is None:
            used, inverse = np.unique(self.token_ids, return_inverse=True)
            self.token_ids = inverse.astype(np.int64)
            self.all_words, self.used_words = (
                self.words.detach().clone(),
                torch.from_numpy(used.astype(np.int64)),
            )
            self.words = nn.Parameter(self.all_words[self.used_words])

    def freeze(self) -> None:
        """Train nothing of the tower (table 4 of the paper); the whitening layer, which comes after it, is
        trained all the same. Hidden states that cannot change are computed once: (I, D) floats of memory,
        which are those that `hllm embed` will compute, to the precision, and the same after a restart."""
        self.requires_grad_(False)
        if self.whiten:
            self.centre.requires_grad_(True)
            self.projection.requires_grad_(True)
        self.remembered = torch.full((len(self.token_offsets) - 1, self.width), torch.nan)

    def forward(self, items_K: Items) -> Tensor:
        """Unit vectors of distinct items: (K,) -> (K, D). An item's vector does not depend on its
        neighbours."""
        hidden_KD = F.normalize(self.hidden(items_K), dim=-1)
        if not self.whiten:
            return hidden_KD
        # In bf16 vectors have other lengths, and the gradients of all occurrences add up in 8 bits.
        with torch.autocast(hidden_KD.device.type, enabled=False):
            return F.normalize((hidden_KD - self.centre) @ self.projection, dim=-1)

    @torch.no_grad()
    def start_white(self, items_K: Items, chunk: int = 512, floor: float = 1e-3) -> None:
        """Let `centre` and `projection` start as the whitening of these items' vectors (eigenvalues below
        `floor` times the largest are not blown up further). Pretrained hidden states of different texts point
        nearly the same way (mean cosine 0.986 after two layers of SmolLM2): nothing a temperature could pull
        apart in a few hundred steps."""
        whole = len(items_K) == len(self.token_offsets) - 1
        read = self.hidden if whole else self._read  # of a sample, to remember whole groups is too much
        with inference_precision(self.words.device):
            hidden_KD = torch.cat(
                [
                    F.normalize(read(part), dim=-1)
                    for part in np.array_split(items_K, -(-len(items_K) // chunk))
                ]
            )
        centre = hidden_KD.mean(0)
        values, vectors = torch.linalg.eigh((hidden_KD - centre).T @ (hidden_KD - centre) / len(hidden_KD))
        self.centre.copy_(centre)
        self.projection.copy_(vectors / (values + floor * values[-1]).clamp_min(1e-12).sqrt() @ vectors.T)

    def hidden(self, items_K: Items) -> Tensor:
        """The last hidden state at [ITEM], or the mean of the text's last hidden states: (K,) -> (K, D)."""
        if self.remembered is None:
            return self._read(items_K)
        new_K = items_K[self.remembered[torch.from_numpy(items_K), 0].isnan().numpy()]
        # Always the same texts together: neighbours change the last bits, and a run must be repeatable.
        for group in np.unique(new_K // READ_TOGETHER):
            group_G = np.arange(len(self.remembered))[group * READ_TOGETHER : (group + 1) * READ_TOGETHER]
            with torch.no_grad(), inference_precision(self.words.device):
                self.remembered[torch.from_numpy(group_G)] = self._read(group_G).cpu()
        return on_device(self.remembered.numpy()[items_K], self.words.device)

    def _read(self, items_K: Items) -> Tensor:
        lengths = self.token_offsets[items_K + 1] - self.token_offsets[items_K]
        order = np.argsort(lengths, kind="stable")
        device = self.words.device
        tokens = self.token_ids[ragged(self.token_offsets[items_K[order]], lengths[order])]
        words_TD = F.embedding(on_device(tokens.astype(np.int64), device), self.words)
        read = self._at_item_token if self.vector == "item_token" else self._mean
        back = on_device(np.argsort(order, kind="stable"), device)
        return read(words_TD, lengths[order])[back].float()

    def _at_item_token(self, words_TD: Tensor, lengths_K: npt.NDArray[np.int64]) -> Tensor:
        packing = Packing(lengths_K + 1)
        is_word = np.ones(packing.tokens, dtype=bool)
        is_word[packing.last_S] = False
        word_positions = on_device(np.flatnonzero(is_word), words_TD.device)
        item_positions = on_device(packing.last_S, words_TD.device)
        inputs_TD = words_TD.new_empty(packing.tokens, self.width)
        inputs_TD = inputs_TD.index_copy(0, word_positions, words_TD)
        inputs_TD = inputs_TD.index_copy(
            0, item_positions, self.item_token.expand(len(lengths_K), -1).to(words_TD.dtype)
        )
        return run_packed_to_last(self.decoder, inputs_TD, packing)

    def _mean(self, words_TD: Tensor, lengths_K: npt.NDArray[np.int64]) -> Tensor:
        packing = Packing(lengths_K)
        hidden_TD = run_packed(self.decoder, words_TD, packing).float()
        text_T = on_device(packing.sequence_T, words_TD.device)
        sums_KD = hidden_TD.new_zeros(len(lengths_K), self.width).index_add(0, text_T, hidden_TD)
        return sums_KD / on_device(lengths_K.astype(np.float32), sums_KD.device)[:, None]

    def full_state(self) -> dict[str, Tensor]:
        """Weights with the whole vocabulary and without adapters, as they are saved and loaded."""
        state = {name: value.detach() for name, value in merged_state(self).items()}
        if self.all_words is not None and self.used_words is not None:
            state["words"] = self.all_words.clone()
            state["words"][self.used_words] = self.words.detach().to(self.all_words.device)
        return state
