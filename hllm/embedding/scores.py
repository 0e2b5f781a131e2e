"""How probable it is that users like candidates: discriminative recommendation, at inference."""

from __future__ import annotations

import numpy as np
import torch

from hllm.data.prepared import Prepared
from hllm.embedding.users import Floats, Ints, packed_histories
from hllm.models.packing import ragged
from hllm.models.users import DecoderUser

CANDIDATES_AT_ONCE = 4_096
"""Bounds memory. A history with more candidates than this is encoded once per so many."""

# R histories, P candidates of all of them, I items, D vector width


def judges(model: object) -> bool:
    """Whether a user model was trained to judge candidates."""
    return getattr(model, "fusion", None) is not None


def held_out_scores(
    model: DecoderUser,
    item_vectors_ID: Floats,
    prepared: Prepared,
    users_R: Ints,
    positions_R: Ints,
    asked_R: Ints,
    max_history: int,
    batch: int,
) -> Floats:
    """Row r: how probable it is that the user likes the item of event `position`, from the `max_history`
    events before it, asked at a moment of its own (seconds UTC): (R,), 0 to 1."""
    starts_R = np.maximum(np.asarray(prepared.user_offsets)[users_R], positions_R - max_history)
    return scores_of_candidates(
        model,
        item_vectors_ID,
        prepared.event_items,
        prepared.event_times,
        starts_R,
        positions_R - starts_R,
        asked_R,
        np.asarray(prepared.event_items)[positions_R],
        np.ones(len(positions_R), np.int64),
        batch,
    )


def scores_of_candidates(
    model: DecoderUser,
    item_vectors_ID: Floats,
    event_items: Ints,
    event_times: Ints,
    starts_R: Ints,
    lengths_R: Ints,
    asked_R: Ints,
    candidates_P: Ints,
    counts_R: Ints,
    batch: int,
) -> Floats:
    """Probabilities of candidates (item indices), `counts_R` of them for each history event_items[start :
    start + length], one history after another: (P,), 0 to 1. Histories are never empty."""
    scores_P = np.empty(len(candidates_P), np.float32)
    rows_C, firsts_C, counts_C = _portions(np.asarray(counts_R, np.int64))
    batches = packed_histories(
        model,
        item_vectors_ID,
        event_items,
        event_times,
        starts_R[rows_C],
        lengths_R[rows_C],
        asked_R[rows_C],
        _histories_at_once(counts_C, batch),
    )
    with torch.inference_mode():
        for portions, inputs_TD, history in batches:
            places = ragged(firsts_C[portions], counts_C[portions])
            items = np.asarray(candidates_P[places], np.int64)
            logits = model.scores(
                inputs_TD,
                history,
                torch.from_numpy(np.asarray(item_vectors_ID[items], np.float32)),
                items,
                np.repeat(np.arange(len(portions)), counts_C[portions]),
            )
            scores_P[places] = logits.sigmoid().numpy()
    return scores_P


def _portions(counts_R: Ints) -> tuple[Ints, Ints, Ints]:
    """Rows with candidates, those with very many in several portions: (row, first candidate, how many)."""
    firsts_R, portions_R = np.cumsum(counts_R) - counts_R, -(-counts_R // CANDIDATES_AT_ONCE)
    rows_C = np.repeat(np.arange(len(counts_R)), portions_R)
    before_C = np.arange(len(rows_C)) - np.repeat(np.cumsum(portions_R) - portions_R, portions_R)
    done_C = before_C * CANDIDATES_AT_ONCE
    return rows_C, firsts_R[rows_C] + done_C, np.minimum(counts_R[rows_C] - done_C, CANDIDATES_AT_ONCE)


def _histories_at_once(counts_C: Ints, batch: int) -> int:
    return max(1, min(batch, CANDIDATES_AT_ONCE // max(int(counts_C.max(initial=1)), 1)))
