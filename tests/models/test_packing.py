"""An item's vector never depends on its neighbours: packed attention against transformers' own, one text at a
time."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from hllm.models.common.packing import (
    Packing,
    flash_type,
    packed_attention,
    ragged,
    run_packed,
    run_packed_to_last,
)

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = [
    LlamaConfig(**SHAPE),
    MistralConfig(**SHAPE, sliding_window=None),
    MistralConfig(**SHAPE, sliding_window=4),
    Qwen2Config(**SHAPE),
    Qwen3Config(**SHAPE, head_dim=8),
    Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
]
LENGTHS = np.array([1, 1, 2, 5, 5, 5, 9])


@pytest.fixture(
    params=CONFIGS,
    ids=lambda config: (
        f"{config.model_type}-{config.sliding_window}"
        if hasattr(config, "sliding_window")
        else config.model_type
    ),
)
def pair(request):
    """The same weights with packed attention and with transformers' own."""
    torch.manual_seed(0)
    packed = AutoModel.from_config(deepcopy(request.param), attn_implementation=packed_attention()).eval()
    plain = AutoModel.from_config(deepcopy(request.param), attn_implementation="eager").eval()
    plain.load_state_dict(packed.state_dict())
    return packed, plain


def test_packed_sequences_equal_each_one_alone_in_transformers(pair):
    packed, plain = pair
    packing, inputs = Packing(LENGTHS), torch.randn(int(LENGTHS.sum()), 32)
    with torch.no_grad():
        together = run_packed(packed, inputs, packing)
        alone = torch.cat(
            [plain(inputs_embeds=part[None]).last_hidden_state[0] for part in inputs.split(LENGTHS.tolist())]
        )
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


def test_the_top_layer_shortcut_changes_nothing(pair):
    packed, _ = pair
    packing, inputs = Packing(LENGTHS), torch.randn(int(LENGTHS.sum()), 32, requires_grad=True)
    whole = run_packed(packed, inputs, packing)[torch.from_numpy(packing.last_S)]
    short = run_packed_to_last(packed, inputs, packing)
    torch.testing.assert_close(short, whole, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(whole)
    (one,), (other,) = (torch.autograd.grad((out * weights).sum(), inputs) for out in (whole, short))
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def by_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` promises, one sequence after another: queries stand at the
    end of their keys, (left, right) are how many more positions they see on either side, -1 is all."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert (bounds_q.diff().max(), bounds_k.diff().max()) == (longest_q, longest_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = (longest_k if size < 0 else size for size in window_size)
    out = torch.empty_like(query)
    for first_q, last_q, first_k, last_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        part, keys, values = query[first_q:last_q], key[first_k:last_k], value[first_k:last_k]
        keys, values = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (keys, values))
        scores = torch.einsum("qhe,khe->hqk", part, keys) * (scale or query.shape[-1] ** -0.5)
        at_q = torch.arange(len(part))[:, None] + len(keys) - len(part)
        at_k = torch.arange(len(keys))[None, :]
        seen = (at_k >= at_q - left) & (at_k <= at_q + right)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[first_q:last_q] = torch.einsum("hqk,khe->qhe", weights, values)
    return out


def test_the_path_of_flash_attention_computes_the_same(pair, monkeypatch: pytest.MonkeyPatch):
    """With the kernel's interface, as there is no GPU here: `benchmarks/gpu` compares the kernel itself."""
    packed, _ = pair
    packing, inputs = Packing(LENGTHS), torch.randn(int(LENGTHS.sum()), 32, requires_grad=True)
    outputs = [run_packed(packed, inputs, packing), run_packed_to_last(packed, inputs, packing)]
    monkeypatch.setattr("hllm.models.common.packing.flash_type", lambda query, dropout=0.0: query.dtype)
    calls = []
    monkeypatch.setattr(
        "hllm.models.common.packing.flash_kernel", lambda: calls.append("kernel") or by_one_kernel
    )
    others = [run_packed(packed, inputs, packing), run_packed_to_last(packed, inputs, packing)]
    assert len(calls) == 6  # three layers, twice
    for one, other in zip(outputs, others, strict=True):
        torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5)
        weights = torch.randn_like(one)
        (first,), (second,) = (torch.autograd.grad((out * weights).sum(), inputs) for out in (one, other))
        torch.testing.assert_close(second, first, atol=2e-5, rtol=1e-4)


def test_flash_attention_is_not_asked_where_there_is_no_gpu():
    assert flash_type(torch.zeros(2, 3, 8, dtype=torch.bfloat16)) is None


def test_a_neighbour_cannot_reach_across(pair):
    packed, _ = pair
    packing, inputs = Packing(LENGTHS), torch.randn(int(LENGTHS.sum()), 32)
    changed = inputs.clone()
    changed[:-9] = 7.0
    with torch.no_grad():
        before, after = run_packed(packed, inputs, packing), run_packed(packed, changed, packing)
    torch.testing.assert_close(before[-9:], after[-9:], atol=1e-6, rtol=1e-6)


def test_ragged_positions():
    assert ragged(np.array([10, 0, 5]), np.array([2, 0, 3])).tolist() == [10, 11, 5, 6, 7]


def test_unsorted_lengths_are_refused():
    with pytest.raises(ValueError, match="sorted"):
        Packing(np.array([3, 2]))
