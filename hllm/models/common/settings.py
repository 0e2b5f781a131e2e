"""Settings that several families share: a tower from a backbone, and a model over item IDs."""

from __future__ import annotations

from pydantic import Field

from hllm.settings.section import Section
from hllm.settings.training import Stage


class Decoder(Section):
    backbone: str = ""
    """A local folder, a hub name, or a .gguf file that `transformers` loads as a decoder (the Item tower also
    takes BERT and what has its shape); `package:NAME/FILE` finds a file or folder inside an installed Python
    package. Empty: the small random decoder given by width, heads and layers."""
    pretrained: bool = True
    """Load the backbone's weights; false keeps its shape and starts at random."""
    frozen: bool = False
    """Leave this tower as it starts (table 4 of the HLLM paper): none of its weights is trained. What a
    frozen Item LLM makes of a text is computed once; a whitening layer after it is trained all the same."""
    lora_rank: int = Field(0, ge=0)
    """Train low-rank adapters of this rank beside every linear layer instead of the tower's own weights
    (LoRA); 0 trains the weights. What is saved is merged: loading and serving know nothing of adapters."""
    layers: int = Field(0, ge=0)
    """Keep only the first layers of the backbone; 0 keeps all."""
    width: int = Field(64, ge=2)
    """Vector width of the random decoder when no backbone is named."""
    heads: int = Field(2, ge=1)
    """Attention heads of the random decoder when no backbone is named."""


class IdModel(Section):
    width: int = Field(64, ge=2)
    """Width of the item embeddings and of every layer."""
    layers: int = Field(2, ge=1)
    """Self-attention blocks."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on embeddings, attention and feed-forward."""
    temperature: float = Field(0.07, ge=0.01, le=1)
    """Initial temperature of the contrastive loss; learned, between 0.01 and 1."""
    stage1: Stage = Stage(history_length=200, batch_size=128, epochs=50, lr=1e-3)
    """Its one training."""
