"""Everything that a GPU should be asked, in one call: is it right, and how fast?

    python benchmarks/gpu/all.py                      # on a machine with a GPU; writes benchmarks/RESULTS.md
    python benchmarks/gpu/all.py --quick --results -  # tiny shapes, also on a CPU: shows that it works

First, correctness: the vector of an item alone, packed with others, and packed with yet others; on the CPU
and here; with flash attention and without. Then tokens per second, model FLOP utilisation and peak memory of
a stage-1 step, of encoding a catalogue and of a stage-2 step, in the shapes of SmolLM2-135M and
TinyLlama-1.1B (random weights: speed ignores them), plainly and by DeepSpeed's ZeRO 2; at the paper's Pixel
setting (windows of 10 items, 256 tokens each, 5,632 negatives). A step that does not fit is done in twice as
many parts.

Useful FLOPs are three times those of the forward pass, counted as it runs (matrix products; flash attention's
own are left out): what is computed twice to save memory counts once.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from measure import Figures, arguments, machine, print_table
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig

from hllm.data.prepared import Prepared, write_arrays
from hllm.embedding.items import encoded
from hllm.models.common.items import CachedItems
from hllm.models.common.packing import packed_attention
from hllm.models.common.recommender import Batch, Recommender
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.users import DecoderUser
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.gradients import backpropagate
from hllm.training.loop import in_bf16
from hllm.training.updates import Everywhere, Spread, Update
from hllm.work.ranks import joined

MARK = "## On a GPU"
PEAKS = {  # dense bf16 tensor operations per second, as the vendor states them
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
LLAMA = {"vocab_size": 32_000, "tie_word_embeddings": True, "use_cache": False, "rms_norm_eps": 1e-5}


@dataclass(frozen=True)
class Size:
    """What is measured at."""

    shapes: dict[str, dict[str, int]]
    items: int
    users: int
    tokens: int
    history: int
    batch: int
    negatives: int
    long_history: int
    encoded: int
    repeats: int


SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
TINY = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
FULL = Size(
    {
        "SmolLM2-135M": {**SMOL, "num_key_value_heads": 3},
        "TinyLlama-1.1B": {**TINY, "num_key_value_heads": 4},
    },
    items=50_000,
    users=2_000,
    tokens=256,
    history=10,
    batch=512,
    negatives=5_632,
    long_history=200,
    encoded=2_048,
    repeats=3,
)
NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK = Size({"tiny": {**NARROW, "num_key_value_heads": 2}}, 200, 40, 12, 5, 8, 16, 12, 40, 1)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--results", default="", help="Markdown file to write into (- writes none)")
    parser.add_argument("--peak", type=float, default=0.0, help="peak bf16 TFLOP/s, where it is not known")
    parser.add_argument("--zero", type=int, default=2, help="DeepSpeed's level beside plain training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    if not cuda and not args.quick:
        sys.exit("there is no GPU here; --quick runs everything at tiny shapes on the CPU")
    size = QUICK if args.quick else FULL
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "CPU, tiny shapes: the figures mean nothing"
    peak = args.peak * 1e12 or next((flops for part, flops in PEAKS.items() if part in name), 0.0)
    print(f"{machine(args.threads)}\n{name}", flush=True)
    figures = Figures("gpu")
    checks = correctness(device, figures, size)
    rows = []
    with tempfile.TemporaryDirectory() as folder, joined(alone_too=True):
        prepared = catalogue(Path(folder), size)
        for shape, config in size.shapes.items():
            given = (prepared, config, size, device)
            plain = stage1(*given)
            # The same products, whoever updates the weights.
            spread = replace(stage1(*given, zero=args.zero), useful=plain.useful)
            for measured in (plain, spread, encoding(*given), stage2(*given)):
                rows.append([shape, *shown(measured, peak)])
                print_table(rows[-1:], HEADERS)
    figures.finish(args.figures)
    where = args.results or str(Path(__file__).parents[1] / "RESULTS.md")
    if where != "-":
        write(Path(where), f"{name}; {machine(args.threads)}", checks, rows)
    if any(check[-1] == "FAIL" for check in checks):
        sys.exit("the GPU computes something else")


# ---- is it right? ----


def correctness(device: torch.device, figures: Figures, size: Size) -> list[list[str]]:
    """Each comparison: what, the largest difference of unit vectors, what is allowed, PASS or FAIL."""
    shape = next(iter(size.shapes.values()))
    torch.manual_seed(0)
    decoder = decoder_of({**shape, "num_hidden_layers": min(4, shape["num_hidden_layers"])})
    items = TextItems(decoder)
    torch.nn.init.normal_(items.item_token, std=0.02)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, size.tokens + 1, 48)
    ids = rng.integers(0, LLAMA["vocab_size"], lengths.sum()).astype(np.int32)
    items.attach(ids, np.concatenate([[0], np.cumsum(lengths)]))
    everything, some = np.arange(48), np.arange(0, 48, 5)

    def vectors(chosen: np.ndarray, half: bool = False, flash: bool = True) -> torch.Tensor:
        without = mock.patch("hllm.models.common.packing.flash_type", return_value=None)
        precision = torch.autocast(items.words.device.type, torch.bfloat16, enabled=half)
        with torch.no_grad(), precision, nullcontext() if flash else without:
            return items(chosen).float().cpu()

    on_cpu = vectors(everything)
    items.to(device)
    checks = []

    def check(what: str, one: torch.Tensor, other: torch.Tensor, most: float) -> None:
        apart = float((one - other).abs().max())
        verdict = "PASS" if apart <= most else "FAIL"
        checks.append([what, f"{apart:.1e}", f"{most:.0e}", verdict])
        figures.claim(what, f"{apart:.1e}", f"at most {most:.0e}", apart <= most)

    for half, near in ((False, 1e-5), (True, 2e-2)):
        kind = "bf16" if half else "fp32"
        together = vectors(everything, half)
        alone = torch.cat([vectors(np.array([item]), half) for item in some])
        check(f"{kind}: alone and packed with 47 others", alone, together[some], near)
        check(f"{kind}: packed with others", vectors(some, half), together[some], near)
        check(f"{kind} here and fp32 on the CPU", together, on_cpu, 5e-2 if half else 1e-4)
    flash, none = vectors(everything, True), vectors(everything, True, flash=False)
    check("bf16: with flash attention and without", flash, none, 2e-2)
    return checks


# ---- how fast? ----

HEADERS = ("shape", "what", "at", "tokens/s", "utilisation", "peak memory")


@dataclass(frozen=True)
class Measured:
    what: str
    at: str
    tokens: int
    seconds: float
    memory: float
    """GiB; 0 where there is no GPU."""
    useful: float
    """Floating-point operations; 0 where they were not counted."""


def stage1(
    prepared: Prepared, config: dict[str, int], size: Size, device: torch.device, zero: int = 0
) -> Measured:
    """A step of both LLMs, in as few parts as fit."""
    stage = Stage(history_length=size.history, batch_size=size.batch, negatives=size.negatives)
    batch = Batches(prepared, stage.history_length, stage.batch_size, stage.negatives, 1)[0]
    tokens = (size.tokens + 1) * len(batch.distinct_K) + batch.history.packing.tokens

    def model() -> Recommender:
        torch.manual_seed(0)
        items = TextItems(decoder_of(config))
        items.attach(prepared.token_ids, prepared.token_offsets, trim=True)
        return Recommender(items, DecoderUser(decoder_of(config)), 0.07).to(device)

    what = f"stage 1, ZeRO {zero}" if zero else "stage 1"
    return in_parts(what, model, batch, stage, tokens, device, size.repeats, zero)


def stage2(prepared: Prepared, config: dict[str, int], size: Size, device: torch.device) -> Measured:
    """A step of the User LLM alone, over cached vectors and long histories."""
    stage = Stage(history_length=size.long_history, batch_size=size.batch // 4, negatives=size.negatives)
    batch = Batches(prepared, stage.history_length, stage.batch_size, stage.negatives, 1)[0]
    vectors = np.random.default_rng(0).normal(size=(prepared.items, config["hidden_size"])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def model() -> Recommender:
        torch.manual_seed(0)
        return Recommender(CachedItems(vectors), DecoderUser(decoder_of(config)), 0.07).to(device)

    return in_parts("stage 2", model, batch, stage, batch.history.packing.tokens, device, size.repeats)


def encoding(prepared: Prepared, config: dict[str, int], size: Size, device: torch.device) -> Measured:
    """Reading item texts, as `hllm embed` does."""
    items = TextItems(decoder_of(config)).to(device).eval()
    items.attach(prepared.token_ids, prepared.token_offsets)
    tokens = size.encoded * (size.tokens + 1)
    at_once = min(tokens, 65_536)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16("auto")):
            encoded(items, prepared, 0, size.encoded, at_once)

    with FlopCounterMode(display=False) as counter:
        run()
    seconds, memory = timed(run, device, size.repeats)
    at = f"{size.encoded:,} texts of {size.tokens} tokens, {at_once:,} tokens at once"
    return Measured("encoding", at, tokens, seconds, memory, counter.get_total_flops())


def in_parts(
    what: str,
    model_of: Callable[[], Recommender],
    batch: Batch,
    stage: Stage,
    tokens: int,
    device: torch.device,
    repeats: int,
    zero: int = 0,
) -> Measured:
    """One training step, in 1, 2, 4, ... parts: the first that fits."""
    for parts in (2**power for power in range(14)):
        try:
            seconds, memory, useful = step_in(parts, model_of(), batch, stage, device, repeats, zero)
        except torch.cuda.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            continue
        lengths, negatives = batch.history.packing.lengths_S, len(batch.negatives_N)
        at = (
            f"{len(lengths)} windows of up to {lengths[-1]}, {len(batch.distinct_K):,} distinct items, "
            f"{negatives:,} negatives, parts: {parts}"
        )
        return Measured(what, at, tokens, seconds, memory, useful)
    sys.exit("not even one item fits")


def step_in(
    parts: int,
    model: Recommender,
    batch: Batch,
    stage: Stage,
    device: torch.device,
    repeats: int,
    zero: int,
) -> tuple[float, float, float]:
    """Seconds, peak memory (GiB) and, without ZeRO, useful FLOPs of a step."""
    bf16 = in_bf16("auto")
    update: Update = Spread(model, stage, bf16, zero) if zero else Everywhere(model, stage, bf16)

    def step() -> None:
        with update.together() if parts > 1 else nullcontext():
            loss = backpropagate(model, update.run, update.backward, batch, parts, 1, update.scale)
        update.step(0, loss, 1.0)

    seconds, memory = timed(step, device, repeats)
    forward = [0]
    if not zero:
        with counting_forward(model, forward):
            step()
    if not np.isfinite(update.seen().loss):
        sys.exit("the loss is not finite")
    return seconds, memory, 3.0 * forward[0]


@contextmanager
def counting_forward(model: Recommender, found: list[int]) -> Iterator[None]:
    """Adds up the products of the forward passes that remember what gradients need: each item and event
    once."""

    def counted(forward: Callable[..., Any], *given: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*given)
        with FlopCounterMode(display=False) as counter:
            result = forward(*given)
        found[0] += counter.get_total_flops()
        return result

    towers = (model.items, model.user)
    for tower in towers:
        tower.forward = partial(counted, tower.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for tower in towers:
            del tower.forward


def timed(run: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds, after one run that does not count, and the peak of the GPU's memory in GiB."""
    cuda = device.type == "cuda"
    run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def shown(measured: Measured, peak: float) -> list[str]:
    used = measured.useful / measured.seconds
    return [
        measured.what,
        measured.at,
        f"{measured.tokens / measured.seconds:,.0f}",
        f"{used / peak:.0%}" if peak else f"{used / 1e12:.3g} TFLOP/s",
        f"{measured.memory:.1f} GiB" if measured.memory else "-",
    ]


