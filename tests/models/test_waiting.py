"""No layer waits for the device: forward and backward ask it for no value, and send nothing layer by layer.

Shown on PyTorch's `meta` device, whose tensors have shapes and no content: there whatever a GPU would be
waited for - a number, a truth, a size that depends on values, a copy back - cannot be had and raises, however
it is asked for. Flash attention takes part by its own kernel's shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, BertConfig, PreTrainedConfig

from hllm.models.common import packing
from hllm.models.common.backbone import layers_of
from hllm.models.common.items import IdItems
from hllm.models.common.packing import Packing, packed_attention, run_packed, run_packed_to_last
from hllm.models.common.recommender import Recommender
from hllm.models.hstu.user import HSTUUser
from hllm.models.sasrec.user import SASRecUser
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.train import prepare_layers
from tests.models.test_packing import CONFIGS, LENGTHS, SHAPE
from tests.training.world import ADAPTED, FEATURES, labelled, prepared_of, tiny_hllm

BERT = BertConfig(**{name: size for name, size in SHAPE.items() if name != "num_key_value_heads"})
HLLMS: dict[str, dict[str, Any]] = {
    "generative": {},
    "early-fusion": {"objective": "early_fusion", **FEATURES},
    "late-fusion": {"objective": "late_fusion", **FEATURES},
    "all-else": {"whiten": True, "dropout": 0.1, "item_vector": "mean", **ADAPTED},
}
FEW, MANY = 1, 3
"""Layers."""


class Sent(TorchDispatchMode):
    """Counts what reaches the device from this process's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            {each.device.type for each in tree_leaves(tree) if isinstance(each, torch.Tensor)}
            for tree in ((args, kwargs), out)
        )
        self.count += "cpu" in given and "meta" in given | made
        return out


def sent_by(work: Callable[[], torch.Tensor]) -> int:
    """How often a forward and a backward pass send something."""
    with Sent() as sent:
        work().sum().backward()
    return sent.count


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision is not for the device without content."""
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())


@pytest.fixture(params=["groups", "flash"])
def attention(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to attend within sequences."""
    if request.param == "flash":
        kernel = packing.flash_kernel()
        monkeypatch.setattr(
            packing, "flash_type", lambda query, dropout=0.0: torch.bfloat16 if query.is_meta else None
        )
        monkeypatch.setattr(
            packing, "flash_kernel", lambda: lambda *given, **options: kernel(*given, **options).float()
        )
    return request.param


def decoder_of(config: PreTrainedConfig, layers: int) -> Any:
    config = deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    return AutoModel.from_config(config, attn_implementation=packed_attention()).to("meta")


def inputs() -> torch.Tensor:
    return torch.randn(int(LENGTHS.sum()), SHAPE["hidden_size"], device="meta", requires_grad=True)


@pytest.mark.parametrize("config", [*CONFIGS, BERT], ids=lambda config: config.model_type)
def test_no_layer_of_a_backbone_waits(config: PreTrainedConfig, attention: str):
    def sent(layers: int) -> list[int]:
        decoder = decoder_of(config, layers)
        return [
            sent_by(lambda run=run: run(decoder, inputs(), Packing(LENGTHS)))
            for run in (run_packed, run_packed_to_last)
        ]

    assert sent(FEW) == sent(MANY)


@pytest.mark.parametrize("kind", HLLMS)
def test_no_layer_waits_in_a_training_step_of_both_llms(kind: str, attention: str, tmp_path: Path):
    data = labelled(prepared_of(tmp_path, [7, 9, 9], items=12))

    def sent(layers: int) -> int:
        model = tiny_hllm(data, layers=layers, **HLLMS[kind]).to("meta").train()
        prepare_layers(model, Stage(gradient_checkpointing=kind == "all-else"))
        return sent_by(lambda: model.loss(Batches(data, 6, 3, 5, seed=1)[0]))

    assert sent(FEW) == sent(MANY)


@pytest.mark.parametrize("user", [SASRecUser, HSTUUser])
def test_no_layer_waits_in_a_training_step_of_an_id_based_family(user: Any, attention: str, tmp_path: Path):
    data = prepared_of(tmp_path, [7, 9, 9], items=12)

    def sent(layers: int) -> int:
        model = Recommender(IdItems(12, 16), user(16, layers, 2, 0.0, 6), 0.07).to("meta").train()
        return sent_by(lambda: model.loss(Batches(data, 6, 3, 5, seed=1)[0]))

    assert sent(FEW) == sent(MANY)


@pytest.mark.parametrize(
    "asked",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: hidden.tolist(),
        lambda hidden: int(hidden.max()),
        lambda hidden: bool((hidden > 0).any()),
        lambda hidden: hidden.cpu(),
        lambda hidden: hidden.detach().numpy(),
        lambda hidden: hidden.nonzero(),
        lambda hidden: hidden[hidden > 0],
        lambda hidden: hidden.masked_select(hidden > 0),
        lambda hidden: hidden.unique(),
        lambda hidden: hidden[0].repeat_interleave(hidden[0, :, 0].long(), 0),
    ],
)
def test_a_layer_that_waits_would_be_seen(asked: Callable[[torch.Tensor], Any]):
    decoder = decoder_of(CONFIGS[0], 2)
    layers_of(decoder)[0].register_forward_hook(lambda layer, given, hidden: (asked(hidden), hidden)[1])
    with pytest.raises((RuntimeError, TypeError)):
        sent_by(lambda: run_packed(decoder, inputs(), Packing(LENGTHS)))


@pytest.mark.parametrize(
    "send",
    [
        lambda hidden: hidden * torch.ones(hidden.shape[-1]).to(hidden.device),
        lambda hidden: hidden.index_copy(1, torch.tensor([0]).to(hidden.device), hidden[:, :1]),
        lambda hidden: hidden[:, torch.arange(hidden.shape[1])],
    ],
)
def test_a_layer_that_sends_something_would_be_seen(send: Callable[[torch.Tensor], torch.Tensor]):
    def sent(layers: int) -> int:
        decoder = decoder_of(CONFIGS[0], layers)
        for layer in layers_of(decoder):
            layer.register_forward_hook(lambda layer, given, hidden: send(hidden))
        return sent_by(lambda: run_packed(decoder, inputs(), Packing(LENGTHS)))

    assert sent(MANY) > sent(FEW)
