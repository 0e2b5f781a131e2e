"""Save and load trained models: safetensors for weights, `model.json` for the shape, no backbone needed to
load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hllm.data.prepared import Prepared
from hllm.models.common.items import CachedItems
from hllm.models.common.lora import merged_state
from hllm.models.common.recommender import Recommender
from hllm.models.family import Family, family
from hllm.settings import Settings
from hllm.work.artifacts import write_atomically

SHAPE, ITEM, USER = "model.json", "item.safetensors", "user.safetensors"


def new_model(settings: Settings, name: str, prepared: Prepared) -> Recommender:
    """A family's model before its first stage: pretrained towers where it has some, else random weights."""
    torch.manual_seed(settings.run.seed)
    model: Recommender = family(name).module.new_model(settings, prepared)
    return model


def next_stage(settings: Settings, before: Path, vectors_ID: Any) -> Recommender:
    """A later stage (HLLM, item caching, table 8): the user model as the stage before left it, over cached
    item vectors (I, D); the item side is not loaded."""
    torch.manual_seed(settings.run.seed)
    model: Recommender = family_in(before).module.next_stage(settings, before, vectors_ID)
    return model


def save_model(model: Recommender, name: str, folder: Path) -> None:
    """`user.safetensors` and `model.json` always, `item.safetensors` when the item side was trained."""
    shape = {"family": name, "width": model.items.width, **family(name).module.shape(model)}
    if not isinstance(model.items, CachedItems):
        _save(model.items.full_state(), folder / ITEM)
    _save({**merged_state(model.user), "log_scale": model.log_scale.detach()}, folder / USER)
    write_atomically(folder / SHAPE, json.dumps(shape, indent=1, sort_keys=True).encode())


def load_user_model(folder: Path) -> nn.Module:
    """The user side of a trained model, ready for inference: called with (vectors_TD, history)."""
    return load_user(folder)[0].eval()


def load_user(folder: Path) -> tuple[nn.Module, Tensor]:
    """The user side of a trained model as its stage left it, and the logarithm of its inverse temperature."""
    shape, weights = shape_of(folder), load_file(folder / USER)
    log_scale = weights.pop("log_scale")
    user: nn.Module = family_in(folder).module.load_user(shape, weights)
    return user, log_scale


def load_item_model(folder: Path, prepared: Prepared) -> nn.Module:
    """The item side of a trained model, ready to encode the prepared catalogue."""
    shape, weights = shape_of(folder), load_file(folder / ITEM)
    items: nn.Module = family_in(folder).module.load_items(shape, weights, prepared)
    return items.eval()


def width_of(folder: Path) -> int:
    return int(shape_of(folder)["width"])


def family_of(folder: Path) -> str:
    return str(shape_of(folder)["family"])


def family_in(folder: Path) -> Family:
    return family(family_of(folder))


def shape_of(folder: Path) -> dict[str, Any]:
    """What `model.json` says of a trained model."""
    found: dict[str, Any] = json.loads((folder / SHAPE).read_text("utf-8"))
    return found


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)
