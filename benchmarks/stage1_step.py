"""One stage-1 training step (forward and backward) of HLLM beside a naive one: same batch, same weights.

    python benchmarks/stage1_step.py

Items are drawn by Zipf's law, texts are film titles, both LLMs have the shape of SmolLM2-135M (width 576,
vocabulary 49,152) cut to a few layers, everything is fp32. Four ways to do the same step, each with one thing
less:

  naive        plain `transformers`: every text padded to the longest of the batch, every event and negative
               encoded as often as it occurs, the language-model head computed on all tokens (and thrown away)
  no padding   texts packed one after another (the published HLLM code does this on GPUs; it too encodes every
               occurrence and computes the head)
  no head      the same without the language-model head
  ours         every distinct item once, only the words that the catalogue uses trained, and of the top layer
               only the [ITEM] position

A window of L events and its last target is L + 1 texts: the naive step does not encode a target twice that is
the next input, although it could. Losses and gradients of all four are compared before the clock starts.

Then, in CPU seconds of one thread, "no padding" (every occurrence, with the head) beside ours on two more
batches: one in which a quarter of the occurrences are distinct items, and one without repeats, where only the
head, the top layer and the words are left to save.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import smollm2, zipf_log
from measure import Figures, arguments, interleaved, machine, memory_apart, print_memory_of, print_table
from torch import Tensor, nn

from hllm.data.prepared import Prepared, write_arrays
from hllm.models.common.packing import Packing, packed_attention, ragged, run_packed
from hllm.models.common.recommender import Batch, Recommender, info_nce, no_negatives
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.users import DecoderUser
from hllm.training.batches import Batches

WANTED = 2.0
BATCHES = (("a quarter of the occurrences distinct", 0.25, 3.0), ("no repeats", 1.0, 1.25))
"""On one thread: what the batch is like, its share of distinct items, how many times as fast ours must be."""
# S windows, L events of the longest, T targets, K texts, D width


@dataclass(frozen=True)
class Size:
    users: int
    items: int
    history: int
    batch: int
    negatives: int
    item_layers: int
    user_layers: int
    repeats: int


FULL = Size(
    users=500, items=10_000, history=24, batch=12, negatives=96, item_layers=3, user_layers=2, repeats=3
)
QUICK = Size(users=20, items=200, history=6, batch=3, negatives=8, item_layers=1, user_layers=1, repeats=1)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    if args.only:
        prepared = Prepared.open(args.folder)
        print_memory_of(steps(prepared, size, [args.only])[args.only])
        return
    print(machine(args.threads))
    figures = Figures("stage-1 step")
    with tempfile.TemporaryDirectory() as name:
        log = zipf_log(Path(name), size.users, size.items, size.history // 2, size.history * 2)
        compare(log, size, args, figures)
    torch.set_num_threads(1)
    for what, share, wanted in BATCHES:
        with tempfile.TemporaryDirectory() as name:
            few = replace(size, negatives=size.negatives // 4)
            compare_occurrences(what, log_of_share(Path(name), few, share), few, figures, wanted)
    figures.finish(args.figures)


def log_of_share(folder: Path, size: Size, share: float) -> Prepared:
    """Users of one full window each, in whose batch about this share of the occurrences are distinct items:
    the steeper Zipf's law, the fewer. With a share of 1 no event repeats; a few negatives do."""
    log = zipf_log(folder, size.batch, size.items, size.history + 1, size.history + 1)
    taken, rng = size.batch * (size.history + 1), np.random.default_rng(0)

    def draw(exponent: float) -> np.ndarray:
        weights = 1 / np.arange(1, size.items + 1) ** exponent
        return np.random.default_rng(1).choice(size.items, taken, p=weights / weights.sum())

    def distinct(events: np.ndarray) -> float:
        together = np.concatenate([events, rng.choice(size.items, size.negatives, replace=False)])
        return len(np.unique(together)) / len(together)

    events = (
        rng.permutation(size.items)[:taken]
        if share == 1.0
        else min(map(draw, np.linspace(0.5, 3.0, 26)), key=lambda events: abs(distinct(events) - share))
    )
    write_arrays(folder, event_items=events)
    return Prepared.open(log.folder)


