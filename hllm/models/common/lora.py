"""Low-rank adapters (LoRA, arXiv 2106.09685) on a tower, through `peft`: its own weights stay as they are,
small matrices beside them learn.

Checkpoints keep adapters and weights apart. What a finished stage saves is merged: a model that was trained
with adapters is loaded, exported and served like any other, without `peft`. The next stage starts from the
merged weights, with new adapters if the settings ask for them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hllm.errors import ConfigError
from hllm.models.common.settings import Decoder

SCALE = 2.0
"""What adapters add is multiplied by this, whatever their rank (alpha = 2 x rank)."""


def choose_what_learns(decoder: Any, settings: Decoder, where: str) -> None:
    """All weights of the decoder learn; or none (`frozen`); or adapters beside every linear layer
    (`lora_rank`).

    Raises:
        ConfigError: the settings ask for both.
    """
    if settings.frozen and settings.lora_rank:
        raise ConfigError(
            "a frozen tower has no adapters that learn",
            where=f"{where}.lora_rank",
            remedy=f"Set {where}.frozen = false, or {where}.lora_rank = 0.",
        )
    decoder.requires_grad_(not settings.frozen)
    if settings.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        layers = {
            name.rpartition(".")[2]
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear)
        }
        rank = settings.lora_rank
        adapters = LoraConfig(r=rank, lora_alpha=round(SCALE * rank), target_modules=sorted(layers))
        inject_adapter_in_model(adapters, decoder)  # in place; the decoder's own weights stop learning


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights as if there had never been adapters: each is added to the weight that it stands beside."""
    state = dict(module.state_dict())
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach()
            inside = [key for key in state if key.startswith(f"{name}.")]
            own = {key.replace(".base_layer.", "."): state[key] for key in inside if ".base_layer." in key}
            own[f"{name}.weight"] = own[f"{name}.weight"] + delta
            for key in inside:
                del state[key]
            state |= own
    return state
