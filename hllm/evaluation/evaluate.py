"""Every model on the same held-out events: full ranking, segments, intervals, readable examples; of
discriminative models also how well they tell what users liked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hllm.data.prepared import Prepared
from hllm.errors import DataError
from hllm.evaluation.champion import rank_package, score_package
from hllm.evaluation.examples import examples
from hllm.evaluation.labelled import (
    cosines,
    labelled_rows,
    measure_champion,
    measure_labelled,
    read_scores,
    untrained_scores,
    write_scores,
)
from hllm.evaluation.measure import PART, compare, entry, measure
from hllm.evaluation.rank_table import rank_table, read_ranks, write_ranks
from hllm.evaluation.segments import segments
from hllm.models.common.ranking import (
    Floats,
    HeldOut,
    rank_by_vectors,
)
from hllm.models.family import TrainedModel, untrained
from hllm.pipeline import candidate
from hllm.settings import Settings
from hllm.work.artifacts import write_atomically
from hllm.work.progress import Progress
from hllm.work.ranks import device, place
from hllm.work.step import Context


def evaluate(context: Context) -> None:
    """Step: writes metrics.json, ranks.parquet and examples.json."""
    settings, prepared = context.settings, Prepared.open(context.inputs["prepare"])
    held_out = HeldOut.of(prepared, PART)
    if not len(held_out):
        raise DataError(
            "there are no held-out test events to evaluate on",
            where="evaluate",
            remedy="leave_one_out needs users with at least 3 events; a temporal split needs events of known "
            "users from prepare.test_from on.",
        )
    registered = candidate(settings).label
    ranks = {each.name: each.module.ranks(settings, prepared, held_out) for each in untrained()}
    judging = learns_likes(settings)
    rows = labelled_rows(prepared, held_out)
    judged = held_out.take(rows)
    scores = untrained_scores(settings, prepared, judged) if judging else {}
    for label in trained_labels(context.inputs):
        users_RD, items_ID = held_out_vectors(context, label, prepared, held_out)
        if judging:
            scores[label] = labelled_scores(context, label, prepared, judged, users_RD[rows], items_ID)
        with Progress(f"rank {label}", len(held_out), "event") as progress:
            ranks[label] = rank_by_vectors(users_RD, items_ID, held_out, label, advance=progress.advance)
        if label == registered and place().first:
            shown = examples(settings, prepared, held_out, ranks[label], users_RD, items_ID)
            _write_json(context.output / "examples.json", shown)
    if not place().first:
        return
    metrics = measure(settings, prepared, held_out, ranks, registered)
    if judging:
        metrics["labelled"] = measure_labelled(settings, prepared, judged, scores, registered)
        write_scores(context.output / "labelled.parquet", judged, scores)
    _write_json(context.output / "metrics.json", metrics)
    write_ranks(context.output / "ranks.parquet", held_out, ranks)
    _report_headline(context, metrics)


def learns_likes(settings: Settings) -> bool:
    """Whether the registered model is a discriminative one."""
    return candidate(settings).family.learns(settings) != "generative"


def trained_labels(inputs: Mapping[str, Path]) -> list[str]:
    """What `train-...` inputs there are."""
    return [name.removeprefix("train-") for name in inputs if name.startswith("train-")]


def held_out_vectors(
    context: Context, label: str, prepared: Prepared, held_out: HeldOut
) -> tuple[Floats, Floats]:
    """The user's vector just before each held-out event, and every item's vector."""
    from hllm.embedding.items import ItemVectors
    from hllm.embedding.users import held_out_user_vectors
    from hllm.models.load import load_user_model

    trained = TrainedModel.of(label)
    assert trained  # noqa: S101 - the label of an input
    items_ID = ItemVectors.open(context.inputs[TrainedModel(trained.family, 1).embed_step]).matrix()
    model = load_user_model(context.inputs[f"train-{label}"]).to(device())
    embed = context.settings.embed
    with Progress(f"encode {label}", len(held_out), "event") as progress:
        users_RD = held_out_user_vectors(
            model,
            items_ID,
            prepared,
            held_out.users_R,
            held_out.positions_R,
            held_out.asked_R,
            embed.max_history,
            embed.users_per_batch,
            progress.advance,
        )
    return np.asarray(users_RD), np.asarray(items_ID)


def labelled_scores(
    context: Context, label: str, prepared: Prepared, judged: HeldOut, users_RD: Floats, items_ID: Floats
) -> np.ndarray:
    """(R,) probabilities where the model has them, else the scores that it ranks items with."""
    from hllm.embedding.scores import held_out_scores, judges
    from hllm.models.load import load_user_model

    model = load_user_model(context.inputs[f"train-{label}"]).to(device())
    embed = context.settings.embed
    if not judges(model):
        return cosines(users_RD, items_ID, judged)
    with Progress(f"judge {label}", len(judged), "event") as progress:
        return held_out_scores(
            model,
            items_ID,
            prepared,
            judged.users_R,
            judged.positions_R,
            judged.asked_R,
            embed.max_history,
            embed.users_per_batch,
            progress.advance,
        )


def evaluate_package(
    prepared: Prepared, package: Any, settings: Settings, candidate_folder: Path | None = None
) -> tuple[dict[str, Any], Any]:
    """A model of an earlier version (the champion) on today's held-out events: (an entry like one of
    metrics.json's `models`, its table of ranks).

    Items are matched by id. Items that the package does not know rank last; so does every item for a user
    of whom it knows nothing. Given the `evaluate` output of the candidate, the entry also holds its
    `comparison` with this model: the candidate's differences and ratios with paired intervals.
    """
    held_out = HeldOut.of(prepared, PART)
    ranks = rank_package(prepared, package, settings, held_out)
    parts = segments(prepared, held_out, settings.evaluation)
    found = entry(settings, held_out, parts, ranks)
    if candidate_folder is not None:
        mine = read_ranks(candidate_folder / "ranks.parquet", candidate(settings).label, held_out)
        found["comparison"] = compare(settings, held_out, parts, mine, ranks)
    if learns_likes(settings):
        judged = held_out.take(labelled_rows(prepared, held_out))
        theirs, ours = score_package(prepared, package, settings, judged), None
        if candidate_folder is not None:
            ours = read_scores(candidate_folder / "labelled.parquet", candidate(settings).label, judged)
        found["labelled"] = measure_champion(settings, prepared, judged, theirs, ours)
    return found, rank_table("champion", held_out, ranks)


def _report_headline(context: Context, metrics: Mapping[str, Any]) -> None:
    context.rows = {
        "held_out_events": metrics["rows"],
        "items": metrics["catalogue"],
        "models": len(metrics["models"]),
    }
    context.facts = {
        "candidate": metrics["candidate"],
        "headline": metrics["headline"],
        "rows_without_history": metrics["rows_without_history"],
    }
    candidate = metrics["models"][metrics["candidate"]]["overall"][metrics["headline"]]
    context.facts |= {name: round(figure["value"], 6) for name, figure in candidate.items()}
    judged = metrics.get("labelled", {}).get("models", {}).get(metrics["candidate"], {})
    context.facts |= {name: round(figure["value"], 6) for name, figure in judged.items()}


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode())
