"""Sequences of different lengths in one flat tensor: no padding is ever computed.

A packed batch holds its sequences one after another, equal lengths side by side. Everything but attention
works on single positions, so a `transformers` decoder runs on it unchanged as one "sequence" of T tokens
whose position ids restart; only attention has to know where sequences end. `attend_within_sequences`,
registered as an attention implementation, is that one place: a position never sees another sequence, whatever
the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hllm.models.hllm.probes import ProbedPacking

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders whose layers are Llama's (Qwen 2 with biases, Qwen 3 with norms of queries and keys)."""

# T tokens of all sequences, S sequences, H heads, E width of a head


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a flat tensor lie. `lengths_S` must not decrease."""

    lengths_S: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.lengths_S) and ((np.diff(self.lengths_S) < 0).any() or self.lengths_S[0] < 1):
            raise ValueError("packed sequences are sorted by length and never empty")

    @property
    def tokens(self) -> int:
        return int(self.lengths_S.sum())

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(how many, length) of each run of equal lengths, in order."""
        lengths, counts = np.unique(self.lengths_S, return_counts=True)
        return [(int(count), int(length)) for length, count in zip(lengths, counts, strict=True)]

    @cached_property
    def starts_S(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.lengths_S) - self.lengths_S

    def bounds(self, device: torch.device) -> Tensor:
        """(S + 1,) where each sequence begins, and the end: int32, made once for all layers."""
        if device not in self._bounds:
            bounds = np.append(self.starts_S, self.tokens).astype(np.int32)
            self._bounds[device] = on_device(bounds, device)
        return self._bounds[device]

    @cached_property
    def _bounds(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def positions_T(self) -> npt.NDArray[np.int64]:
        """0, 1, 2, ... from each sequence's first token."""
        return np.arange(self.tokens) - np.repeat(self.starts_S, self.lengths_S)

    @cached_property
    def last_S(self) -> npt.NDArray[np.int64]:
        """Position of each sequence's last token."""
        return np.cumsum(self.lengths_S) - 1

    @cached_property
    def sequence_T(self) -> npt.NDArray[np.int64]:
        """The sequence that each token belongs to."""
        return np.repeat(np.arange(len(self.lengths_S)), self.lengths_S)


def on_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor there. The GPU fetches it by itself: this process does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def device_of(model: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def inference_precision(device: torch.device) -> torch.autocast:
    """Vectors are computed in bf16 on GPUs that have it, and in fp32 elsewhere."""
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=cuda)


def ragged(starts_S: npt.NDArray[np.integer], lengths_S: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Flat positions start, start + 1, ... of every sequence, one sequence after another."""
    packing_starts = np.cumsum(lengths_S) - lengths_S
    return np.repeat(starts_S - packing_starts, lengths_S) + np.arange(int(lengths_S.sum()))


def attend(
    query_HTE: Tensor,
    key_HTE: Tensor,
    value_HTE: Tensor,
    packing: Packing,
    scale: float | None,
    dropout: float = 0.0,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention within each sequence, to earlier positions or (`causal` false) to all: (H, T, E) -> same.
    Key and value may have fewer heads (grouped queries). With a window, a position sees only so many earlier
    positions, itself among them.

    Where flash attention can be had, it reads the flat tensors as they are. Elsewhere equal lengths are
    computed together, one group after another. Both look only where they may.
    """
    half = flash_type(query_HTE, dropout)
    if half is not None:
        bounds, longest = packing.bounds(query_HTE.device), int(packing.lengths_S[-1])
        out_THE = flash_kernel()(
            query_HTE.transpose(0, 1).to(half),
            key_HTE.transpose(0, 1).to(half),
            value_HTE.transpose(0, 1).to(half),
            bounds,
            bounds,
            longest,
            longest,
            scale=scale,
            window_size=(-1, -1) if not causal else (-1 if window is None else window - 1, 0),
            enable_gqa=query_HTE.shape[0] != key_HTE.shape[0],
        )
        return out_THE.transpose(0, 1)
    sizes = [count * length for count, length in packing.groups]
    parts = []
    for (count, length), query, key, value in zip(
        packing.groups,
        query_HTE.split(sizes, 1),
        key_HTE.split(sizes, 1),
        value_HTE.split(sizes, 1),
        strict=True,
    ):
        query, key, value = (
            part.unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value)
        )
        near_LL = None
        if window is not None and length > window:
            near_LL = (
                torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
            )
        inside = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=near_LL,
            is_causal=causal and near_LL is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(inside.transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, dim=1)


def flash_type(query: Tensor, dropout: float = 0.0) -> torch.dtype | None:
    """The type in which flash attention would compute this, or None where it cannot: it wants a GPU of 2020
    or later, bf16 or fp16 (also by autocast), no dropout, and heads of a width that is a multiple of 8 and
    at most 256."""
    if not query.is_cuda or dropout or query.shape[-1] % 8 or query.shape[-1] > 256:
        return None
    cast = torch.is_autocast_enabled(query.device.type)
    chosen = torch.get_autocast_dtype(query.device.type) if cast else query.dtype
    if chosen not in (torch.bfloat16, torch.float16):
        return None
    return chosen if torch.cuda.get_device_capability(query.device)[0] >= 8 else None


def flash_kernel() -> Any:
    """PyTorch's own flash attention over sequences of different lengths; no other package is needed."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def attend_within_sequences(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | ProbedPacking | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention implementation that `transformers` models call: (1, H, T, E) -> (1, T, H, E)."""
    if packing is None:
        raise ValueError("a packed decoder is called with packing=")
    if not isinstance(packing, Packing):  # histories with probes
        probed_HTE = packing.attend(query[0], key[0], value[0], scaling, dropout, sliding_window)
        return probed_HTE.transpose(0, 1).unsqueeze(0), None
    out_HTE = attend(
        query[0],
        key[0],
        value[0],
        packing,
        scaling,
        dropout,
        sliding_window,
        causal=getattr(module, "is_causal", True),
    )
    return out_HTE.transpose(0, 1).unsqueeze(0), None


def packed_attention() -> str:
    """The name under which `transformers` knows `attend_within_sequences`, for `attn_implementation`."""
    from transformers import AttentionInterface  # takes seconds, and ID-based families need none of it

    AttentionInterface.register("hllm_packed", attend_within_sequences)
    return "hllm_packed"


def run_packed_to_last(decoder: Any, inputs_TD: Tensor, packing: Packing) -> Tensor:
    """The last hidden state at each sequence's last token only: (T, D) -> (S, D).

    In the top layer nobody reads the other positions: they only need keys and values there, not queries,
    output projection and feed-forward. With the few layers of a small model that is nearly half of all work.
    """
    last_S = on_device(packing.last_S, inputs_TD.device)
    window = getattr(decoder.config, "sliding_window", None) or packing.tokens
    if decoder.config.model_type not in LIKE_LLAMA or packing.groups[-1][1] > window:
        return run_packed(decoder, inputs_TD, packing)[last_S]
    positions = on_device(packing.positions_T, inputs_TD.device).unsqueeze(0)
    cosine, sine = decoder.rotary_emb(inputs_TD.unsqueeze(0), position_ids=positions)
    hidden = inputs_TD.unsqueeze(0)
    for layer in decoder.layers[:-1]:
        hidden = layer(
            hidden,
            position_embeddings=(cosine, sine),
            position_ids=positions,
            packing=packing,
            use_cache=False,
        )
    top, hidden_TD = decoder.layers[-1], hidden[0]
    attention, normed_TD = top.self_attn, top.input_layernorm(hidden_TD)
    query_SHE = attention.q_proj(normed_TD[last_S]).unflatten(-1, (-1, attention.head_dim))
    key_THE = attention.k_proj(normed_TD).unflatten(-1, (-1, attention.head_dim))
    if decoder.config.model_type == "qwen3":
        query_SHE, key_THE = attention.q_norm(query_SHE), attention.k_norm(key_THE)
    value_THE = attention.v_proj(normed_TD).unflatten(-1, (-1, attention.head_dim))
    query_SHE = _rotate(query_SHE, cosine[0, last_S], sine[0, last_S])
    key_THE = _rotate(key_THE, cosine[0], sine[0])
    attended_SD = _attend_from_last(query_SHE, key_THE, value_THE, packing, attention.scaling)
    hidden_SD = hidden_TD[last_S] + attention.o_proj(attended_SD)
    hidden_SD = hidden_SD + top.mlp(top.post_attention_layernorm(hidden_SD))
    return decoder.norm(hidden_SD)


def _attend_from_last(
    query_SHE: Tensor, key_THE: Tensor, value_THE: Tensor, packing: Packing, scale: float
) -> Tensor:
    """What each sequence's last position reads of it: (S, H * E)."""
    half = flash_type(query_SHE)
    if half is not None:
        device, every_S = query_SHE.device, len(packing.lengths_S)
        return flash_kernel()(
            query_SHE.to(half),
            key_THE.to(half),
            value_THE.to(half),
            torch.arange(every_S + 1, dtype=torch.int32, device=device),
            packing.bounds(device),
            1,
            int(packing.lengths_S[-1]),
            scale=scale,
            enable_gqa=query_SHE.shape[1] != key_THE.shape[1],
        ).flatten(1)
    parts = []
    sizes = [count * length for count, length in packing.groups]
    counts = [count for count, _ in packing.groups]
    for (count, length), query, key, value in zip(
        packing.groups, query_SHE.split(counts), key_THE.split(sizes), value_THE.split(sizes), strict=True
    ):
        key, value = (part.unflatten(0, (count, length)).transpose(1, 2) for part in (key, value))
        inside = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            key,
            value,
            scale=scale,
            enable_gqa=True,
        )
        parts.append(inside.flatten(1))
    return torch.cat(parts)


def _rotate(heads_THE: Tensor, cosine_TE: Tensor, sine_TE: Tensor) -> Tensor:
    """Rotary positions in the half-split layout of Llama: (T, H, E) -> (T, H, E)."""
    first, second = heads_THE.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (heads_THE * cosine_TE.unsqueeze(1) + turned * sine_TE.unsqueeze(1)).to(heads_THE.dtype)


def run_packed(decoder: Any, inputs_TD: Tensor, packing: Packing | ProbedPacking) -> Tensor:
    """The decoder's last hidden states of a packed batch: (T, D) -> (T, D)."""
    positions = on_device(packing.positions_T, inputs_TD.device)
    return decoder(
        inputs_embeds=inputs_TD.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        packing=packing,
        use_cache=False,
    ).last_hidden_state[0]
