"""The item vectors as a map: two principal components, coloured by category where the catalogue has one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from hllm.data.prepared import Prepared
from hllm.report.charts import Dot, scatter

CATEGORY_COLUMNS = ("category", "categories", "genre", "genres", "class")
WORD_COLUMNS = ("genre", "genres", "class")
"""Columns whose values are single words, so that spaces separate them."""
COLOURS = 6
"""The commonest categories get a colour each, the others are grey: more colours cannot be told apart."""
MOST_DOTS = 2500


@dataclass(frozen=True)
class ItemMap:
    picture: Markup
    legend: list[str]
    """Names of colours 0, 1, ...; grey is the last."""
    by: str
    shown: int
    items: int


def item_map(prepared: Prepared, vectors: Path, seed: int) -> ItemMap:
    """From the folder of an item cache; only the vectors that are shown are read."""
    import pyarrow.parquet as parquet

    names = parquet.read_schema(prepared.folder / "items.parquet").names
    category = next((name for name in CATEGORY_COLUMNS if name in names), None)
    table = prepared.item_table(["title", "train_events", *([category] if category else [])])
    rows = _chosen(table["train_events"].to_numpy(), seed)
    table = table.take(rows)
    titles, events = table["title"].to_pylist(), table["train_events"].to_numpy()
    place_N2, share = principal_components(read_vectors(vectors, rows))
    by, legend, kind_N = _colours(table[category].to_pylist() if category else [], category, events)
    sizes_N = 1.8 + 2.4 * np.sqrt(events / max(events.max(), 1))
    dots = [
        Dot(float(x), float(y), int(kind), float(size), title or f"item {row}")
        for (x, y), kind, size, title, row in zip(place_N2, kind_N, sizes_N, titles, rows, strict=True)
    ]
    picture = scatter(
        "Item vectors in two dimensions",
        f"first principal component ({share[0]:.0%} of the variance)",
        f"second principal component ({share[1]:.0%})",
        dots,
        np.argsort(-events, kind="stable")[:80].tolist(),
    )
    return ItemMap(picture, legend, by, len(rows), prepared.items)


def read_vectors(folder: Path, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Chosen rows (ascending) of an item cache, shard by shard."""
    found, start = [], 0
    for path in sorted(folder.glob("vectors-*.npy")):
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
        found.append(shard[rows[(rows >= start) & (rows < start + len(shard))] - start])
        start += len(shard)
    return np.concatenate(found)


def principal_components(vectors_ID: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], list[float]]:
    """Coordinates on the two directions of the largest variance, and their shares of it. The same vectors
    always give the same map: each direction is turned so that its largest weight is positive."""
    centred_ID = vectors_ID.astype(np.float64) - vectors_ID.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred_ID.T @ centred_ID)
    first_D2 = directions[:, ::-1][:, :2]
    first_D2 = first_D2 * np.sign(first_D2[np.abs(first_D2).argmax(axis=0), range(2)])
    return centred_ID @ first_D2, (variances[::-1][:2] / max(variances.sum(), 1e-12)).tolist()


def _chosen(events: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """All items, or the best-known tenth and a random choice of the others."""
    if len(events) <= MOST_DOTS:
        return np.arange(len(events))
    order = np.argsort(-events, kind="stable")
    known, rest = order[: MOST_DOTS // 10], order[MOST_DOTS // 10 :]
    drawn = np.random.default_rng(seed).choice(rest, MOST_DOTS - len(known), replace=False)
    return np.sort(np.concatenate([known, drawn]))


def _colours(
    values: list[str | None], column: str | None, events: npt.NDArray[np.int64]
) -> tuple[str, list[str], npt.NDArray[np.int64]]:
    """What colour means, the names of the colours, and the colour of each item: category, else popularity."""
    firsts = [first_category(value, words=column in WORD_COLUMNS) for value in values]
    common = [name for name, _ in Counter(filter(None, firsts)).most_common(COLOURS)]
    if column and len(common) > 1:
        number_of = {name: number for number, name in enumerate(common)}
        by = f"the first of its {column}" if column.endswith("s") else f"its {column}"
        return by, [*common, "other"], np.array([number_of.get(first, COLOURS) for first in firsts])
    some = events[events > 0]
    limits = [0, *np.unique(np.quantile(some, [0.5, 0.9]).astype(int)).tolist()] if len(some) else [0]
    names = [f"at most {limit:,} training events" for limit in limits] + [f"more than {limits[-1]:,}"]
    return "popularity", names, np.searchsorted(limits, events, side="left").astype(np.int64)


def first_category(value: object, words: bool = False) -> str:
    """The first of several, as in `Comedy|Drama` or `Books > Crime`; with `words` also `Comedy Drama`."""
    first = re.split(r"\s*[|,;>/]\s*", str(value or "").strip())[0]
    return first.split(" ")[0] if words else first
