"""SASRec as a family: its user model over a table of item vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hllm.data.prepared import Prepared
from hllm.models.common import id_based
from hllm.models.common.id_based import load_items, shape
from hllm.models.common.recommender import Recommender
from hllm.models.sasrec.user import SASRecUser
from hllm.settings import Settings

__all__ = ["load_items", "load_user", "new_model", "shape"]


def new_model(settings: Settings, prepared: Prepared) -> Recommender:
    return id_based.new_recommender(settings.at("sasrec"), SASRecUser, prepared)


def load_user(shape: dict[str, Any], weights: dict[str, Tensor]) -> SASRecUser:
    user = SASRecUser(**shape["user"])
    user.load_state_dict(weights)
    return user
