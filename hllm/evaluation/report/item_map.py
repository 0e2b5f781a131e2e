"""The item vectors as a map: two principal components, coloured by category where the catalogue has one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from hllm.data.prepared import Prepared
from hllm.evaluation.report.charts import Dot, scatter

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


def item_map(prepared: Prepared, vectors_ID: npt.NDArray[np.float32], seed: int) -> ItemMap:
    table = prepared.item_table()
    titles, events = table["title"].to_pylist(), table["train_events"].to_numpy()
    rows = _chosen(events, seed)
    place_I2, share = principal_components(vectors_ID)
    by, names, kind_I = _colours(table, events)
    sizes_I = 1.8 + 2.4 * np.sqrt(events / max(events.max(), 1))
    dots = [
        Dot(
            float(place_I2[row, 0]),
            float(place_I2[row, 1]),
            int(kind_I[row]),
            float(sizes_I[row]),
            titles[row] or f"item {row}",
        )
        for row in rows
    ]
    famous = np.argsort(-events[rows], kind="stable")[:80].tolist()
    picture = scatter(
        "Item vectors in two dimensions",
        f"first principal component ({share[0]:.0%} of the variance)",
        f"second principal component ({share[1]:.0%})",
        dots,
        famous,
    )
    return ItemMap(picture, names, by, len(rows), len(titles))


def item_vectors(folder: Path) -> npt.NDArray[np.float32]:
    return np.concatenate(
        [np.load(path, allow_pickle=False) for path in sorted(folder.glob("vectors-*.npy"))]
    )


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


def _colours(table, events: npt.NDArray[np.int64]) -> tuple[str, list[str], npt.NDArray[np.int64]]:  # type: ignore[no-untyped-def]
    column = next((name for name in CATEGORY_COLUMNS if name in table.column_names), None)
    if column:
        values = [first_category(value, words=column in WORD_COLUMNS) for value in table[column].to_pylist()]
        found, counts = np.unique([value for value in values if value], return_counts=True)
        common = [str(name) for name in found[np.argsort(-counts, kind="stable")][:COLOURS]]
        if len(common) > 1:
            number_of = {name: number for number, name in enumerate(common)}
            return (
                f"the first of its {column}" if column.endswith("s") else f"its {column}",
                [*common, "other"],
                np.array([number_of.get(value, COLOURS) for value in values]),
            )
    limits = (
        [0, *np.unique(np.quantile(events[events > 0], [0.5, 0.9])).astype(int).tolist()]
        if events.any()
        else [0]
    )
    popularity = [f"at most {limit:,} training events" for limit in limits] + [f"more than {limits[-1]:,}"]
    kinds = np.searchsorted(limits, events, side="left")
    return "popularity", popularity, kinds.astype(np.int64)


def first_category(value: object, words: bool = False) -> str:
    """The first of several, as in `Comedy|Drama` or `Books > Crime`; with `words` also `Comedy Drama`."""
    first = re.split(r"\s*[|,;>/]\s*", str(value or "").strip())[0]
    return first.split(" ")[0] if words else first
