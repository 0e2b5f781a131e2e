"""What families over item IDs share: a table of item vectors below a user model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hllm.data.prepared import Prepared
from hllm.models.common.items import IdItems
from hllm.models.common.recommender import Recommender
from hllm.models.common.settings import IdModel


def new_recommender(chosen: IdModel, user_class: type[Any], prepared: Prepared) -> Recommender:
    """An untrained table and an untrained user model that knows as many positions as it learns from."""
    items = IdItems(prepared.items, chosen.width)
    longest = chosen.stage1.history_length
    user = user_class(chosen.width, chosen.layers, chosen.heads, chosen.dropout, longest)
    return Recommender(items, user, chosen.temperature)


def shape(model: Recommender) -> dict[str, Any]:
    user: Any = model.user
    return {
        "user": {
            "width": user.width,
            "layers": len(user.blocks),
            "heads": user.blocks[0].heads,
            "dropout": user.blocks[0].attention_dropout,
            "max_history": user.max_history,
        }
    }


def load_items(shape: dict[str, Any], weights: dict[str, Tensor], prepared: Prepared) -> IdItems:
    items = IdItems(*weights["table"].shape)
    items.load_state_dict(weights)
    return items
