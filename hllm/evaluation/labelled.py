"""Held-out events with a label: how well models tell what a user liked from what the user did not.

Every model scores each event's item from what its user had done before: a discriminative one (HLLM, early or
late fusion) by its probability, any other by the score that it ranks items with. Beside them stands what
needs no model of the user at all, the share of liked events among the item's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hllm.data.prepared import Prepared
from hllm.errors import DataError
from hllm.evaluation.auc import Aucs, aucs, intervals, less
from hllm.evaluation.names import ITEM_RATE
from hllm.models.common.ranking import Floats, HeldOut, exact_scores
from hllm.models.family import untrained
from hllm.settings import Settings

PRIOR_EVENTS = 5
"""An item's share of liked events starts as if this many had the catalogue's share."""

# R held-out events with a label, I items


def labelled_rows(prepared: Prepared, held_out: HeldOut) -> npt.NDArray[np.int64]:
    """Rows of the held-out events that have a label."""
    return np.flatnonzero(np.asarray(prepared.event_labels)[held_out.positions_R] >= 0)


def untrained_scores(
    settings: Settings, prepared: Prepared, held_out: HeldOut
) -> dict[str, npt.NDArray[np.float64]]:
    """What is known without training: the scores of untrained families, and how often an item was liked."""
    found = {
        each.name: each.module.scores(settings, prepared, held_out)
        for each in untrained()
        if hasattr(each.module, "scores")
    }
    return found | {ITEM_RATE: item_rates(prepared)[held_out.targets_R]}


def item_rates(prepared: Prepared) -> npt.NDArray[np.float64]:
    """(I,) the share of training events with label 1 among those with a label, drawn towards the whole
    catalogue's share by PRIOR_EVENTS. (A user's first event in the validation or test period is never held
    out, and no training event either.)"""
    events = np.arange(len(prepared.event_items))
    starts = np.asarray(prepared.user_offsets)
    owners = np.searchsorted(starts, events, side="right") - 1
    labels = np.asarray(prepared.event_labels)
    training = prepared.user_table(["train_events"])["train_events"].to_numpy()
    trained = (events - starts[owners] < training[owners]) & (labels >= 0)
    items, labels = np.asarray(prepared.event_items)[trained], labels[trained]
    shown_I = np.bincount(items, minlength=prepared.items)
    liked_I = np.bincount(items, weights=labels, minlength=prepared.items)
    share = labels.mean() if len(labels) else 0.5
    return (liked_I + PRIOR_EVENTS * share) / (shown_I + PRIOR_EVENTS)


def cosines(users_RD: Floats, items_ID: Floats, held_out: HeldOut) -> npt.NDArray[np.float64]:
    """The score that ranks the catalogue, of each event's own item: (R,)."""
    return exact_scores(users_RD, items_ID, np.arange(len(held_out)), held_out.targets_R)


def measure_labelled(
    settings: Settings,
    prepared: Prepared,
    held_out: HeldOut,
    scores: Mapping[str, npt.NDArray[np.floating]],
    candidate: str,
) -> dict[str, Any]:
    """AUC, UAUC (mean over users) and WUAUC (weighted by impressions) of every model with intervals, and how
    much the candidate has more than each other model; users with one class only, who have no AUC, are
    counted."""
    users_R, labels_R = held_out.users_R, labels_of(prepared, held_out)
    found = {label: _aucs(settings, labels_R, model, users_R) for label, model in scores.items()}
    confidence = settings.evaluation.confidence
    return {
        "rows": len(labels_R),
        "liked": int(labels_R.sum()),
        "users": len(np.unique(users_R)),
        "users_with_one_class": one_class_users(labels_R, users_R),
        "models": {label: intervals(model, confidence) for label, model in found.items()},
        "differences": {
            label: intervals(less(found[candidate], model), confidence)
            for label, model in found.items()
            if label != candidate
        },
    }


def measure_champion(
    settings: Settings,
    prepared: Prepared,
    held_out: HeldOut,
    champion_R: npt.NDArray[np.floating],
    candidate_R: npt.NDArray[np.floating] | None,
) -> dict[str, Any]:
    """An earlier version on the same events: its metrics, and how much the candidate has more."""
    users_R, labels_R = held_out.users_R, labels_of(prepared, held_out)
    theirs, confidence = _aucs(settings, labels_R, champion_R, users_R), settings.evaluation.confidence
    found: dict[str, Any] = {"figures": intervals(theirs, confidence)}
    if candidate_R is not None:
        mine = _aucs(settings, labels_R, candidate_R, users_R)
        found["difference"] = intervals(less(mine, theirs), confidence)
    return found


def write_scores(path: Path, held_out: HeldOut, scores: Mapping[str, npt.NDArray[np.floating]]) -> None:
    """One row per labelled held-out event, one column per model."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    columns = {label: np.asarray(model, np.float64) for label, model in scores.items()}
    table = arrow.table({"position": held_out.positions_R, "user_index": held_out.users_R, **columns})
    parquet.write_table(table, path, compression="zstd")


def read_scores(path: Path, label: str, held_out: HeldOut) -> npt.NDArray[np.float64]:
    """The scores of one model as they were written for the same events: (R,)."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, columns=["position", label])
    if not np.array_equal(table["position"].to_numpy(), held_out.positions_R):
        raise DataError(
            f"the scores of {label} belong to other held-out events",
            where=path,
            remedy="Run `hllm evaluate` again.",
        )
    return table[label].to_numpy()


def labels_of(prepared: Prepared, held_out: HeldOut) -> npt.NDArray[np.int64]:
    return np.asarray(prepared.event_labels)[held_out.positions_R].astype(np.int64)


def _aucs(
    settings: Settings,
    labels_R: npt.NDArray[np.int64],
    scores_R: npt.NDArray[np.floating],
    users_R: npt.NDArray[np.int64],
) -> Aucs:
    return aucs(labels_R, scores_R, users_R, settings.evaluation.bootstrap, settings.run.seed)


def one_class_users(labels_R: npt.NDArray[np.int64], users_R: npt.NDArray[np.int64]) -> int:
    """Users whose events are all liked, or none: no AUC can be computed for them."""
    _, user_R = np.unique(users_R, return_inverse=True)
    liked_U, shown_U = np.bincount(user_R, weights=labels_R), np.bincount(user_R)
    return int(((liked_U == 0) | (liked_U == shown_U)).sum())
