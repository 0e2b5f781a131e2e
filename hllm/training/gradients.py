"""The loss of one step and its gradients: the same numbers whatever the number of processes, and whether the
batch passes at once or in parts.

A batch is the batch of all processes together: everyone cuts its share out of it. Distinct items are numbered
over the whole batch, each is encoded by one process, and the vectors go to all, with their gradients back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hllm.models.common.packing import device_of, on_device
from hllm.models.common.recommender import Batch, Recommender
from hllm.work.ranks import place, total

# K distinct items of the batch of all processes, M of them that one process encodes, D vector width

Run = Callable[[Batch | None, npt.NDArray[np.int64], Tensor | None], Tensor]


class Computation(nn.Module):
    """What is computed in one go, forward, in one precision: what DeepSpeed wraps."""

    def __init__(self, model: Recommender, bf16: bool) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(
        self, batch: Batch | None, items_K: npt.NDArray[np.int64], vectors_KD: Tensor | None
    ) -> Tensor:
        """A batch: its loss, from the vectors of its items, which are made where they are not given. No
        batch: the vectors of these items."""
        with torch.autocast(device_of(self.model).type, torch.bfloat16, enabled=self.bf16):
            if batch is None:
                return self.model.item_vectors(items_K)
            if vectors_KD is None:
                vectors_KD = gathered_vectors(self.model, items_K)
            return self.model(batch, items_K, vectors_KD)


def backpropagate(
    model: Recommender,
    run: Run,
    backward: Callable[[Tensor], None],
    batch: Batch,
    parts: int,
    seed: int,
    scale: int = 1,
) -> Tensor:
    """Add the gradients of a batch's loss, as far as this process computes them, to the parameters; returns
    the loss, the mean over the targets of all processes. Summed over processes the gradients are those of one
    process on the whole batch, times `scale`.

    In `parts`, memory holds the activations of one part at a time. The items are encoded part by part without
    gradients; then the windows pass the user model in parts, all against the same vectors; then the items are
    encoded again, part by part, for their gradients. So negatives are shared by the whole batch, and loss and
    gradients are those of a batch at once.
    """
    at = place()
    windows_S, distinct_K = np.arange(len(batch.history.packing.lengths_S)), batch.distinct_K
    seed += at.rank * 7_919
    torch.manual_seed(seed)
    if parts == 1:
        share, counts = _dealt(windows_S[at.rank :: at.size], windows_S)
        loss = run(batch if at.size == 1 else batch.part(share), distinct_K, None)
        loss = loss if counts else loss * 0
        backward(loss * scale)
        return total(loss.detach().clone())

    first_seed = seed * 2 * parts  # no part of a step draws what one of another step does
    spread = model.items.reads_texts
    trained = any(parameter.requires_grad for parameter in model.items.parameters())
    order_K = _by_length(model, distinct_K)
    chunks = [
        _dealt(order_K[at.rank :: at.size][number::parts] if spread else order_K, order_K)
        for number in range(min(parts, _most(len(order_K))) if spread else 1)
    ]
    vectors_KD: Tensor | None = None
    with torch.no_grad():
        for number, (chunk_M, counts) in enumerate(chunks):
            torch.manual_seed(first_seed + number)
            vectors_MD = run(None, distinct_K[chunk_M], None)
            if vectors_KD is None:
                vectors_KD = vectors_MD.new_zeros(len(distinct_K), vectors_MD.shape[1])
            if counts:
                vectors_KD.index_copy_(0, on_device(chunk_M, vectors_KD.device), vectors_MD)
    assert vectors_KD is not None  # noqa: S101 - there is no batch without items
    leaf_KD = (total(vectors_KD) if spread else vectors_KD).requires_grad_(trained)

    whole = torch.zeros((), device=leaf_KD.device)
    for number in range(min(parts, _most(len(windows_S)))):
        torch.manual_seed(first_seed + parts + number)
        share, counts = _dealt(windows_S[at.rank :: at.size][number::parts], windows_S)
        loss = run(batch.part(share), distinct_K, leaf_KD)
        loss = loss if counts else loss * 0
        backward(loss * scale)
        whole += loss.detach()

    if trained:
        assert leaf_KD.grad is not None  # noqa: S101 - every part reads them
        gradient_KD = total(leaf_KD.grad) if spread else leaf_KD.grad
        for number, (chunk_M, counts) in enumerate(chunks):
            torch.manual_seed(first_seed + number)
            vectors_MD = run(None, distinct_K[chunk_M], None)
            gradient_MD = gradient_KD[on_device(chunk_M, gradient_KD.device)]
            backward((vectors_MD * (gradient_MD if counts else 0)).sum())
    return total(whole)


def gathered_vectors(model: Recommender, distinct_K: npt.NDArray[np.int64]) -> Tensor:
    """(K, D) vectors of all items: every process reads the texts of its share, and has everyone's vectors.
    What needs no reading, everyone looks up."""
    at = place()
    if at.size == 1 or not model.items.reads_texts:
        return model.item_vectors(distinct_K)
    order_K = _by_length(model, distinct_K)
    mine_M, counts = _dealt(order_K[at.rank :: at.size], order_K)
    vectors_MD = model.item_vectors(distinct_K[mine_M])
    empty_KD = vectors_MD.new_zeros(len(distinct_K), vectors_MD.shape[1])
    rows_M = on_device(mine_M, vectors_MD.device)
    placed_KD = empty_KD.index_copy(0, rows_M, vectors_MD if counts else vectors_MD * 0)
    gathered: Tensor = _Gather.apply(placed_KD)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Rows that one process has and all others have as zeros: to all, and everyone's gradients back."""

    @staticmethod
    def forward(context: object, rows_KD: Tensor) -> Tensor:
        return total(rows_KD.clone())

    @staticmethod
    def backward(context: object, gradient_KD: Tensor) -> Tensor:
        return total(gradient_KD.clone(memory_format=torch.contiguous_format))


def _by_length(model: Recommender, distinct_K: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(K,) places of items, the shortest texts first: dealt out in turn, every share is as much work."""
    if not model.items.reads_texts:
        return np.arange(len(distinct_K))
    lengths_K = model.items.token_offsets[distinct_K + 1] - model.items.token_offsets[distinct_K]
    return np.argsort(lengths_K, kind="stable")


def _most(count: int) -> int:
    """The largest share of so many."""
    return -(-count // place().size)


def _dealt(
    share: npt.NDArray[np.int64], everything: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], bool]:
    """A share, and whether it counts. Processes run in step, as each may hold a piece of the weights: one
    whose share is empty does something that does not count."""
    return (share, True) if len(share) else (everything[:1], False)
