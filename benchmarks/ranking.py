"""Full ranking: where the next item of 8,000 users stands among 100,000, beside RecTools' evaluation.

    python benchmarks/ranking.py

Both get the same vectors of users and items (width 64), the same histories to leave out and the same
held-out items, and give Recall and NDCG at 10, 50 and 200. RecTools ranks and computes metrics from the lists
of recommendations. It has two rankers: the one in PyTorch, with which its SASRec, HSTU and BERT4Rec rank, is
what the claim is about; the C++ of `implicit`, for its other models, spends a fifth of its time on the very
product of vectors that ours spends half of its time on, and stands beside it. Ours counts for each user how
many items score above the held-out one, and so knows its exact rank. The metrics are compared before the
clock starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import Figures, arguments, interleaved, machine, print_table

from hllm.evaluation.metrics import gains, metric_names
from hllm.models.common.ranking import HeldOut, rank_by_vectors

CUTOFFS = (10, 50, 200)
WANTED = 5.0
Metrics = dict[str, float]


@dataclass(frozen=True)
class Size:
    users: int
    items: int
    width: int
    history: int
    repeats: int


FULL = Size(users=8_000, items=100_000, width=64, history=30, repeats=3)
QUICK = Size(users=50, items=700, width=16, history=6, repeats=1)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    print(machine(args.threads))
    compare(size, args)


def compare(size: Size, args: argparse.Namespace) -> None:
    from threadpoolctl import threadpool_limits

    figures = Figures("full ranking")
    users, items, held_out = world(size)
    ways = {"ours": lambda: ours(users, items, held_out)} | rectools_ways(
        users, items, held_out, args.threads
    )
    with threadpool_limits(args.threads):
        found = {way: act() for way, act in ways.items()}
        for way, metrics in found.items():
            apart = max(abs(metrics[name] - found["ours"][name]) for name in metric_names(CUTOFFS))
            if apart > 2 / size.users:  # two events whose order two ways of rounding may change
                sys.exit(f"{way} finds other metrics: {metrics}, ours {found['ours']}")
        print(f"all agree: {', '.join(f'{name} {value:.4f}' for name, value in found['ours'].items())}")
        times = interleaved(ways, size.repeats)
    print_table(
        [(way, str(times[way]), f"{times[way].median / times['ours'].median:.1f}") for way in ways],
        ("evaluation", "median (range)", "times ours"),
    )
    for way in ways:
        figures.add(f"{size.users:,} users, {size.items:,} items, {way}", str(times[way]))
    for way, wanted in (("RecTools, PyTorch", WANTED), ("RecTools, implicit", 1.0)):
        ratio = times[way].median / times["ours"].median
        figures.claim(
            f"full ranking against {way}", f"{ratio:.1f} times as fast", f"{wanted:g} times", ratio >= wanted
        )
    figures.finish(args.figures)


def world(size: Size, seed: int = 0) -> tuple[np.ndarray, np.ndarray, HeldOut]:
    """Users near the item they took next, as a trained model leaves them: no metric is zero."""
    rng = np.random.default_rng(seed)
    items = unit(rng.normal(size=(size.items, size.width)))
    events = np.stack([rng.choice(size.items, size.history + 1, replace=False) for _ in range(size.users)])
    users = unit(items[events[:, -1]] + rng.normal(size=(size.users, size.width)) * 0.25)
    starts = np.arange(size.users) * (size.history + 1)
    held_out = HeldOut(
        users_R=np.arange(size.users),
        positions_R=starts + size.history,
        starts_R=starts,
        targets_R=events[:, -1],
        event_items=events.ravel(),
        event_times=np.arange(events.size),
        asked_R=starts + size.history,
        items=size.items,
    )
    return users, items, held_out


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def ours(users: np.ndarray, items: np.ndarray, held_out: HeldOut) -> Metrics:
    ranks = rank_by_vectors(users, items, held_out)
    means = gains(ranks.filtered_R, CUTOFFS).mean(axis=0)
    return dict(zip(metric_names(CUTOFFS), means.tolist(), strict=True))


def rectools_ways(
    users: np.ndarray, items: np.ndarray, held_out: HeldOut, threads: int
) -> dict[str, Callable[[], Metrics]]:
    import pandas as pd
    from rectools import Columns
    from rectools.metrics import NDCG, Recall, calc_metrics
    from rectools.models.rank import Distance, ImplicitRanker, TorchRanker
    from scipy.sparse import csr_matrix

    ids = np.arange(len(users))
    history = np.stack([held_out.event_items[start:end] for start, end in
                        zip(held_out.starts_R, held_out.positions_R, strict=True)])  # fmt: skip
    rows = np.repeat(ids, history.shape[1])
    seen = csr_matrix((np.ones(rows.size, np.float32), (rows, history.ravel())), (len(users), len(items)))
    truth = pd.DataFrame({Columns.User: ids, Columns.Item: held_out.targets_R})
    metrics = {f"recall@{cutoff}": Recall(k=cutoff) for cutoff in CUTOFFS} | {
        f"ndcg@{cutoff}": NDCG(k=cutoff, divide_by_achievable=True) for cutoff in CUTOFFS
    }

    def evaluate(ranker: Any) -> Metrics:
        user_ids, item_ids, _ = ranker.rank(ids, k=max(CUTOFFS), filter_pairs_csr=seen)
        places = np.arange(len(user_ids)) % max(CUTOFFS) + 1
        found = pd.DataFrame({Columns.User: user_ids, Columns.Item: item_ids, Columns.Rank: places})
        return calc_metrics(metrics, found, truth)

    return {
        "RecTools, PyTorch": lambda: evaluate(TorchRanker(Distance.DOT, "cpu", users, items)),
        "RecTools, implicit": lambda: evaluate(
            ImplicitRanker(Distance.DOT, users, items, num_threads=threads)
        ),
    }


if __name__ == "__main__":
    main()
