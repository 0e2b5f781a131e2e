"""Which model: its family, its two towers, what it reads of an event and what it learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hllm.settings.section import Section


class Decoder(Section):
    backbone: str = ""
    """A local folder, a hub name, or a .gguf file that `transformers` loads as a decoder (the Item tower also
    takes BERT and what has its shape); `package:NAME/FILE` finds a file or folder inside an installed Python
    package. Empty: the small random decoder given by width, heads and layers."""
    pretrained: bool = True
    """Load the backbone's weights; false keeps its shape and starts at random."""
    frozen: bool = False
    """Leave this tower as it starts (table 4 of the HLLM paper): none of its weights is trained. What a
    frozen Item LLM makes of a text is computed once; the layer of `model.whiten` after it is trained."""
    lora_rank: int = Field(0, ge=0)
    """Train low-rank adapters of this rank beside every linear layer instead of the tower's own weights
    (LoRA); 0 trains the weights. What is saved is merged: loading and serving know nothing of adapters."""
    layers: int = Field(0, ge=0)
    """Keep only the first layers of the backbone; 0 keeps all."""
    width: int = Field(64, ge=2)
    """Vector width of the random decoder when no backbone is named."""
    heads: int = Field(2, ge=1)
    """Attention heads of the random decoder when no backbone is named."""


class UserFeatures(Section):
    time: Literal["", "year", "month", "day", "hour", "minute", "second"] = ""
    """How exactly the User LLM is told when an event happened (UTC): the parts down to this one; empty: not
    at all."""
    time_width: int = Field(512, ge=1)
    """Width of the embedding of each part of a time."""
    item_id: bool = False
    """Also tell the User LLM which item an event was, by a learned embedding of its own. Items that were not
    in the training catalogue have none."""


class IdModel(Section):
    width: int = Field(64, ge=2)
    """Width of the item embeddings and of every layer."""
    layers: int = Field(2, ge=1)
    """Self-attention blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on embeddings, attention and feed-forward."""


class Model(Section):
    family: Literal["hllm", "sasrec", "hstu"] = "hllm"
    """The family that is registered and published."""
    stages: int = Field(0, ge=0)
    """How many of the family's stages are trained, its first ones; 0: all. 1 of hllm is the paper's own
    comparison: both LLMs end to end, nothing after it."""
    item_llm: Decoder = Decoder()
    """Reads an item's text into one vector."""
    user_llm: Decoder = Decoder()
    """Reads item vectors into the next interest."""
    user_features: UserFeatures = UserFeatures()
    """What the User LLM reads of an event beside its item's vector; targets stay pure item vectors."""
    objective: Literal["generative", "early_fusion", "late_fusion"] = "generative"
    """What the family hllm learns. `generative`: which item comes next. `early_fusion` and `late_fusion`
    learn beside it whether the user likes a given item, from the log's labels (discriminative
    recommendation): early shows the candidate to the User LLM; late compares it with a user vector that
    serves all candidates."""
    generative_weight: float = Field(1.0, ge=0)
    """lambda in L_dis = lambda L_gen + L_cls, for the two discriminative objectives."""
    sasrec: IdModel = IdModel()
    """SASRec: self-attention over item IDs."""
    hstu: IdModel = IdModel()
    """HSTU: attention without softmax over item IDs, biased by position and time."""
    baselines: tuple[Literal["sasrec", "hstu"], ...] = ("sasrec",)
    """ID-based families that are trained beside `family`, on the same split, for comparison; most-popular is
    always compared."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the User LLM while it is trained: on its inputs and on what each layer adds (hllm; not in
    the paper). Small logs need it as much as ID-based models do."""
    temperature: float = Field(0.07, ge=0.01, le=1)
    """Initial temperature of the contrastive loss; learned, between 0.01 and 1."""
    item_vector: Literal["item_token", "mean"] = "item_token"
    """What of the Item LLM's last layer is the item: its state at the learned [ITEM] vector after the text,
    or the mean over the text. A model cut to few layers has hardly begun to gather the text in one place:
    take the mean there."""
    whiten: bool = False
    """Start the item vectors from the whitening of the pretrained ones (a trained linear layer after the Item
    LLM, not in the paper); false takes the hidden state itself."""
