"""How models and metrics are called in front of people."""

from __future__ import annotations

from collections.abc import Sequence

from hllm.pipeline import FAMILIES

FAMILY_NAMES = {"hllm": "HLLM", "sasrec": "SASRec", "hstu": "HSTU"}


def model_name(label: str) -> str:
    """`hllm-2` -> `HLLM stage 2`; a family with one stage does not number it."""
    fixed = {"popular": "Most popular", "champion": "Champion", "item-rate": "Share of likes of the item"}
    if label in fixed:
        return fixed[label]
    family, _, stage = label.rpartition("-")
    name = FAMILY_NAMES.get(family, family)
    return f"{name} stage {stage}" if len(FAMILIES.get(family, ())) > 1 else name


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
