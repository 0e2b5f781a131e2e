"""The training loop: the same for every family and stage."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hllm.errors import DataError, Terminated
from hllm.models.common.recommender import Recommender
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.checkpoint import Checkpoints, shared, under
from hllm.training.gradients import backpropagate
from hllm.training.updates import Everywhere, Seen, Spread, Update
from hllm.work.progress import Progress
from hllm.work.ranks import any_of, place

LOG_EVERY = 10


@dataclass
class Trained:
    """What a finished loop knows of itself."""

    steps: int
    first_loss: float
    last_loss: float
    best_step: int
    seconds: float
    facts: dict[str, float] = field(default_factory=dict)


def total_steps(stage: Stage, batches: Batches) -> int:
    return stage.steps or max(1, round(stage.epochs * batches.steps_per_epoch))


def share_of_peak(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak learning rate."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * along)) / 2


def in_bf16(precision: str) -> bool:
    """`auto` takes bf16 where the processor multiplies it natively: four times as fast as fp32 there, slower
    elsewhere."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def fit(
    model: Recommender,
    batches: Batches,
    stage: Stage,
    *,
    seed: int,
    checkpoints: Checkpoints,
    stopping: threading.Event,
    log: Callable[[dict[str, float], int], None],
    validate: Callable[[Recommender], float] | None = None,
    validated: str = "ndcg@10",
    what: str = "train",
    zero: int = 0,
) -> Trained:
    """Train until the last step, from the newest checkpoint; the model of the first process ends with its
    best (or last) weights. Every process calls it alike (`hllm.work.ranks`); `zero`: DeepSpeed's level.
    `validated` names the metric that `validate` measures.

    Raises:
        DataError: the loss is not finite (weights and batch are saved beside the checkpoints for inspection).
        Terminated: `stopping` was set; a checkpoint has been written.
    """
    if not batches.windows:
        raise DataError(
            "no user has two training events",
            where="train",
            remedy="Look at prepare's output: split, k_core, quarantine.",
        )
    steps = total_steps(stage, batches)
    state: dict[str, Any] = {
        "first_loss": math.nan,
        "loss": math.nan,
        "best": -math.inf,
        "best_step": 0,
        "seconds": 0.0,
        "step": 0,
    }
    best: dict[str, Tensor] = {}
    restored = shared(checkpoints.newest() if place().first else None)
    if restored:
        state, best = restored[0], under(restored[1], "best.")
        model.load_state_dict(under(restored[1], "model."))
    bf16 = in_bf16(stage.precision)
    update: Update = Spread(model, stage, bf16, zero) if zero else Everywhere(model, stage, bf16)
    if restored:
        update.put_back(under(restored[1], "optimizer."))
        if place().first:
            print(f"{what}: continues from step {state['step']} of {steps}", flush=True)
        del restored
    elif validate and stage.evaluate_every:
        state["best"], best = _score(model, validate), update.weights()
        log({f"valid_{validated}": state["best"]}, 0)
    started = time.monotonic() - state["seconds"]
    saved_at = time.monotonic()
    model.train()
    with Progress(what, steps, "step", start=state["step"]) as progress:
        for step in range(state["step"], steps):
            share = share_of_peak(step, steps, stage.warmup)
            with update.together() if stage.accumulate > 1 else nullcontext():
                loss = backpropagate(
                    model,
                    update.run,
                    update.backward,
                    batches[step],
                    stage.accumulate,
                    seed * 1_000_003 + step,
                    update.scale,
                )
            update.step(step, loss, share)
            done = state["step"] = step + 1
            due = time.monotonic() - saved_at > stage.checkpoint_minutes * 60
            stop = any_of(stopping.is_set()) and done < steps
            save = (stop or any_of(due and place().first)) and done < steps
            look = bool(validate and stage.evaluate_every) and (
                done % stage.evaluate_every == 0 or done == steps
            )
            if step % LOG_EVERY == 0 or done == steps or save or look:
                seen = update.seen()
                if seen.failed_step >= 0:
                    _stop_at_failure(seen, update.weights(), batches, checkpoints.folder, what)
                state["loss"] = seen.loss
                if step == 0:
                    state["first_loss"] = seen.loss
            if step % LOG_EVERY == 0 or done == steps:
                log(
                    {
                        "loss": seen.loss,
                        "lr": stage.lr * share,
                        "temperature": 1 / float(model.scale.detach()),
                        "gradient_norm": seen.gradient_norm,
                    },
                    done,
                )
            if validate and look:
                score = _score(model, validate)
                log({f"valid_{validated}": score}, done)
                if score > state["best"]:
                    state["best"], state["best_step"] = score, done
                    best = update.weights()
            progress.advance(1, loss=state["loss"])
            state["seconds"] = time.monotonic() - started
            if save:
                tensors = {f"model.{name}": value for name, value in update.weights().items()}
                tensors |= {f"optimizer.{name}": value for name, value in update.moments().items()}
                tensors |= {f"best.{name}": value for name, value in best.items()}
                if place().first:
                    checkpoints.save(done, tensors, state)
                saved_at = time.monotonic()
            if stop:
                raise Terminated
    validates = bool(validate and stage.evaluate_every)
    update.finish(best if validates else update.weights())
    model.eval()
    return Trained(
        steps=steps,
        first_loss=state["first_loss"],
        last_loss=state["loss"],
        best_step=state["best_step"] if validates else steps,
        seconds=state["seconds"],
        facts={f"best_valid_{validated}": state["best"]} if validates else {},
    )


def _score(model: Recommender, validate: Callable[[Recommender], float]) -> float:
    model.eval()
    with torch.no_grad():
        score = validate(model)
    model.train()
    return score


def _stop_at_failure(
    seen: Seen, weights: dict[str, Tensor], batches: Batches, folder: Path, what: str
) -> None:
    """Raises: DataError, with the weights before the update that failed and its batch saved."""
    if place().first:
        save_file(weights, folder / "not_finite_weights.safetensors")
        batch = batches[seen.failed_step].tensors()
        save_file(
            {name: value.contiguous() for name, value in batch.items()},
            folder / "not_finite_batch.safetensors",
        )
    which = "loss" if not math.isfinite(seen.failed_loss) else "gradient norm"
    value = seen.failed_loss if which == "loss" else seen.failed_norm
    raise DataError(
        f"the {which} is {value} at step {seen.failed_step}",
        where=what,
        remedy=f"Weights and batch are in {folder}; lower the learning rate, or look at the data.",
    )
