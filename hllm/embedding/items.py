"""The item cache: every item encoded once, in shards that a killed run continues and readers map into
memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hllm.data.prepared import Prepared
from hllm.errors import DataError, Terminated
from hllm.models.common.packing import device_of, inference_precision
from hllm.models.load import load_item_model
from hllm.work.progress import Progress
from hllm.work.ranks import any_of, device, place, total, turns
from hllm.work.step import Context

SHARD = "vectors-{:05d}.npy"
# I items, D vector width


class ItemVectors:
    """The vectors of a catalogue: row i is item i. Shards stay on disk until they are read."""

    def __init__(self, shards: list[npt.NDArray[np.float32]]) -> None:
        self.shards = shards

    @classmethod
    def open(cls, folder: Path) -> ItemVectors:
        paths = sorted(
            path for path in folder.glob("vectors-*.npy") if re.fullmatch(r"vectors-\d{5}\.npy", path.name)
        )
        if not paths:
            raise DataError("there are no item vectors here", where=folder)
        return cls([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths])

    @property
    def width(self) -> int:
        return int(self.shards[0].shape[1])

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def matrix(self) -> npt.NDArray[np.float32]:
        """(I, D), unit length; memory-mapped when there is one shard."""
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards)


def embed_items(context: Context) -> None:
    """Step: encode every item with the trained item side. A finished shard is never encoded again."""
    prepared = Prepared.open(context.inputs["prepare"])
    train = next(path for need, path in context.inputs.items() if need.startswith("train-"))
    model = load_item_model(train, prepared).to(device())
    shard_items, width = context.settings.embed.shard_items, model.width
    with Progress("embed items", prepared.items, "item") as progress, context.graceful() as stopping:
        for number, start in enumerate(range(0, prepared.items, shard_items)):
            end = min(start + shard_items, prepared.items)
            path = context.output / SHARD.format(number)
            if not context.has(path):
                tokens = context.settings.embed.tokens_per_batch
                vectors = encoded(model, prepared, start, end, tokens, progress.advance)
                _refuse_bad(vectors, start)
                if place().first:
                    _write(path, vectors)
                    context.keep(path)
            else:
                progress.advance(end - start)
            if any_of(stopping.is_set()) and end < prepared.items:
                raise Terminated
    context.rows = {"items": prepared.items}
    context.facts = {"width": width}


def encoded(
    model: Any,
    prepared: Prepared,
    start: int,
    end: int,
    tokens_per_batch: int,
    advance: Callable[[int], None] = lambda items: None,
) -> npt.NDArray[np.float32]:
    """(end - start, D) vectors of the items [start, end), unit length. Processes share the work, and all have
    the result."""
    vectors = np.zeros((end - start, model.width), np.float32)
    batches = batches_by_tokens(prepared, start, end, tokens_per_batch, model)
    with torch.no_grad():  # not inference_mode: ZeRO 3 keeps what it gathers here
        for number, mine in turns(len(batches)):
            items = batches[number]
            with inference_precision(device_of(model)):
                found = model(items).float().cpu().numpy()
            if mine:
                vectors[items - start] = found
            advance(len(items) * place().size)
    total(vectors)
    return vectors


def batches_by_tokens(
    prepared: Prepared, start: int, end: int, tokens_per_batch: int, model: Any
) -> list[npt.NDArray[np.int64]]:
    """Items [start, end) in batches of about as many tokens, texts of similar length together."""
    items = np.arange(start, end)
    if not model.reads_texts:
        return [items]
    lengths = np.diff(np.asarray(prepared.token_offsets[start : end + 1])) + 1
    order = np.argsort(lengths, kind="stable")
    cuts = np.flatnonzero(np.diff((np.cumsum(lengths[order]) - 1) // tokens_per_batch)) + 1
    return np.split(items[order], cuts)


def _write(path: Path, vectors: npt.NDArray[np.float32]) -> None:
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    os.replace(partial, path)


def _refuse_bad(vectors: npt.NDArray[np.float32], start: int) -> None:
    """A zero or non-finite vector would reach every ranking model in silence."""
    lengths = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(bad):
        raise DataError(
            "item vectors are not of unit length",
            where="embed",
            count=(len(bad), len(vectors)),
            examples=[int(row + start) for row in bad[:3]],
        )