def compare_occurrences(what: str, prepared: Prepared, size: Size, figures: Figures, wanted: float) -> None:
    everything = occurrences(batch_of(prepared, size))
    spread = f"{len(np.unique(everything)):,} distinct items in {len(everything):,} occurrences"
    print(f"\n{what}: {spread}; one thread")
    ways = steps(prepared, size, ["no padding", "ours"])
    check({way: step() for way, step in ways.items()})
    times = interleaved(ways, size.repeats, time.process_time)
    ratio = times["no padding"].median / times["ours"].median
    shown = f"{times['ours']} against {times['no padding']}"
    figures.add(f"{what}, one thread", f"{spread}; {shown}")
    print(shown)
    figures.claim(
        f"{what}, one thread: our stage-1 step against every occurrence with the head",
        f"{ratio:.1f} times as fast",
        f"{wanted:g} times",
        ratio >= wanted,
    )


def check(losses: dict[str, tuple[float, float]]) -> None:
    """All ways compute the same, or there is nothing to compare."""
    for way, (loss, gradient) in losses.items():
        first_loss, first_gradient = losses["ours"]
        if abs(loss - first_loss) > 1e-4 or abs(gradient / first_gradient - 1) > 1e-3:
            sys.exit(
                f"{way} computes something else: loss {loss} and gradient {gradient}, ours {losses['ours']}"
            )
    print(f"all agree: loss {losses['ours'][0]:.5f}, norm of a gradient {losses['ours'][1]:.4e}")


def compare(prepared: Prepared, size: Size, args: argparse.Namespace, figures: Figures) -> None:
    batch = batch_of(prepared, size)
    everything = occurrences(batch)
    longest = int(np.diff(prepared.token_offsets)[everything].max()) + 1
    spread = f"{len(np.unique(everything)):,} distinct items in {len(everything):,} occurrences"
    tokens = int((np.diff(prepared.token_offsets)[everything] + 1).sum())
    print(f"{spread}; {tokens:,} tokens, {len(everything) * longest:,} with padding")
    ways = steps(prepared, size, list(WAYS))
    check({way: step() for way, step in ways.items()})
    times = interleaved(ways, size.repeats)
    memory = {way: memory_apart(__file__, way, prepared.folder, args)[0] for way in WAYS}
    ours = times["ours"].median
    print_table(
        [(way, str(times[way]), f"{times[way].median / ours:.1f}", str(memory[way])) for way in WAYS],
        ("step", "median (range)", "times ours", "peak memory"),
    )
    figures.add("batch", f"{spread}, {size.item_layers} + {size.user_layers} layers")
    for way in WAYS:
        figures.add(way, f"{times[way]}; peak {memory[way]}")
    ratio = times["naive"].median / ours
    figures.claim(
        "our stage-1 step against a naive one",
        f"{ratio:.1f} times as fast",
        f"{WANTED:.0f} times",
        ratio >= WANTED,
    )


def batch_of(prepared: Prepared, size: Size) -> Batch:
    return Batches(prepared, size.history, size.batch, size.negatives, seed=1)[0]


def occurrences(batch: Batch) -> np.ndarray:
    """Every window's events and last target, then the negatives, as often as they occur."""
    ends = batch.history.packing.last_S
    windows = [
        np.append(part, batch.targets_T[end])
        for part, end in zip(np.split(batch.history.items_T, ends[:-1] + 1), ends, strict=True)
    ]
    return np.concatenate([*windows, batch.negatives_N])


def steps(prepared: Prepared, size: Size, wanted: list[str]) -> dict[str, Callable[[], tuple[float, float]]]:
    """Steps with the same weights on the same batch; each returns its loss and the length of one gradient."""
    torch.manual_seed(0)
    items = TextItems(smollm2(size.item_layers))
    user = DecoderUser(smollm2(size.user_layers))
    batch = batch_of(prepared, size)
    chosen: dict[str, Any] = {}
    for way in wanted:
        if way == "ours":
            continue
        chosen[way] = Naive(items, user, prepared, padded=way == "naive", head=way != "no head")
    if "ours" in wanted:
        items.attach(prepared.token_ids, prepared.token_offsets, trim=True)
        chosen["ours"] = Recommender(items, user, 0.07)

    def step_of(model: nn.Module) -> Callable[[], tuple[float, float]]:
        def step() -> tuple[float, float]:
            model.zero_grad(set_to_none=True)
            loss = model.loss(batch)  # type: ignore[operator]
            loss.backward()
            first = next(
                value for name, value in model.named_parameters() if "layers.0.self_attn.v_proj" in name
            )
            assert first.grad is not None
            return float(loss.detach()), float(first.grad.norm())

        return step

    return {way: step_of(chosen[way].train()) for way in wanted}


