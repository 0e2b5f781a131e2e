"""HSTU (Zhai et al. 2024, arXiv 2402.17152): attention without softmax over item IDs, biased by position and
time."""

from __future__ import annotations

from hllm.models.common.settings import IdModel
from hllm.models.family import Family, TrainingStage

FAMILY = Family(
    name="hstu",
    title="HSTU",
    code="hllm.models.hstu.model",
    settings=IdModel,
    stages=(TrainingStage(("width", "layers", "heads", "dropout", "temperature"), revision=2),),
    reads=frozenset({"ids", "times"}),
    bounded_history=True,
    renamed={"model.hstu": "", "model.temperature": "temperature", "train.hstu": "stage1"},
    mark="diamond",
)
