"""The training loop: the same for every family and stage."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hllm.errors import DataError, Terminated
from hllm.models.recommender import Recommender
from hllm.progress import Progress
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.checkpoint import Checkpoints, put_back, state_of

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


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Groups by weight decay and peak learning rate (`peak_lr`).

    Weight decay is for matrices inside layers only: not for norms, biases, scalars, nor embeddings. The item
    side and its word embeddings may have learning rates of their own. Frozen weights are in no group.
    """
    spared = {"words", "item_token", "projection", "table", "tables", "ids", "positions"}
    item_lr = stage.item_lr or stage.lr
    peaks = {"items.words": stage.words_lr or item_lr, "items": item_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and spared.isdisjoint(name.split("."))
            peak = peaks.get(name, peaks.get(name.partition(".")[0], stage.lr))
            groups.setdefault((stage.weight_decay if decays else 0.0, peak), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "peak_lr": peak}
        for (decay, peak), parameters in groups.items()
    ]


def share_of_peak(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak learning rate."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * along)) / 2


def _score(model: Recommender, validate: Callable[[Recommender], float]) -> float:
    model.eval()
    with torch.no_grad():
        score = validate(model)
    model.train()
    return score


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def in_bf16(precision: str) -> bool:
    """`auto` takes bf16 where the processor multiplies it natively: four times as fast as fp32 there, slower
    elsewhere."""
    if precision != "auto":
        return precision == "bf16"
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
) -> Trained:
    """Train until the last step, from the newest checkpoint; the model ends with its best (or last) weights.
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
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), lr=stage.lr, betas=(0.9, 0.98), fused=True)
    state: dict[str, Any] = {
        "first_loss": math.nan,
        "loss": math.nan,
        "best": -math.inf,
        "best_step": 0,
        "seconds": 0.0,
        "step": 0,
    }
    best: dict[str, Tensor] = {}
    restored = checkpoints.newest()
    if restored:
        state, best = restored[0], put_back(restored[1], model, optimizer)
        print(f"{what}: continues from step {state['step']} of {steps}", flush=True)
    elif validate and stage.evaluate_every:
        state["best"], best = _score(model, validate), _copy_of(model)
        log({f"valid_{validated}": state["best"]}, 0)
    started = time.monotonic() - state["seconds"]
    saved_at = time.monotonic()
    model.train()
    with Progress(what, steps, "step", start=state["step"]) as progress:
        for step in range(state["step"], steps):
            torch.manual_seed(seed * 1_000_003 + step)
            share = share_of_peak(step, steps, stage.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(stage.precision)):
                loss = model.loss(batches[step])
            state["loss"] = float(loss.detach())
            if not math.isfinite(state["loss"]):
                for name, tensors in (("weights", model.state_dict()), ("batch", batches[step].tensors())):
                    save_file(
                        {key: value.contiguous() for key, value in tensors.items()},
                        checkpoints.folder / f"not_finite_{name}.safetensors",
                    )
                raise DataError(
                    f"the loss is {state['loss']} at step {step}",
                    where=what,
                    remedy=f"Weights and batch are in {checkpoints.folder}; "
                    "lower the learning rate, or look at the data.",
                )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = state["step"] = step + 1
            if step == 0:
                state["first_loss"] = state["loss"]
            if step % LOG_EVERY == 0 or done == steps:
                log(
                    {
                        "loss": state["loss"],
                        "lr": stage.lr * share,
                        "temperature": 1 / float(model.scale.detach()),
                        "gradient_norm": float(norm),
                    },
                    done,
                )
            if validate and stage.evaluate_every and (done % stage.evaluate_every == 0 or done == steps):
                score = _score(model, validate)
                log({f"valid_{validated}": score}, done)
                if score > state["best"]:
                    state["best"], state["best_step"] = score, done
                    best = _copy_of(model)
            progress.advance(1, loss=state["loss"])
            state["seconds"] = time.monotonic() - started
            due = time.monotonic() - saved_at > stage.checkpoint_minutes * 60
            if (stopping.is_set() or due) and done < steps:
                checkpoints.save(done, state_of(model, optimizer, best), state)
                saved_at = time.monotonic()
            if stopping.is_set() and done < steps:
                raise Terminated
    if best:
        model.load_state_dict(best)
    model.eval()
    return Trained(
        steps=steps,
        first_loss=state["first_loss"],
        last_loss=state["loss"],
        best_step=state["best_step"] if best else steps,
        seconds=state["seconds"],
        facts={f"best_valid_{validated}": state["best"]} if best else {},
    )
