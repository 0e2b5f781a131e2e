"""The training step: one stage of one family, from its inputs to saved weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch

from hllm.data.prepared import Prepared
from hllm.embedding.items import ItemVectors, encoded
from hllm.embedding.scores import held_out_scores, judges
from hllm.embedding.users import held_out_user_vectors
from hllm.errors import DataError
from hllm.models.common.backbone import compile_layers
from hllm.models.common.recommender import Recommender
from hllm.models.items import CachedItems
from hllm.models.load import new_model, next_stage, save_model
from hllm.models.users import DecoderUser
from hllm.pipeline import Context, embed_name, train_name
from hllm.settings import Stage
from hllm.training.batches import Batches, training_users
from hllm.training.checkpoint import Checkpoints
from hllm.training.loop import fit
from hllm.work.ranks import device, place

if TYPE_CHECKING:
    from hllm.evaluation.ranking import HeldOut

MOST_VALIDATION_EVENTS = 5_000
"""Enough to choose between checkpoints; more would only cost time."""


def train(context: Context) -> None:
    """Step: trains, from the newest checkpoint if there is one, and saves the best (or last) weights."""
    _, family, stage_text = context.step.name.split("-")
    stage_number, settings = int(stage_text), context.settings
    stage: Stage = settings.at(f"train.stage{stage_number}" if family == "hllm" else f"train.{family}")
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    prepared = Prepared.open(context.inputs["prepare"])
    if stage_number == 1:
        model = new_model(settings, family, prepared)
    else:
        vectors = ItemVectors.open(context.inputs[embed_name(family, 1)]).matrix()
        model = next_stage(settings, context.inputs[train_name(family, 1)], vectors)
    model.to(device())
    prepare_layers(model, stage)
    batches = Batches(
        prepared,
        stage.history_length,
        stage.batch_size,
        stage.negatives,
        settings.run.seed + stage_number,
        training_users(prepared.users, settings.train.share, settings.run.seed),
    )
    judging = judges(model.user)
    if judging:
        require_labels(batches)
    with context.graceful() as stopping:
        trained = fit(
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
    save_model(model, family, context.output)
    context.rows = {"windows": batches.windows, "steps": trained.steps}
    context.facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        ),
        "first_loss": trained.first_loss,
        "last_loss": trained.last_loss,
        "best_step": trained.best_step,
        "train_seconds": round(trained.seconds, 1),
        "steps_per_second": round(trained.steps / max(trained.seconds, 1e-9), 3),
        "processes": place().size,
        **trained.facts,
    }


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
            remedy='Name the label column (data.columns.label), or set model.objective = "generative".',
        )


def validation_auc(model: Recommender, prepared: Prepared, max_history: int, tokens_per_batch: int) -> float:
    """AUC of the validation events that have a label."""
    from hllm.evaluation.auc import aucs
    from hllm.evaluation.ranking import HeldOut

    held_out = HeldOut.of(prepared, "valid")
    labels = np.asarray(prepared.event_labels)[held_out.positions_R]
    held_out = _at_most(held_out.take(np.flatnonzero(labels >= 0)))
    labels = np.asarray(prepared.event_labels)[held_out.positions_R]
    vectors_ID = catalogue_vectors(model, prepared, tokens_per_batch)
    scores = held_out_scores(
        cast(DecoderUser, model.user),
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
    from hllm.evaluation.ranking import HeldOut, rank_by_vectors

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
