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

from hllm.models.packing import Packing, packed_attention, ragged, run_packed, run_packed_to_last

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