class Naive(nn.Module):
    """HLLM written the obvious way, with `transformers` models that own their head."""

    def __init__(
        self, items: TextItems, user: DecoderUser, prepared: Prepared, padded: bool, head: bool
    ) -> None:
        super().__init__()
        words, attention = items.words.detach(), "sdpa" if padded else packed_attention()
        self.item_llm = causal_lm(items.decoder, words, attention)
        self.user_llm = causal_lm(user.decoder, words, "sdpa")
        self.item_token = nn.Parameter(items.item_token.detach().clone())
        self.input_scale = nn.Parameter(user.input_scale.detach().clone())
        self.scale = nn.Parameter(torch.tensor(1 / 0.07))
        self.prepared, self.padded, self.head = prepared, padded, head

    def loss(self, batch: Batch) -> Tensor:
        encode = self.encode_padded if self.padded else self.encode_packed
        vectors_KD = F.normalize(encode(occurrences(batch)), dim=-1)
        lengths_S = torch.from_numpy(batch.history.packing.lengths_S)
        texts = int(lengths_S.sum()) + len(lengths_S)
        windows = vectors_KD[:texts].split((lengths_S + 1).tolist())
        inputs_SLD = nn.utils.rnn.pad_sequence([window[:-1] for window in windows], batch_first=True)
        real_SL = torch.arange(inputs_SLD.shape[1])[None] < lengths_S[:, None]
        outputs_SLD = self.last_hidden(self.user_llm, inputs_SLD * self.input_scale, real_SL.long())
        return info_nce(
            F.normalize(outputs_SLD, dim=-1)[real_SL],
            torch.cat([window[1:] for window in windows]),
            vectors_KD[texts:],
            no_negatives(batch, torch.device("cpu")),
            self.scale,
        )

    def encode_padded(self, items_K: np.ndarray) -> Tensor:
        starts, ends = self.prepared.token_offsets[items_K], self.prepared.token_offsets[items_K + 1]
        texts = [
            torch.from_numpy(self.prepared.token_ids[start:end].astype(np.int64))
            for start, end in zip(starts, ends, strict=True)
        ]
        lengths_K = torch.from_numpy(np.asarray(ends - starts))
        ids_KL = nn.utils.rnn.pad_sequence([F.pad(text, (0, 1)) for text in texts], batch_first=True)
        inputs_KLD = self.item_llm.get_input_embeddings()(ids_KL)
        rows_K = torch.arange(len(texts))
        inputs_KLD = inputs_KLD.index_put((rows_K, lengths_K), self.item_token.expand(len(texts), -1))
        real_KL = torch.arange(ids_KL.shape[1])[None] <= lengths_K[:, None]
        return self.last_hidden(self.item_llm, inputs_KLD, real_KL.long())[rows_K, lengths_K]

    def encode_packed(self, items_K: np.ndarray) -> Tensor:
        lengths = np.diff(self.prepared.token_offsets)[items_K]
        order = np.argsort(lengths, kind="stable")
        packing = Packing(lengths[order] + 1)
        ids = self.prepared.token_ids[ragged(self.prepared.token_offsets[items_K[order]], lengths[order])]
        last_K = torch.from_numpy(packing.last_S)
        words_TD = self.item_llm.get_input_embeddings()(torch.from_numpy(ids.astype(np.int64)))
        inputs_TD = torch.empty(packing.tokens, words_TD.shape[1])
        is_word_T = torch.ones(packing.tokens, dtype=torch.bool).index_fill(0, last_K, False)
        inputs_TD = inputs_TD.index_copy(0, is_word_T.nonzero()[:, 0], words_TD)
        inputs_TD = inputs_TD.index_copy(0, last_K, self.item_token.expand(len(order), -1))
        hidden_TD = run_packed(self.item_llm.model, inputs_TD, packing)
        if self.head:
            self.item_llm.lm_head(hidden_TD)
        return hidden_TD[last_K][torch.from_numpy(np.argsort(order, kind="stable"))]

    def last_hidden(self, llm: Any, inputs: Tensor, mask: Tensor) -> Tensor:
        run = llm if self.head else llm.model
        out = run(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1]


def causal_lm(decoder: Any, words: Tensor, attention: str) -> Any:
    """A `LlamaForCausalLM` with a copy of the decoder's weights; head tied to words, as in SmolLM2."""
    from transformers import AutoConfig, LlamaForCausalLM

    values = {**decoder.config.to_dict(), "vocab_size": len(words)}
    llm = LlamaForCausalLM._from_config(AutoConfig.for_model(**values), attn_implementation=attention)
    llm.model.load_state_dict({**decoder.state_dict(), "embed_tokens.weight": words})
    llm.tie_weights()
    return llm


WAYS = ("naive", "no padding", "no head", "ours")


if __name__ == "__main__":
    main()
