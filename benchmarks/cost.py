"""What grows with what: cost against batch size, history length, text length and catalogue size.

    python benchmarks/cost.py

CPU seconds of one thread, fp32, towers of one layer in SmolLM2-135M's shape. Along each axis one size grows
and nothing else changes; the exponent is the slope of log(time) over log(size), 1 where time grows as the
size does.
Linear is what packing promises: no padding, every item encoded once, attention only within a text or a
history (its share that grows with the square is small at these lengths). A training step must not feel the
size of the catalogue at all: it encodes the items of its batch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import WIDTH, smollm2
from measure import Figures, arguments, interleaved, machine, print_table
from ranking import unit
from ranking import world as ranked_world

from hllm.data.prepared import Prepared, write_arrays
from hllm.embedding.items import batches_by_tokens
from hllm.models.common.items import CachedItems
from hllm.models.common.ranking import rank_by_vectors
from hllm.models.common.recommender import Recommender
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.users import DecoderUser
from hllm.training.batches import Batches

Act = Callable[[], object]


@dataclass(frozen=True)
class Size:
    batch: Sequence[int]
    history: Sequence[int]
    text: Sequence[int]
    encoded: Sequence[int]
    ranked: Sequence[int]
    catalogue: Sequence[int]
    repeats: int


FULL = Size(
    batch=(8, 16, 32),
    history=(25, 50, 100),
    text=(16, 32, 64, 128),
    encoded=(500, 1_000, 2_000),
    ranked=(25_000, 50_000, 100_000),
    catalogue=(10_000, 100_000, 1_000_000),
    repeats=5,
)
QUICK = Size((2, 4), (4, 8), (8, 16), (20, 40), (200, 400), (200, 2_000), repeats=1)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    size = QUICK if args.quick else FULL
    print(machine(1))
    figures, rows = Figures("cost"), []
    with tempfile.TemporaryDirectory() as name:
        for axis, most, sides in axes(size, Path(name)):
            for act in sides.values():
                act()
            times = interleaved({str(at): act for at, act in sides.items()}, size.repeats, time.process_time)
            medians = [times[str(at)].median for at in sides]
            slope = float(np.polyfit(np.log(list(sides)), np.log(medians), 1)[0])
            shown = ", ".join(
                f"{at:,}: {seconds * 1e3:,.0f} ms" for at, seconds in zip(sides, medians, strict=True)
            )
            rows.append((axis, shown, f"{slope:.2f}"))
            figures.add(axis, shown)
            figures.claim(f"{axis}: exponent", f"{slope:.2f}", f"at most {most}", slope <= most)
    print_table(rows, ("cost of ... against ...", "median", "exponent"))
    figures.finish(args.figures)


def axes(size: Size, folder: Path) -> list[tuple[str, float, dict[int, Act]]]:
    """What is measured along which axis, the largest exponent it may have, and the work at each place."""
    return [
        (
            "a stage-1 step against batch size (windows of 10)",
            1.1,
            {at: stage1(folder, f"batch{at}", windows=at, history=10, items=5_000) for at in size.batch},
        ),
        (
            "a stage-1 step against text length (tokens)",
            1.1,
            {
                at: stage1(folder, f"text{at}", windows=4, history=10, items=5_000, tokens=at)
                for at in size.text
            },
        ),
        (
            "a stage-1 step against catalogue size",
            0.1,
            {at: stage1(folder, f"items{at}", windows=8, history=10, items=at) for at in size.catalogue},
        ),
        (
            "a stage-2 step against history length (16 windows)",
            1.15,
            {at: stage2(folder, f"history{at}", windows=16, history=at) for at in size.history},
        ),
        (
            "encoding against catalogue size (items of 24 tokens)",
            1.1,
            {at: encoding(folder, f"encode{at}", at) for at in size.encoded},
        ),
        ("ranking of 500 users against catalogue size", 1.1, {at: ranking(at) for at in size.ranked}),
    ]


def log(folder: Path, windows: int, history: int, items: int, tokens: int) -> Prepared:
    """One full window for each user; events drawn evenly, so that few of a batch's items are the same."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    offsets = np.arange(windows + 1) * (history + 1)
    events = rng.permutation(items)[: offsets[-1]] if items >= offsets[-1] else rng.integers(
        0, items, offsets[-1]
    )  # fmt: skip
    write_arrays(
        folder,
        token_ids=rng.integers(0, 2_000, items * tokens),
        token_offsets=np.arange(items + 1) * tokens,
        event_items=events,
        event_times=np.arange(offsets[-1]),
        event_labels=np.full(offsets[-1], -1),
        user_offsets=offsets,
        train_ends=offsets[1:],
        valid_ends=offsets[1:],
    )
    return Prepared.open(folder)


def stage1(folder: Path, name: str, windows: int, history: int, items: int, tokens: int = 24) -> Act:
    """Forward and backward of one batch, drawing it included."""
    prepared = log(folder / name, windows, history, items, tokens)
    torch.manual_seed(0)
    texts = TextItems(smollm2(1))
    texts.attach(prepared.token_ids, prepared.token_offsets, trim=True)
    return step(Recommender(texts, DecoderUser(smollm2(1)), 0.07), prepared, windows, history, negatives=32)


def stage2(folder: Path, name: str, windows: int, history: int, items: int = 5_000) -> Act:
    prepared = log(folder / name, windows, history, items, tokens=1)
    torch.manual_seed(0)
    vectors = unit(np.random.default_rng(0).normal(size=(items, WIDTH)))
    model = Recommender(CachedItems(vectors), DecoderUser(smollm2(1)), 0.07)
    return step(model, prepared, windows, history, negatives=128)


def step(model: Recommender, prepared: Prepared, windows: int, history: int, negatives: int) -> Act:
    batches = Batches(prepared, history, windows, negatives, seed=1)
    model.train()

    def act() -> float:
        model.zero_grad(set_to_none=True)
        loss = model.loss(batches[0])
        loss.backward()
        return float(loss.detach())

    return act


def encoding(folder: Path, name: str, items: int) -> Act:
    prepared = log(folder / name, 1, 4, items, tokens=24)
    texts = TextItems(smollm2(1)).eval()
    texts.attach(prepared.token_ids, prepared.token_offsets)

    def act() -> None:
        with torch.inference_mode():
            for chosen in batches_by_tokens(prepared, 0, items, 4_096, texts):
                texts(chosen)

    return act


def ranking(items: int) -> Act:
    from ranking import Size as World

    users, vectors, held_out = ranked_world(World(500, items, 64, 30, 1))
    return lambda: rank_by_vectors(users, vectors, held_out)


if __name__ == "__main__":
    main()
