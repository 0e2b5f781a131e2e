"""The held-out loss: how surprised a model is by the events it was not trained on.

Minus the logarithm of the probability that the softmax over the whole catalogue, with the model's own
temperature, gives to the item that came next; items the user already has are no candidates. It is L_gen of
the HLLM paper with every item as a negative, and moves more smoothly than a ranking metric.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from hllm.models.common.ranking import HeldOut

BLOCK = 512


def scale_of(train: Path) -> float:
    """The inverse temperature that a model has learned."""
    from safetensors.torch import load_file

    from hllm.models.load import USER

    return float(load_file(train / USER)["log_scale"].clamp(0, np.log(100)).exp())


def softmax_loss(
    users_RD: npt.NDArray[np.float32], items_ID: npt.NDArray[np.float32], scale: float, held_out: HeldOut
) -> npt.NDArray[np.float64]:
    """(R,) in nats."""
    losses_R = np.empty(len(held_out))
    for block in held_out.blocks(BLOCK):
        logits_BI = (users_RD[block] @ items_ID.T).astype(np.float64) * scale
        targets_B = held_out.targets_R[block]
        wanted_B = logits_BI[np.arange(len(targets_B)), targets_B]
        rows, seen = held_out.seen(block)
        logits_BI[rows, seen] = -np.inf
        highest_B = logits_BI.max(axis=1)
        sums_B = np.exp(logits_BI - highest_B[:, None]).sum(axis=1)
        losses_R[block] = highest_B + np.log(sums_B) - wanted_B
    return losses_R
