"""Item-kNN, sequence-aware: the neighbours in the log of what a user had last."""

from __future__ import annotations

from hllm.models.family import Family

FAMILY = Family(
    name="item_knn",
    title="Item-kNN",
    code="hllm.models.item_knn.model",
    reads=frozenset({"ids"}),
    mark="triangle",
)
