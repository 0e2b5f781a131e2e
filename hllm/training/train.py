"""The training step: one stage of one family, from its inputs to saved weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hllm.data.prepared import Prepared
from hllm.embedding.items import ItemVectors, encoded
from hllm.embedding.scores import held_out_scores, judges
from hllm.embedding.users import held_out_user_vectors
from hllm.errors import DataError
from hllm.models.common.backbone import compile_layers
from hllm.models.common.items import CachedItems
from hllm.models.common.recommender import Recommender
from hllm.models.family import Family, TrainedModel
from hllm.models.load import new_model, next_stage, save_model
from hllm.settings import Stage
from hllm.training.batches import Batches, training_users
from hllm.training.checkpoint import Checkpoints
from hllm.training.loop import fit
from hllm.work.ranks import device, place
from hllm.work.step import Context

if TYPE_CHECKING:
    from hllm.models.common.ranking import HeldOut

MOST_VALIDATION_EVENTS = 5_000
"""Enough to choose between checkpoints; more would only cost time."""


def train(context: Context) -> None:
    """Step: trains, from the newest checkpoint if there is one, and saves the best (or last) weights."""
    settings, trained = context.settings, TrainedModel.of(context.step.name)
    assert trained  # noqa: S101 - the step of a family's training
    family, stage_number = trained.family, trained.stage
    stage: Stage = family.stage_settings(settings, stage_number)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    prepared = Prepared.open(context.inputs["prepare"])
    if family.stages[stage_number - 1].cached_items:
        first = TrainedModel(family, 1)
        vectors = ItemVectors.open(context.inputs[first.embed_step]).matrix()
        model = next_stage(settings, context.inputs[first.train_step], vectors)
    else:
        model = new_model(settings, family.name, prepared)
    model.to(device())
    prepare_layers(model, stage)
    batches = new_batches(
        family,
        prepared,
        stage,
        settings.run.seed + stage_number,
        training_users(prepared.users, settings.train.share, settings.run.seed),
    )
    judging = judges(model.user)
    if judging:
        require_labels(batches)
    with context.graceful() as stopping:
        result = fit(
            model,
            batches,
            stage,
            seed=settings.run.seed,
            checkpoints=Checkpoints(
                context.work,
                context.work_location,
                stage.keep_checkpoints,
                (context.curves,),
            ),
            stopping=stopping,
            log=context.log,
            validate=lambda current: (validation_auc if judging else validation_ndcg)(
                current, prepared, settings.embed.max_history, settings.embed.tokens_per_batch
            ),
            validated="auc" if judging else "ndcg@10",
            what=context.step.name,
            zero=settings.train.zero,
        )
    if not place().first:
        return
    context.tidy_curves()
    save_model(model, family.name, context.output)
    context.rows = {"windows": batches.windows, "steps": result.steps}
    context.facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        ),
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "best_step": result.best_step,
        "train_seconds": round(result.seconds, 1),
        "steps_per_second": round(result.steps / max(result.seconds, 1e-9), 3),
        "processes": place().size,
        **result.facts,
    }


def new_batches(
    family: Family,
    prepared: Prepared,
    stage: Stage,
    seed: int,
    users: npt.NDArray[np.bool_] | None,
) -> Batches:
    """The family's own batches, or windows with uniform negatives."""
    own = getattr(family.module, "batches", None)
    if own is not None:
        batches: Batches = own(prepared, stage, seed, users)
        return batches
    return Batches(
        prepared,
        stage.history_length,
        stage.batch_size,
        stage.negatives,
        seed,
        users,
        stage.cold_negatives,
    )


def prepare_layers(model: Recommender, stage: Stage) -> None:
    """Let the layers of the LLMs be computed again in the backward pass, or compiled, as the stage says."""
    for tower in (model.items, model.user):
        decoder = getattr(tower, "decoder", None)
        if decoder is None:
            continue
        if stage.gradient_checkpointing:
            decoder.activation_checkpointing_enable({"use_reentrant": False})
        if stage.compile:
            compile_layers(decoder)


def validation_ndcg(model: Recommender, prepared: Prepared, max_history: int, tokens_per_batch: int) -> float:
    """NDCG@10 of the validation events."""
    from hllm.evaluation.metrics import gains

    ranks_R, _ = validation_ranks(model, prepared, max_history, tokens_per_batch)
    _, ndcg = gains(ranks_R, [10]).mean(axis=0)
    return float(ndcg)


def require_labels(batches: Batches) -> None:
    """Raises: DataError, where there is nothing to learn to tell apart."""
    negative, positive = batches.labels()
    if not negative or not positive:
        raise DataError(
            f"a discriminative objective needs training events of both labels: {negative:,} have label 0, "
            f"{positive:,} have label 1",
            where="train",
            remedy="Name the label column (data.columns.label), or let the family learn generatively.",
        )


def validation_auc(model: Recommender, prepared: Prepared, max_history: int, tokens_per_batch: int) -> float:
    """AUC of the validation events that have a label."""
    from hllm.evaluation.auc import aucs
    from hllm.models.common.ranking import HeldOut

    held_out = HeldOut.of(prepared, "valid")
    labels = np.asarray(prepared.event_labels)[held_out.positions_R]
    held_out = _at_most(held_out.take(np.flatnonzero(labels >= 0)))
    labels = np.asarray(prepared.event_labels)[held_out.positions_R]
    vectors_ID = catalogue_vectors(model, prepared, tokens_per_batch)
    scores = held_out_scores(
        model.user,
        vectors_ID,
        prepared,
        held_out.users_R,
        held_out.positions_R,
        held_out.asked_R,
        max_history,
        256,
    )
    auc = float(aucs(labels, scores, held_out.users_R, samples=1, seed=0).values_3[0])
    if not np.isfinite(auc):
        raise DataError(
            f"of {len(labels):,} labelled validation events {int(labels.sum()):,} have label 1: no AUC",
            where="train",
            remedy="Set evaluate_every = 0, or choose another split.",
        )
    return auc


def _at_most(held_out: HeldOut) -> HeldOut:
    if len(held_out) <= MOST_VALIDATION_EVENTS:
        return held_out
    return held_out.take(np.linspace(0, len(held_out) - 1, MOST_VALIDATION_EVENTS).astype(np.int64))


def validation_ranks(
    model: Recommender, prepared: Prepared, max_history: int, tokens_per_batch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(R,) where each validation event's item stands in the whole catalogue, the user's history left out, and
    (R,) whose event it is."""
    from hllm.models.common.ranking import HeldOut, rank_by_vectors

    held_out = HeldOut.of(prepared, "valid")
    if not len(held_out):
        raise DataError(
            "there are no validation events",
            where="train",
            remedy="Set evaluate_every = 0, or choose another split.",
        )
    held_out = _at_most(held_out)
    vectors_ID = catalogue_vectors(model, prepared, tokens_per_batch)
    users_RD = held_out_user_vectors(
        model.user,
        vectors_ID,
        prepared,
        held_out.users_R,
        held_out.positions_R,
        held_out.asked_R,
        max_history,
        256,
    )
    ranks = rank_by_vectors(users_RD, vectors_ID, held_out, "validation")
    return np.asarray(ranks.filtered_R), np.asarray(held_out.users_R)


def catalogue_vectors(model: Recommender, prepared: Prepared, tokens_per_batch: int) -> np.ndarray:
    """(I, D) with the item side as it is now."""
    if isinstance(model.items, CachedItems):
        return model.items.vectors
    return encoded(model.items, prepared, 0, prepared.items, tokens_per_batch)
