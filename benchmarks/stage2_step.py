"""What a stage-2 step costs: beside a stage-1 step, and beside a SASRec step whose user model is as large.

    python benchmarks/stage2_step.py

The same windows, negatives and precision (bf16 where training would use it) for all: forward, backward,
clipping and AdamW. The user models are two layers of width 576, as in SmolLM2-135M; stage 1 also trains the
Item LLM, stage 2 reads vectors from the cache, SASRec an embedding table. A SASRec of its usual width (64)
stands beside them. Each runs in a process of its own, in turns, and so has a peak memory of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import HEADS, WIDTH, smollm2, zipf_log
from measure import Figures, Times, arguments, machine, memory_apart, print_memory_of, print_table
from torch import nn

from hllm.data.prepared import Prepared
from hllm.models.common.items import CachedItems, IdItems
from hllm.models.common.recommender import Recommender
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.users import DecoderUser
from hllm.models.sasrec.user import SASRecUser
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.loop import in_bf16
from hllm.training.updates import parameter_groups

WAYS = ("stage 1", "stage 2", "SASRec 576", "SASRec 64")


@dataclass(frozen=True)
class Size:
    users: int
    items: int
    history: int
    batch: int
    negatives: int
    item_layers: int
    user_layers: int
    steps: int
    rounds: int


FULL = Size(
    users=500,
    items=10_000,
    history=50,
    batch=32,
    negatives=512,
    item_layers=2,
    user_layers=2,
    steps=4,
    rounds=2,
)
QUICK = Size(
    users=20, items=200, history=8, batch=3, negatives=8, item_layers=1, user_layers=1, steps=2, rounds=1
)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    if args.only:
        print_memory_of(training_of(args.only, Prepared.open(args.folder), size))
        return
    print(machine(args.threads))
    figures = Figures("stage-2 step")
    with tempfile.TemporaryDirectory() as name:
        zipf_log(Path(name), size.users, size.items, size.history, size.history * 2)
        runs = [
            (way, *memory_apart(__file__, way, Path(name), args)) for _ in range(size.rounds) for way in WAYS
        ]
    times = {
        way: Times([seconds for found, _, answer in runs if found == way for seconds in answer["seconds"]])
        for way in WAYS
    }  # type: ignore[index]
    memory = {
        way: max((memory for found, memory, _ in runs if found == way), key=lambda one: one.peak)
        for way in WAYS
    }
    sizes = {way: answer for way, _, answer in runs}
    rows = []
    for way in WAYS:
        trained = f"{sizes[way]['user'] / 1e6:.2f} M + {sizes[way]['items'] / 1e6:.2f} M"  # type: ignore[index]
        ratio = times[way].median / times["stage 2"].median
        rows.append((way, trained, str(times[way]), f"{ratio:.2f}", str(memory[way])))
        figures.add(way, f"{times[way]}; {ratio:.2f} times stage 2; peak {memory[way]}")
    precision = "bf16" if in_bf16("auto") else "fp32"
    print(
        f"{size.batch} windows of {size.history}, {size.negatives} negatives of {size.items:,} items, "
        f"{precision}"
    )
    print_table(rows, ("step", "trained: user + items", "median (range)", "times stage 2", "peak memory"))
    ratio = times["stage 1"].median / times["stage 2"].median
    figures.claim("a stage-2 step against a stage-1 step", f"{ratio:.1f} times as fast", "faster", ratio > 1)
    ratio = times["SASRec 576"].median / times["stage 2"].median
    figures.claim(
        "a stage-2 step against SASRec with a user model of the same size",
        f"{ratio:.2f} times as fast",
        "at most 1.1 times its time",
        ratio >= 1 / 1.1,
    )
    figures.finish(args.figures)


def training_of(way: str, prepared: Prepared, size: Size) -> Callable[[], dict[str, object]]:
    """A few steps as `hllm.training.loop.fit` takes them, the first one to warm up."""
    torch.manual_seed(0)
    model = model_of(way, prepared, size).train()
    batches = Batches(prepared, size.history, size.batch, size.negatives, seed=1)
    stage, seconds = Stage(), []
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), lr=stage.lr, betas=(0.9, 0.98), fused=True)

    def train() -> dict[str, object]:
        for step in range(size.steps + 1):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(stage.precision)):
                loss = model.loss(batches[step])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds[1:], "user": trained(model.user), "items": trained(model.items)}

    return train


def model_of(way: str, prepared: Prepared, size: Size) -> Recommender:
    items: TextItems | CachedItems | IdItems
    user: DecoderUser | SASRecUser
    if way.startswith("SASRec"):
        width, heads = (WIDTH, HEADS) if way.endswith(str(WIDTH)) else (64, 2)
        items, user = (
            IdItems(size.items, width),
            SASRecUser(width, size.user_layers, heads, 0.2, size.history),
        )
    else:
        user = DecoderUser(smollm2(size.user_layers))
        if way == "stage 1":
            items = TextItems(smollm2(size.item_layers))
            items.attach(prepared.token_ids, prepared.token_offsets, trim=True)
        else:
            vectors = np.random.default_rng(0).normal(size=(size.items, WIDTH)).astype(np.float32)
            items = CachedItems(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return Recommender(items, user, 0.07)


def trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
