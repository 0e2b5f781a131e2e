"""Users from their histories: only the last position of each history is a user's vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hllm.data.prepared import Prepared
from hllm.embedding.histories import Floats, Histories, Ints, packed_histories
from hllm.models.common.packing import inference_precision, on_device
from hllm.work.ranks import place, total

# R users (or held-out events), I items, D vector width


def held_out_user_vectors(
    model: nn.Module,
    item_vectors_ID: Floats,
    prepared: Prepared,
    users_R: Ints,
    positions_R: Ints,
    asked_R: Ints,
    max_history: int,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Floats:
    """Row r: the user's vector from the `max_history` events before an event, asked for at a moment of its
    own (seconds UTC): (R, D), unit length."""
    histories = Histories.before(prepared, users_R, positions_R, asked_R, max_history)
    return vectors_of_histories(model, item_vectors_ID, histories, batch, advance)


def vectors_of_histories(
    model: nn.Module,
    item_vectors_ID: Floats,
    histories: Histories,
    batch: int,
    advance: Callable[[int], None] | None = None,
    published: bool = False,
) -> Floats:
    """The vector of each history: (R, D), unit length.

    The vector is the predicted next interest, which ranks a catalogue. A model of late fusion has another
    one, its output at [USER]: with `published`, the vector that other models are to read.

    Processes share the work, and all have the result.
    """
    read: Any = model.user_token_vectors if published and has_user_token(model) else None
    vectors_RD = np.zeros((len(histories), item_vectors_ID.shape[1]), np.float32)
    with torch.no_grad():  # not inference_mode: ZeRO 3 keeps what it gathers here
        for mine, rows, ends, inputs_TD, history in packed_histories(
            model, item_vectors_ID, histories, batch
        ):
            with inference_precision(inputs_TD.device):
                if read:
                    found = read(inputs_TD, history, ends, np.asarray(histories.asked_R)[rows])
                else:
                    found = model(inputs_TD, history)[on_device(ends, inputs_TD.device)]
            if mine:
                vectors_RD[rows] = found.float().cpu().numpy()
            if advance:
                advance(len(rows) * place().size)
    total(vectors_RD)
    return vectors_RD


def has_user_token(model: nn.Module) -> bool:
    """Whether the published user vector is not the predicted next interest."""
    return getattr(model, "objective", "") == "late_fusion"
