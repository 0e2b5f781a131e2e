"""HLLM (arXiv 2409.12740): an Item LLM reads texts, a User LLM reads histories of their vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hllm.models.common.settings import Decoder
from hllm.models.family import Family, TrainingStage
from hllm.settings.section import Section
from hllm.settings.training import Stage


class UserFeatures(Section):
    time: Literal["", "year", "month", "day", "hour", "minute", "second"] = ""
    """How exactly the User LLM is told when an event happened (UTC): the parts down to this one; empty: not
    at all."""
    time_width: int = Field(512, ge=1)
    """Width of the embedding of each part of a time."""
    item_id: bool = False
    """Also tell the User LLM which item an event was, by a learned embedding of its own. Items that were not
    in the training catalogue have none."""


class HLLMSettings(Section):
    item_llm: Decoder = Decoder()
    """Reads an item's text into one vector."""
    user_llm: Decoder = Decoder()
    """Reads item vectors into the next interest."""
    user_features: UserFeatures = UserFeatures()
    """What the User LLM reads of an event beside its item's vector; targets stay pure item vectors."""
    objective: Literal["generative", "early_fusion", "late_fusion"] = "generative"
    """What is learned. `generative`: which item comes next. `early_fusion` and `late_fusion`
    learn beside it whether the user likes a given item, from the log's labels (discriminative
    recommendation): early shows the candidate to the User LLM; late compares it with a user vector that
    serves all candidates."""
    generative_weight: float = Field(1.0, ge=0)
    """lambda in L_dis = lambda L_gen + L_cls, for the two discriminative objectives."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the User LLM while it is trained: on its inputs and on what each layer adds (not in the
    paper). Small logs need it as much as ID-based models do."""
    temperature: float = Field(0.07, ge=0.01, le=1)
    """Initial temperature of the contrastive loss; learned, between 0.01 and 1."""
    item_vector: Literal["item_token", "mean"] = "item_token"
    """What of the Item LLM's last layer is the item: its state at the learned [ITEM] vector after the text,
    or the mean over the text. A model cut to few layers has hardly begun to gather the text in one place:
    take the mean there."""
    whiten: bool = False
    """Start the item vectors from the whitening of the pretrained ones (a trained linear layer after the Item
    LLM, not in the paper); false takes the hidden state itself."""
    stage1: Stage = Stage(history_length=10, batch_size=32)
    """End to end: both LLMs, short histories."""
    stage2: Stage = Stage(history_length=200, batch_size=32)
    """The User LLM alone over cached item vectors, long histories."""


FAMILY = Family(
    name="hllm",
    title="HLLM",
    code="hllm.models.hllm.model",
    settings=HLLMSettings,
    stages=(
        TrainingStage(
            (
                "item_llm",
                "user_llm",
                "user_features",
                "objective",
                "generative_weight",
                "dropout",
                "temperature",
                "item_vector",
                "whiten",
            ),
            # 2: a random User LLM starts with larger inputs; a frozen BERT is read without its dropout.
            # 3: items without a training event are no negatives.
            revision=3,
        ),
        TrainingStage(
            ("user_llm.frozen", "user_llm.lora_rank", "generative_weight", "dropout"),
            cached_items=True,
            revision=2,
        ),
    ),
    reads=frozenset({"texts", "times", "labels"}),
    tokenizer="item_llm.backbone",
    backbones=("item_llm", "user_llm"),
    objective="objective",
    renamed={
        **{f"model.{name}": name for name in HLLMSettings.model_fields if not name.startswith("stage")},
        "train.stage1": "stage1",
        "train.stage2": "stage2",
    },
    mark="circle",
)
