"""The approximate item index beside the exact one: what it finds, what a request costs, what building costs.

    python benchmarks/retrieval.py [--items 10000 100000 1000000] [--package FOLDER] [--efforts 64 128 256]

Catalogues of random unit vectors are the hardest there are: nothing is near anything, so a graph of
neighbours leads nowhere in particular. `--package` measures a deployed model's own items (a folder with
items.safetensors); its queries are sums of a few items, made unit again. Recall@10 is the share of the exact
first ten that the approximate index finds. A request is one query, as a server gets it. Milliseconds are the
processor's, of one thread: on a machine that is busy with other work the clock says nothing.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from measure import Figures, arguments, print_table, resident

from hllm.serving.index import ApproximateIndex, ExactIndex

K, QUERIES = 10, 200
HEADERS = ("items", "index", "recall@10", "p50 CPU ms", "p99 CPU ms", "build CPU s", "MiB")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--items", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--efforts", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument(
        "--package", type=Path, help="a deployed package, as `hllm embed --stage 3` leaves it"
    )
    args = parser.parse_args()
    if args.quick:
        args.items, args.efforts = [2_000], [64]
    import faiss

    faiss.omp_set_num_threads(1)
    figures, rng = Figures("retrieval"), np.random.default_rng(0)
    for count in args.items:
        vectors = unit(rng.standard_normal((count, args.width), np.float32))
        measure(
            f"{count:,} x {args.width} random",
            vectors,
            random_queries(rng, args.width),
            args.efforts,
            figures,
        )
    if args.package:
        from hllm.embedding.package import Package

        vectors = np.asarray(Package.open(args.package).item_vectors)
        name = f"{len(vectors):,} x {vectors.shape[1]} of the model"
        measure(name, vectors, like_histories(rng, vectors), args.efforts, figures)
    figures.finish(args.figures)


def measure(
    name: str, vectors: np.ndarray, queries: np.ndarray, efforts: list[int], figures: Figures
) -> None:
    exact_index = ExactIndex(vectors)
    exact, _ = exact_index.search(queries, K)
    rows = [(name, "exact", "1.0000", *timed(lambda query: exact_index.search(query, K), queries), "0", "0")]
    before, started = resident(), time.process_time()
    index = ApproximateIndex.build(vectors)
    built, held = time.process_time() - started, resident() - before
    best = 0.0
    for effort in efforts:
        found, _ = index.search(queries, K, effort=effort)
        recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(exact, found, strict=True)]))
        times = timed(lambda query, effort=effort: index.search(query, K, effort=effort), queries)
        rows.append(
            (name, f"approximate, effort {effort}", f"{recall:.4f}", *times, f"{built:.1f}", f"{held:,.0f}")
        )
        best = max(best, recall)
    print_table(rows, HEADERS)
    for _, index_name, recall_text, p50, p99, _, _ in rows:
        figures.add(f"{name}: {index_name}", f"recall@10 {recall_text}, p50 {p50}, p99 {p99} CPU ms")
    figures.claim(f"{name}: with the most effort", f"recall@10 {best:.3f}", "at least 0.95", best >= 0.95)


def timed(search, queries: np.ndarray) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    """CPU milliseconds of one request: median, and the 99th percentile."""
    search(queries[:1])
    seconds = []
    for query in queries:
        started = time.process_time()
        search(query[None])
        seconds.append(time.process_time() - started)
    return tuple(f"{1e3 * value:.2f}" for value in np.quantile(seconds, [0.5, 0.99]))  # type: ignore[return-value]


def random_queries(rng: np.random.Generator, width: int) -> np.ndarray:
    return unit(rng.standard_normal((QUERIES, width), np.float32))


def like_histories(rng: np.random.Generator, vectors: np.ndarray) -> np.ndarray:
    return unit(vectors[rng.integers(0, len(vectors), (QUERIES, 5))].sum(axis=1))


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
