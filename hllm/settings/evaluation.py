"""How models are judged: the full ranking, the reference ranker, the gate."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from hllm.settings.section import Section


class Evaluation(Section):
    cutoffs: tuple[int, ...] = (5, 10, 50, 200)
    """K of Recall@K and NDCG@K."""
    filter_history: bool = True
    """Whether the headline numbers leave out items the user already has; both are always reported."""
    cold_item_events: int = Field(0, ge=0)
    """Items with at most this many training events are cold."""
    long_tail_item_events: int = Field(29, ge=0)
    """Items with at most this many (and more than cold) are long-tail."""
    cold_user_events: int = Field(5, ge=0)
    """Users with at most this many training events are cold."""
    long_tail_user_events: int = Field(35, ge=0)
    """Users with at most this many (and more than cold) are long-tail."""
    bootstrap: int = Field(1000, ge=10)
    """Resamples of the users behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Level of the intervals."""
    example_users: int = Field(10, ge=0)
    """Users whose recommendations the report shows."""


class Ranking(Section):
    valid_from: str = ""
    """First day of the impressions that choose the reference ranker's best epoch; those from
    `prepare.test_from` to here train it."""
    test_from: str = ""
    """First day of the impressions that test it, until the log's end. Empty: no ranker is trained. The split
    must be temporal."""
    refresh_hours: float = Field(24.0, gt=0)
    """Hours between two refreshes of user vectors and counts; each knows the events before it."""
    lag_minutes: float = Field(0.0, ge=0)
    """Minutes from a refresh to the moment its features can be read."""
    seeds: int = Field(5, ge=1)
    """Rankers trained of each variant; figures are means over them."""
    id_width: int = Field(8, ge=1)
    """Width of the embeddings of user ids, item ids and categories."""
    vector_width: int = Field(8, ge=1)
    """Width of what the ranker makes of each vector."""
    hidden: int = Field(32, ge=1)
    """Width of the last layers of the ranker and of the auxiliary network."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout between layers and on the vectors."""
    batch_size: int = Field(256, ge=1)
    """Impressions per step."""
    epochs: int = Field(30, ge=1)
    """Most passes over the training impressions."""
    patience: int = Field(5, ge=1)
    """Passes without a better validation AUC before training ends; the best weights are kept."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate (Adam)."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW weight decay."""


class Gate(Section):
    metric: str = "ndcg@10"
    """The metric the gate looks at, on the held-out test events: `ndcg@K` or `recall@K` of the full ranking,
    or for a discriminative objective `auc`, `uauc` or `wuauc` of the labelled ones."""
    min_vs: Mapping[str, float] = Field({"popular": 1.0})
    """The candidate's metric must exceed this multiple of each named family's; of a family that is not named,
    or named with 0, the comparison is reported without failing on it."""
    min_vs_champion: float = 0.98
    """... of the champion's on the same events, when there is a champion."""
