"""How models are trained, and how what they know is written out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hllm.settings.section import Section


class Stage(Section):
    history_length: int = Field(50, ge=2)
    """Events in one training window."""
    batch_size: int = Field(32, ge=1)
    """Windows per step."""
    negatives: int = Field(512, ge=1)
    """Items drawn uniformly from the catalogue, shared by the batch; at least the catalogue's size means all
    of it."""
    cold_negatives: bool = False
    """Whether items without a training event are drawn as negatives, too: that teaches a model that new items
    are wrong."""
    epochs: float = Field(1.0, gt=0)
    """Passes over all windows; ignored when `steps` is given."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 derives them from `epochs`."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    item_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the item side (stage 1); 0 takes `lr`."""
    words_lr: float = Field(0.0, ge=0)
    """Peak learning rate of the Item LLM's word embeddings (stage 1); 0 takes `item_lr`."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with rising learning rate; a cosine to a tenth follows."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay on matrices (never on norms, biases and scalars)."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between looks at the validation events (the best weights are kept); 0 keeps the last weights."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Minutes between checkpoints; SIGTERM writes one too. With outputs in S3 they go there as well."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that are kept: the newest, and those before it in case it turns out to be damaged."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a step's items and windows pass the models, one after another, so that less memory holds
    the same batch. Loss and gradients are those of the whole: all parts share the negatives. The items are
    read twice for it."""
    gradient_checkpointing: bool = False
    """Compute the layers of both LLMs again in the backward pass instead of remembering what was inside
    them: less memory, a third more work."""
    compile: bool = False
    """Compile the layers of both LLMs by `torch.compile`: the first steps take minutes, the others less."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass (weights and loss stay fp32); `auto`: bf16 where the
    processor has it."""


class Train(Section):
    share: float = Field(1.0, gt=0, le=1)
    """Share of the users whose events train, drawn at random (`run.seed`); everybody's held-out events are
    ranked all the same. For data scaling."""
    zero: Literal[0, 1, 2, 3] = 0
    """How much of a training every process holds only a share of, by DeepSpeed's ZeRO: nothing (0: plain data
    parallelism), moments (1), gradients too (2), weights too (3). The results are the same."""


class Embed(Section):
    tokens_per_batch: int = Field(8192, ge=1)
    """Item tokens encoded at a time."""
    shard_items: int = Field(50_000, ge=1)
    """Items per shard of the item cache: a killed encoding continues at the next shard."""
    users_per_batch: int = Field(256, ge=1)
    """Users encoded at a time."""
    shard_users: int = Field(100_000, ge=1)
    """Users per exported file."""
    max_history: int = Field(200, ge=1)
    """The most recent events that the user model reads at inference."""
