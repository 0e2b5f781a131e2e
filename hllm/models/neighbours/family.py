"""Neighbours: item-kNN and TF-IDF, each over its largest score, summed."""

from __future__ import annotations

from hllm.models.family import Family

FAMILY = Family(
    name="neighbours",
    title="Neighbours",
    code="hllm.models.neighbours.model",
    reads=frozenset({"ids", "texts"}),
    mark="triangle",
)
