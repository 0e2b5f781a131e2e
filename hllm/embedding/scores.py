"""How probable it is that users like candidates: discriminative recommendation, at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hllm.data.prepared import Prepared
from hllm.embedding.histories import Floats, Histories, Ints, packed_histories
from hllm.models.common.packing import inference_precision, on_device, ragged
from hllm.work.ranks import place, total

CANDIDATES_AT_ONCE = 4_096
"""Bounds memory. A history with more candidates than this is encoded again for the next so many."""

# R histories, P candidates of all of them, I items, D vector width


def judges(model: object) -> bool:
    """Whether a user model was trained to judge candidates."""
    return getattr(model, "fusion", None) is not None


def held_out_scores(
    model: Any,
    item_vectors_ID: Floats,
    prepared: Prepared,
    users_R: Ints,
    positions_R: Ints,
    asked_R: Ints,
    max_history: int,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Floats:
    """Row r: how probable it is that the user likes the item of event `position`, from the `max_history`
    events before it, asked at a moment of its own (seconds UTC): (R,), 0 to 1."""
    histories = Histories.before(prepared, users_R, positions_R, asked_R, max_history)
    candidates_R = np.asarray(prepared.event_items)[positions_R]
    return scores_of_candidates(
        model, item_vectors_ID, histories, candidates_R, np.ones(len(histories), np.int64), batch, advance
    )


def scores_of_candidates(
    model: Any,
    item_vectors_ID: Floats,
    histories: Histories,
    candidates_P: Ints,
    counts_R: Ints,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Floats:
    """Probabilities of candidates (item indices), `counts_R` of them for each history, one history after
    another: (P,), 0 to 1."""
    scores_P = np.zeros(len(candidates_P), np.float32)
    counts_R = np.asarray(counts_R, np.int64)
    firsts_R = np.cumsum(counts_R) - counts_R
    asking = np.flatnonzero(counts_R)
    with_candidates = histories.take(asking)
    batches = packed_histories(
        model,
        item_vectors_ID,
        with_candidates,
        _histories_at_once(with_candidates.starts_R, counts_R[asking], batch),
    )
    with torch.no_grad():  # not inference_mode: ZeRO 3 keeps what it gathers here
        for mine, found, after_Q, inputs_TD, history in batches:
            rows = asking[found]
            asked_Q = np.asarray(with_candidates.asked_R[found], np.int64)
            question_P = np.repeat(np.arange(len(rows)), counts_R[rows])
            places = ragged(firsts_R[rows], counts_R[rows])
            for begin in range(0, len(places), CANDIDATES_AT_ONCE):
                part = slice(begin, begin + CANDIDATES_AT_ONCE)
                items = np.asarray(candidates_P[places[part]], np.int64)
                candidates_PD = on_device(np.asarray(item_vectors_ID[items], np.float32), inputs_TD.device)
                with inference_precision(inputs_TD.device):
                    logits_P = model.scores(
                        inputs_TD, history, candidates_PD, items, question_P[part], after_Q, asked_Q
                    )
                if mine:
                    scores_P[places[part]] = logits_P.sigmoid().float().cpu().numpy()
            if advance:
                advance(len(rows) * place().size)
    total(scores_P)
    return scores_P


def _histories_at_once(starts_R: Ints, counts_R: Ints, batch: int) -> int:
    """Rows with the same start may share a history."""
    _, group_R = np.unique(starts_R, return_inverse=True)
    most = int(np.bincount(group_R, weights=counts_R).max(initial=1))
    return max(1, min(batch, CANDIDATES_AT_ONCE // most))
