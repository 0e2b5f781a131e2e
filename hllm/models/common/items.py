"""The item side of a model without texts: an item index in, a unit vector out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.packing import on_device

# K distinct items, D vector width
Items = npt.NDArray[np.integer]


class IdItems(nn.Module):
    """An embedding table: what ID-based models know of an item."""

    reads_texts = False

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(items, width) * width**-0.5)
        self.width = width

    def forward(self, items_K: Items) -> Tensor:
        """(K,) -> (K, D), unit length."""
        return F.normalize(
            F.embedding(on_device(np.asarray(items_K, dtype=np.int64), self.table.device), self.table),
            dim=-1,
        )

    def full_state(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}


class CachedItems(nn.Module):
    """Vectors that a frozen item side made before (stage 2; HLLM, table 8): nothing here is trained, the Item
    LLM is not even loaded."""

    reads_texts = False

    def __init__(self, vectors_ID: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.vectors = vectors_ID
        self.width = vectors_ID.shape[1]
        # Moves with the model, and so says where the vectors are wanted.
        self.here: Tensor
        self.register_buffer("here", torch.empty(0), persistent=False)

    def forward(self, items_K: Items) -> Tensor:
        """(K,) -> (K, D). The catalogue stays where it is, mapped from disk: only a batch's rows travel."""
        return on_device(np.asarray(self.vectors[items_K], dtype=np.float32), self.here.device)