# ---- what it is asked about ----


def decoder_of(shape: dict[str, int]) -> Any:
    config = LlamaConfig(**{**LLAMA, **shape})
    return AutoModel.from_config(config, attn_implementation=packed_attention(), dtype=torch.float32)


def catalogue(folder: Path, size: Size) -> Prepared:
    """Texts all as long as the limit, histories a little longer than the longest window, Zipf's law."""
    rng = np.random.default_rng(0)
    events = size.long_history + 1
    weights = 1 / np.arange(1, size.items + 1)
    offsets = np.arange(size.users + 1) * events
    write_arrays(
        folder,
        event_items=rng.choice(size.items, offsets[-1], p=weights / weights.sum()),
        event_times=np.arange(offsets[-1]),
        event_labels=np.full(offsets[-1], -1),
        user_offsets=offsets,
        train_ends=offsets[1:],
        valid_ends=offsets[1:],
        token_ids=rng.integers(0, LLAMA["vocab_size"], size.items * size.tokens),
        token_offsets=np.arange(size.items + 1) * size.tokens,
    )
    return Prepared.open(folder)


def write(path: Path, where: str, checks: list[list[str]], rows: list[list[str]]) -> None:
    """Put the figures under their heading, in place of those that stood there."""
    before = path.read_text("utf-8").partition(MARK)[0].rstrip() if path.exists() else "# What was measured"
    day = datetime.now(UTC).date()
    compared = ("unit vectors compared", "largest difference", "allowed", "")
    right = tabulate(checks, compared, "github", disable_numparse=True)
    fast = tabulate(rows, HEADERS, "github", disable_numparse=True)
    text = f"{where}. {day}, `python benchmarks/gpu/all.py`.\n\n{right}\n\n{fast}\n"
    path.write_text(f"{before}\n\n{MARK}\n\n{text}", "utf-8")


if __name__ == "__main__":
    main()
