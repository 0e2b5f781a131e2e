"""SASRec (Kang & McAuley 2018): causal self-attention over item IDs."""

from __future__ import annotations

from hllm.models.common.settings import IdModel
from hllm.models.family import Family, TrainingStage

FAMILY = Family(
    name="sasrec",
    title="SASRec",
    code="hllm.models.sasrec.model",
    settings=IdModel,
    stages=(TrainingStage(("width", "layers", "heads", "dropout", "temperature"), revision=2),),
    reads=frozenset({"ids"}),
    bounded_history=True,
    renamed={"model.sasrec": "", "model.temperature": "temperature", "train.sasrec": "stage1"},
    mark="square",
)
