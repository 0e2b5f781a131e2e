"""TF-IDF: the items whose texts are most like those of what a user had last."""

from __future__ import annotations

from hllm.models.family import Family

FAMILY = Family(
    name="tfidf",
    title="TF-IDF",
    code="hllm.models.tfidf.model",
    reads=frozenset({"texts"}),
    mark="triangle",
)
