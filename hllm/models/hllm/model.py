"""HLLM as a family: two towers built from their settings, the loss of its objectives, and what is kept of
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hllm.data.prepared import Prepared
from hllm.errors import ConfigError, DataError
from hllm.models import load
from hllm.models.common.backbone import (
    build_decoder,
    decoder_from_config,
    load_whole,
    plain_config,
    sees_ahead,
)
from hllm.models.common.items import CachedItems
from hllm.models.common.lora import choose_what_learns
from hllm.models.common.packing import on_device
from hllm.models.common.recommender import Batch, Recommender, labels_of, share_of_labels
from hllm.models.hllm.family import HLLMSettings
from hllm.models.hllm.features import EventFeatures
from hllm.models.hllm.fusion import classification
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.probes import Probes
from hllm.models.hllm.users import DecoderUser, drop_out
from hllm.settings import Settings
from hllm.work.ranks import device

WHITENING_ITEMS = 8_192
"""Items whose vectors decide how the whitening projection starts; more than any width needs."""


class HLLM(Recommender):
    """TextItems x DecoderUser; CachedItems in stage 2."""

    user: DecoderUser

    def __init__(
        self,
        items: TextItems | CachedItems,
        user: DecoderUser,
        temperature: float,
        generative_weight: float = 1.0,
    ) -> None:
        super().__init__(items, user, temperature)
        self.generative_weight = generative_weight

    def windows_loss(
        self, batch: Batch, history_TD: Tensor, targets_TD: Tensor, negatives_ND: Tensor
    ) -> Tensor:
        """HLLM, section 3.3. Generative: L_gen. Discriminative: L_dis = lambda L_gen + L_cls, with lambda
        `generative_weight`."""
        if self.user.fusion is None:
            return super().windows_loss(batch, history_TD, targets_TD, negatives_ND)
        probes = Probes.of_targets(batch.history, batch.targets_T)
        outputs_TD, logits_T = self.user.judge(history_TD, batch.history, targets_TD, probes)
        labels_T = on_device(labels_of(batch), outputs_TD.device)
        judged = classification(logits_T, labels_T) * share_of_labels(batch)
        generated = self.generative_loss(batch, outputs_TD, targets_TD, negatives_ND)
        return self.generative_weight * generated + judged


def new_model(settings: Settings, prepared: Prepared) -> HLLM:
    chosen: HLLMSettings = settings.at("hllm")
    items = _new_items(chosen, prepared, settings.run.seed)
    user = _new_user(chosen, prepared, items.width)
    load_whole.cache_clear()
    if chosen.item_llm.lora_rank:
        items.words.requires_grad_(False)
    choose_what_learns(items.decoder, chosen.item_llm, "hllm.item_llm")
    choose_what_learns(user.decoder, chosen.user_llm, "hllm.user_llm")
    drop_out(user.decoder, chosen.dropout)
    return HLLM(items, user, chosen.temperature, chosen.generative_weight)


def _new_items(chosen: HLLMSettings, prepared: Prepared, seed: int) -> TextItems:
    vocabulary = int(prepared.token_ids.max()) + 1 if not chosen.item_llm.backbone else 0
    decoder = build_decoder(chosen.item_llm, max(vocabulary, 256))
    items = TextItems(decoder, chosen.whiten, chosen.item_vector)
    require_something_to_read(prepared, chosen.item_vector)
    items.attach(prepared.token_ids, prepared.token_offsets, trim=True)
    if chosen.item_llm.frozen:
        items.freeze()
    if chosen.whiten:
        sample = np.random.default_rng(seed).permutation(prepared.items)[:WHITENING_ITEMS]
        items.to(device()).start_white(np.sort(sample))
    longest = int(np.diff(prepared.token_offsets).max()) + (chosen.item_vector == "item_token")
    if sees_ahead(decoder) and longest > decoder.config.max_position_embeddings:
        raise ConfigError(
            f"the Item tower reads {decoder.config.max_position_embeddings} positions, "
            f"the longest item has {longest}",
            where="hllm.item_llm.backbone",
            remedy="Lower prepare.max_tokens.",
        )
    return items


def _new_user(chosen: HLLMSettings, prepared: Prepared, item_width: int) -> DecoderUser:
    user_llm, told = build_decoder(chosen.user_llm, 256), chosen.user_features
    if sees_ahead(user_llm):
        raise ConfigError(
            "is an encoder: it would see the events that it is to predict",
            where="hllm.user_llm.backbone",
            remedy="Choose a decoder; an encoder can be the Item tower.",
        )
    features = None
    if told.time or told.item_id:
        known = prepared.items if told.item_id else 0
        features = EventFeatures(user_llm.config.hidden_size, told.time, told.time_width, known)
    pretrained = bool(chosen.user_llm.backbone) and chosen.user_llm.pretrained
    return DecoderUser(user_llm, item_width, features, chosen.objective, pretrained)


def next_stage(settings: Settings, before: Path, vectors_ID: npt.NDArray[np.float32]) -> HLLM:
    chosen: HLLMSettings = settings.at("hllm")
    user, log_scale = load.load_user(before)
    assert isinstance(user, DecoderUser)  # noqa: S101 - `before` is of this family
    model = HLLM(CachedItems(vectors_ID), user, chosen.temperature, chosen.generative_weight)
    choose_what_learns(user.decoder, chosen.user_llm, "hllm.user_llm")
    drop_out(user.decoder, chosen.dropout)
    with torch.no_grad():
        model.log_scale.copy_(log_scale)
    return model


def shape(model: HLLM) -> dict[str, Any]:
    user = model.user
    found: dict[str, Any] = {
        "user": plain_config(user.decoder.config),
        "user_features": user.features.shape if user.features else None,
        "objective": user.objective,
    }
    if isinstance(model.items, TextItems):
        found["item"] = plain_config(model.items.decoder.config)
        found |= {"whiten": model.items.whiten, "item_vector": model.items.vector}
    return found


def reads_times(shape: dict[str, Any]) -> bool:
    return bool((shape.get("user_features") or {}).get("time"))


def load_items(shape: dict[str, Any], weights: dict[str, Tensor], prepared: Prepared) -> TextItems:
    decoder = decoder_from_config({**shape["item"], "vocab_size": weights["words"].shape[0]})
    items = TextItems(decoder, shape["whiten"], shape["item_vector"])
    require_something_to_read(prepared, shape["item_vector"])
    items.attach(prepared.token_ids, prepared.token_offsets)
    items.load_state_dict(weights)
    return items


def load_user(shape: dict[str, Any], weights: dict[str, Tensor]) -> DecoderUser:
    decoder = decoder_from_config({**shape["user"], "vocab_size": 2})
    chosen = shape.get("user_features")
    features = EventFeatures(decoder.config.hidden_size, **chosen) if chosen else None
    user = DecoderUser(decoder, shape["width"], features, shape.get("objective", "generative"))
    user.load_state_dict(weights)
    return user


def require_something_to_read(prepared: Prepared, item_vector: str) -> None:
    """Raises: DataError, items have no text and the mean over it is asked for."""
    unread = np.flatnonzero(np.diff(prepared.token_offsets) == 0)
    if item_vector == "mean" and len(unread):
        raise DataError(
            "items have no text, and the mean over it is to be their vector",
            where="prepare.fields",
            count=(len(unread), prepared.items),
            examples=prepared.item_table(["item_id"])["item_id"].take(unread[:3]).to_pylist(),
            remedy="Take more of the text fields, write something into prepare.prompt, or set "
            'hllm.item_vector = "item_token".',
        )
