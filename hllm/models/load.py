"""Build, save and load models: safetensors for weights, `model.json` for the shape, no backbone needed to
load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hllm.data.prepared import Prepared
from hllm.errors import ConfigError, DataError
from hllm.models.common.backbone import build_decoder, decoder_from_config, load_whole, sees_ahead
from hllm.models.common.lora import choose_what_learns, merged_state
from hllm.models.common.recommender import Recommender, UserModel
from hllm.models.hllm.features import EventFeatures
from hllm.models.hstu.user import HSTUUser
from hllm.models.items import CachedItems, IdItems, TextItems
from hllm.models.users import DecoderUser, SASRecUser, drop_out
from hllm.settings import Settings
from hllm.work.artifacts import write_atomically
from hllm.work.ranks import device

ID_USERS: dict[str, type[SASRecUser] | type[HSTUUser]] = {"sasrec": SASRecUser, "hstu": HSTUUser}
SHAPE, ITEM, USER = "model.json", "item.safetensors", "user.safetensors"
WHITENING_ITEMS = 8_192
"""Items whose vectors decide how the whitening projection starts; more than any width needs."""


def new_model(settings: Settings, family: str, prepared: Prepared) -> Recommender:
    """A model before its first stage: pretrained towers for hllm, random ones for the ID-based families."""
    torch.manual_seed(settings.run.seed)
    model = settings.model
    items: TextItems | IdItems
    user: UserModel
    if family == "hllm":
        vocabulary = int(prepared.token_ids.max()) + 1 if not model.item_llm.backbone else 0
        decoder = build_decoder(model.item_llm, max(vocabulary, 256))
        items = TextItems(decoder, model.whiten, model.item_vector)
        _require_something_to_read(prepared, model.item_vector)
        items.attach(prepared.token_ids, prepared.token_offsets, trim=True)
        if model.item_llm.frozen:
            items.freeze()
        if model.whiten:
            sample = np.random.default_rng(settings.run.seed).permutation(prepared.items)[:WHITENING_ITEMS]
            items.to(device()).start_white(np.sort(sample))
        longest = int(np.diff(prepared.token_offsets).max()) + (model.item_vector == "item_token")
        if sees_ahead(decoder) and longest > decoder.config.max_position_embeddings:
            raise ConfigError(
                f"the Item tower reads {decoder.config.max_position_embeddings} positions, "
                f"the longest item has {longest}",
                where="model.item_llm.backbone",
                remedy="Lower prepare.max_tokens.",
            )
        user_llm, chosen = build_decoder(model.user_llm, 256), model.user_features
        if sees_ahead(user_llm):
            raise ConfigError(
                "is an encoder: it would see the events that it is to predict",
                where="model.user_llm.backbone",
                remedy="Choose a decoder; an encoder can be the Item tower.",
            )
        features = None
        if chosen.time or chosen.item_id:
            inside = user_llm.config.hidden_size
            known = prepared.items if chosen.item_id else 0
            features = EventFeatures(inside, chosen.time, chosen.time_width, known)
        pretrained = bool(model.user_llm.backbone) and model.user_llm.pretrained
        user = DecoderUser(user_llm, items.width, features, model.objective, pretrained)
        load_whole.cache_clear()
        if model.item_llm.lora_rank:
            items.words.requires_grad_(False)
        choose_what_learns(items.decoder, model.item_llm, "model.item_llm")
        choose_what_learns(user.decoder, model.user_llm, "model.user_llm")
        drop_out(user.decoder, model.dropout)
    else:
        shape = settings.at(f"model.{family}")
        longest = settings.at(f"train.{family}.history_length")
        items = IdItems(prepared.items, shape.width)
        user = ID_USERS[family](shape.width, shape.layers, shape.heads, shape.dropout, longest)
    return Recommender(items, user, model.temperature, model.generative_weight)


def next_stage(settings: Settings, before: Path, vectors_ID: npt.NDArray[np.float32]) -> Recommender:
    """Stage 2 (HLLM, item caching, table 8): the user model as stage 1 left it, over cached item vectors; the
    Item LLM is not loaded."""
    torch.manual_seed(settings.run.seed)
    user, log_scale = _load_user(before)
    chosen = settings.model
    model = Recommender(CachedItems(vectors_ID), user, chosen.temperature, chosen.generative_weight)
    if isinstance(user, DecoderUser):
        choose_what_learns(user.decoder, chosen.user_llm, "model.user_llm")
        drop_out(user.decoder, chosen.dropout)
    with torch.no_grad():
        model.log_scale.copy_(log_scale)
    return model


def save_model(model: Recommender, family: str, folder: Path) -> None:
    """`user.safetensors` and `model.json` always, `item.safetensors` when the item side was trained."""
    shape: dict[str, Any] = {"family": family, "width": model.items.width}
    if isinstance(model.user, DecoderUser):
        shape["user"] = _plain(model.user.decoder.config)
        shape["user_features"] = model.user.features.shape if model.user.features else None
        shape["objective"] = model.user.objective
    else:
        block: Any = model.user.blocks[0]
        shape["user"] = {
            "width": model.user.width,
            "layers": len(model.user.blocks),
            "heads": block.heads,
            "dropout": block.attention_dropout,
            "max_history": model.user.max_history,
        }
    if not isinstance(model.items, CachedItems):
        _save(model.items.full_state(), folder / ITEM)
    if isinstance(model.items, TextItems):
        shape["item"] = _plain(model.items.decoder.config)
        shape |= {"whiten": model.items.whiten, "item_vector": model.items.vector}
    _save({**merged_state(model.user), "log_scale": model.log_scale.detach()}, folder / USER)
    write_atomically(folder / SHAPE, json.dumps(shape, indent=1, sort_keys=True).encode())


def load_user_model(folder: Path) -> nn.Module:
    """The user side of a trained model, ready for inference: called with (vectors_TD, history)."""
    return _load_user(folder)[0].eval()


def load_item_model(folder: Path, prepared: Prepared) -> TextItems | IdItems:
    """The item side of a trained model, ready to encode the prepared catalogue."""
    shape, weights = _shape(folder), load_file(folder / ITEM)
    items: TextItems | IdItems
    if shape["family"] == "hllm":
        decoder = decoder_from_config({**shape["item"], "vocab_size": weights["words"].shape[0]})
        items = TextItems(decoder, shape["whiten"], shape["item_vector"])
        _require_something_to_read(prepared, shape["item_vector"])
        items.attach(prepared.token_ids, prepared.token_offsets)
    else:
        items = IdItems(*weights["table"].shape)
    items.load_state_dict(weights)
    items.eval()
    return items


def _require_something_to_read(prepared: Prepared, item_vector: str) -> None:
    """Raises: DataError, items have no text and the mean over it is asked for."""
    unread = np.flatnonzero(np.diff(prepared.token_offsets) == 0)
    if item_vector == "mean" and len(unread):
        raise DataError(
            "items have no text, and the mean over it is to be their vector",
            where="prepare.fields",
            count=(len(unread), prepared.items),
            examples=prepared.item_table(["item_id"])["item_id"].take(unread[:3]).to_pylist(),
            remedy="Take more of the text fields, write something into prepare.prompt, or set "
            'model.item_vector = "item_token".',
        )


def width_of(folder: Path) -> int:
    return int(_shape(folder)["width"])


def family_of(folder: Path) -> str:
    return str(_shape(folder)["family"])


def _load_user(folder: Path) -> tuple[UserModel, Tensor]:
    shape, weights = _shape(folder), load_file(folder / USER)
    log_scale = weights.pop("log_scale")
    user: UserModel
    if shape["family"] == "hllm":
        decoder = decoder_from_config({**shape["user"], "vocab_size": 2})
        chosen = shape.get("user_features")
        features = EventFeatures(decoder.config.hidden_size, **chosen) if chosen else None
        user = DecoderUser(decoder, shape["width"], features, shape.get("objective", "generative"))
    else:
        user = ID_USERS[shape["family"]](**shape["user"])
    user.load_state_dict(weights)
    return user, log_scale


def _shape(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SHAPE).read_text("utf-8"))


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)


def _plain(config: Any) -> dict[str, Any]:
    """The shape of a decoder; the vocabulary's size is that of the saved words."""
    values = config.to_diff_dict()
    values["model_type"] = config.model_type
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in ("architectures", "dtype", "torch_dtype")
    }
