"""Display names of models and metrics."""

from __future__ import annotations

from collections.abc import Sequence

from hllm.models.family import TrainedModel, families

CHAMPION, ITEM_RATE = "champion", "item-rate"
FIXED = {CHAMPION: "Champion", ITEM_RATE: "Share of likes of the item"}
"""Rows of a table that are no model of these settings."""


def model_name(label: str) -> str:
    """`hllm-2` -> `HLLM stage 2`; a family with one stage does not number it."""
    if label in FIXED:
        return FIXED[label]
    trained = TrainedModel.of(label)
    if trained:
        return trained.title
    return families()[label].title if label in families() else label


def in_sentence(label: str) -> str:
    """A model's name where it does not begin a sentence: untrained models are no proper names."""
    name = model_name(label)
    return name if TrainedModel.of(label) else name[0].lower() + name[1:]


def mark_of(label: str) -> str:
    """The shape of a model in charts."""
    trained = TrainedModel.of(label)
    family = trained.family if trained else families().get(label)
    return family.mark if family else "square"


def ranking_metric(metric: str, cutoffs: Sequence[int]) -> str:
    """What to show of a full ranking when the gate looks at this metric: itself, or NDCG where it is an
    AUC."""
    return metric if "@" in metric else f"ndcg@{10 if 10 in cutoffs else cutoffs[0]}"


def metric_name(metric: str) -> str:
    """`ndcg@10` -> `NDCG@10`; the AUCs have no cutoff."""
    if metric == "loss":
        return "held-out loss"
    kind, at, cutoff = metric.partition("@")
    return {"ndcg": "NDCG", "recall": "Recall"}.get(kind, kind) + at + cutoff if at else metric.upper()
