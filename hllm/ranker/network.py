"""The reference ranker: how probably a user likes an item, from what Feast says of both.

    base      ids, counts, shares of likes, recency, categories -> network -> logit
    vectors   the same, with the user's and the item's vector and their affinity
    fusion    the same again, with LEARN's fusion (arXiv 2405.03988): an auxiliary network over both vectors,
              trained with a conversion loss of its own, whose middle layer joins the ranker's features;
              the loss is the ranker's plus the auxiliary one

Every variant has the same widths, so a difference between them is a difference of what they read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from hllm.ranker.encoding import NUMBERS, Encoded, Encoding
from hllm.ranker.features import Features
from hllm.settings import Ranking
from hllm.work.artifacts import write_atomically

# R rows, D vector width, V width of what is made of a vector, H hidden width, N numbers, C categories

VARIANTS = ("base", "vectors", "fusion")


@dataclass(frozen=True)
class Inputs:
    """R encoded rows as tensors."""

    users_R: Tensor
    items_R: Tensor
    numbers_RN: Tensor
    categories_RC: Tensor
    user_RD: Tensor
    item_RD: Tensor
    affinity_R2: Tensor
    """The affinity, and whether there is none."""

    @classmethod
    def of(cls, features: Features, encoded: Encoded) -> Inputs:
        missing_R = np.isnan(features.affinity_R)
        affinity_R2 = np.stack([np.nan_to_num(features.affinity_R), missing_R], axis=1)
        arrays: Sequence[npt.NDArray[Any]] = (
            encoded.users_R,
            encoded.items_R,
            encoded.numbers_RN,
            encoded.categories_RC,
            features.users_RD,
            features.items_RD,
            affinity_R2.astype(np.float32),
        )
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def take(self, rows: Tensor) -> Inputs:
        return Inputs(*(column[rows] for column in vars(self).values()))

    def __len__(self) -> int:
        return len(self.users_R)


class Auxiliary(nn.Module):
    """LEARN's auxiliary network: both vectors in, a conversion logit out; it lends its middle layer."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2 * width, 2 * hidden), nn.ReLU(), nn.Dropout(dropout))
        self.middle = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.last = nn.Linear(hidden, 1)

    def forward(self, pair_R2D: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 2D) -> middle layer (R, H), logits (R,)."""
        middle_RH = self.middle(self.first(pair_R2D))
        return middle_RH, self.last(middle_RH).squeeze(1)


class Ranker(nn.Module):
    def __init__(self, variant: str, sizes: dict[str, int], settings: Ranking) -> None:
        """`sizes`: numbers of known `users`, `items` and `categories`, and the `width` of the vectors."""
        super().__init__()
        self.variant, hidden = variant, settings.hidden
        self.user_ids = nn.Embedding(sizes["users"] + 1, settings.id_width)
        self.item_ids = nn.Embedding(sizes["items"] + 1, settings.id_width)
        for table in (self.user_ids, self.item_ids):
            nn.init.normal_(table.weight, std=0.01)
        self.categories = nn.Linear(max(sizes["categories"], 1), settings.id_width)
        width = NUMBERS + 4 * settings.id_width  # ids, their product, categories
        if variant != "base":
            self.scale = sizes["width"] ** 0.5  # entries of a unit vector become about 1
            self.forget = nn.Dropout(settings.dropout)
            self.from_user = nn.Linear(sizes["width"], settings.vector_width)
            self.from_item = nn.Linear(sizes["width"], settings.vector_width)
            width += 3 * settings.vector_width + 2  # both, their product, the affinity
        if variant == "fusion":
            self.auxiliary = Auxiliary(sizes["width"], hidden, settings.dropout)
            width += hidden
        self.head = nn.Sequential(
            nn.Dropout(settings.dropout),
            nn.Linear(width, 2 * hidden),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(2 * hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Ranking logits (R,), and those of the auxiliary network where there is one."""
        user_RI, item_RI = self.user_ids(inputs.users_R), self.item_ids(inputs.items_R)
        parts = [
            inputs.numbers_RN,
            user_RI,
            item_RI,
            user_RI * item_RI,
            self.categories(inputs.categories_RC),
        ]
        auxiliary_R = None
        if self.variant != "base":
            user_RD = self.forget(inputs.user_RD * self.scale)
            item_RD = self.forget(inputs.item_RD * self.scale)
            user_RV, item_RV = self.from_user(user_RD), self.from_item(item_RD)
            parts += [user_RV, item_RV, user_RV * item_RV, inputs.affinity_R2]
        if self.variant == "fusion":
            middle_RH, auxiliary_R = self.auxiliary(torch.cat([user_RD, item_RD], dim=1))
            parts.append(middle_RH)
        return self.head(torch.cat(parts, dim=1)).squeeze(1), auxiliary_R

    def loss(self, inputs: Inputs, labels_R: Tensor) -> Tensor:
        """Binary cross entropy of the ranker, plus the auxiliary network's own."""
        logits_R, auxiliary_R = self(inputs)
        total = functional.binary_cross_entropy_with_logits(logits_R, labels_R)
        if auxiliary_R is not None:
            total = total + functional.binary_cross_entropy_with_logits(auxiliary_R, labels_R)
        return total


@dataclass(frozen=True)
class Trained:
    """A ranker with all that it takes to score what Feast hands out."""

    model: Ranker
    encoding: Encoding
    width: int

    def scores(self, features: Features) -> npt.NDArray[np.float64]:
        """Probability of a like for every row (R,)."""
        return probabilities(self.model, Inputs.of(features, self.encoding(features)))

    def save(self, folder: Path, settings: Ranking) -> None:
        """ranker.json and ranker.safetensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.model.state_dict()), folder / "ranker.safetensors")
        shape = {
            "variant": self.model.variant,
            "width": self.width,
            "settings": settings.model_dump(mode="json"),
            "encoding": self.encoding.as_json(),
        }
        write_atomically(folder / "ranker.json", json.dumps(shape).encode())

    @classmethod
    def load(cls, folder: Path) -> Trained:
        from safetensors.torch import load_file

        shape = json.loads((folder / "ranker.json").read_text("utf-8"))
        encoding = Encoding(**shape["encoding"])
        model = Ranker(shape["variant"], sizes(encoding, shape["width"]), Ranking(**shape["settings"]))
        model.load_state_dict(load_file(folder / "ranker.safetensors"))
        return cls(model.eval(), encoding, shape["width"])


def sizes(encoding: Encoding, width: int) -> dict[str, int]:
    return {
        "users": len(encoding.users),
        "items": len(encoding.items),
        "categories": len(encoding.categories),
        "width": width,
    }


def probabilities(model: Ranker, inputs: Inputs) -> npt.NDArray[np.float64]:
    model.eval()
    with torch.inference_mode():
        logits_R, _ = model(inputs)
    return torch.sigmoid(logits_R.double()).numpy()
