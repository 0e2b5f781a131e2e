"""One update of the weights: AdamW in every process alike, or spread over the processes by DeepSpeed's ZeRO.

Both read the same gradients, give the same weights up to rounding, and hand out the same checkpoint: whole
tensors by name, so that any number of processes, with or without ZeRO, continues from it.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hllm.errors import ConfigError
from hllm.models.common.packing import device_of
from hllm.models.common.recommender import Recommender
from hllm.settings import Stage
from hllm.training.gradients import Computation, Run
from hllm.work.ranks import let_all_have, place, total

BETAS = (0.9, 0.98)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Seen(NamedTuple):
    """What the last update was like, and the first that could not be made (-1: none)."""

    loss: float
    gradient_norm: float
    failed_step: int
    failed_loss: float
    failed_norm: float


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Groups by weight decay and peak learning rate (`peak_lr`).

    Weight decay is for matrices inside layers only: not for norms, biases, scalars, nor embeddings. The item
    side and its word embeddings may have learning rates of their own. Frozen weights are in no group.
    """
    spared = {"words", "item_token", "projection", "table", "tables", "ids", "positions"}
    spared |= {"position_embeddings", "token_type_embeddings"}  # BERT's
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


class Everywhere:
    """Plain data parallelism: every process holds all weights, sums all gradients, and updates everything."""

    def __init__(self, model: Recommender, stage: Stage, bf16: bool) -> None:
        self.model, self.clip, self.scale = model, stage.clip, 1
        for value in model.state_dict().values():
            let_all_have(value)  # unlike machines may not start from the same bits
        self.run: Run = Computation(model, bf16)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, stage), lr=stage.lr, betas=BETAS, fused=True
        )
        nothing = torch.zeros((), dtype=torch.float64, device=device_of(model))
        self.last_loss, self.last_norm, self.failed = (nothing.clone() for _ in range(3))
        self.failed_loss, self.failed_norm = nothing.clone(), nothing.clone()
        self.failed_step = nothing - 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def together(self) -> AbstractContextManager[None]:
        """Around several `backward` of one step."""
        return nullcontext()

    def step(self, step: int, loss: Tensor, share: float) -> None:
        """Update with `share` of the peak learning rates, unless loss or gradient is not finite: then this
        and all later updates are left out, without asking the GPU, so the weights stay those of the failure
        until someone looks (`seen`)."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        for parameter in parameters:
            total(parameter.grad)
        norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        fails = ~(torch.isfinite(loss) & torch.isfinite(norm))
        first = fails & (self.failed_step < 0)
        self.failed_step = torch.where(first, step, self.failed_step)
        self.failed_loss = torch.where(first, loss.double(), self.failed_loss)
        self.failed_norm = torch.where(first, norm.double(), self.failed_norm)
        self.failed = torch.maximum(self.failed, fails.double())
        self.last_loss, self.last_norm = loss.double(), norm.double()
        self.optimizer.found_inf = self.failed.float()  # type: ignore[attr-defined]
        set_learning_rates(self.optimizer, share)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seen(self) -> Seen:
        """Waits for the GPU."""
        last, failed = (self.last_loss, self.last_norm), (self.failed_loss, self.failed_norm)
        loss, norm, failed_step, failed_loss, failed_norm = torch.stack(
            [*last, self.failed_step, *failed]
        ).tolist()
        return Seen(loss, norm, int(failed_step), failed_loss, failed_norm)

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights by name, in the first process; nothing in the others."""
        return copies(self.model.state_dict()) if place().first else {}

    def moments(self) -> dict[str, Tensor]:
        """Copies of what AdamW remembers, as `NAME.KIND`, in the first process; nothing in the others."""
        if not place().first:
            return {}
        names: dict[Tensor, str] = {value: name for name, value in self.model.named_parameters()}
        return copies(
            {
                f"{names[parameter]}.{kind}": value
                for parameter, state in self.optimizer.state.items()
                for kind, value in state.items()
            }
        )

    def put_back(self, moments: Mapping[str, Tensor]) -> None:
        """The reverse of `moments`, in every process."""
        for name, parameter in self.model.named_parameters():
            if f"{name}.step" in moments:
                self.optimizer.state[parameter] = {
                    kind: moments[f"{name}.{kind}"].to(parameter.device) for kind in ("step", *MOMENTS)
                }

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """Let the model of the first process have these weights and be an ordinary one again."""
        if weights:
            self.model.load_state_dict(weights)


class Spread:
    """DeepSpeed's ZeRO: each process remembers moments (1), keeps gradients (2) and holds weights (3) of its
    share only. Weights are fp32, as everywhere here; the arithmetic is bf16 where the stage says so."""

    def __init__(self, model: Recommender, stage: Stage, bf16: bool, level: int) -> None:
        try:
            import deepspeed
            from deepspeed.utils import logger
        except ImportError:
            raise ConfigError(
                "DeepSpeed is not installed",
                where=f"train.zero = {level}",
                remedy="DS_BUILD_OPS=0 pip install -c constraints.txt --no-build-isolation deepspeed, "
                "or train.zero = 0.",
            ) from None
        logger.setLevel(logging.WARNING)
        # It calls by their old names what PyTorch has renamed, which would be said at every step.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        os.environ.setdefault("LOCAL_RANK", str(place().local_rank))  # asks for it, also for one process
        if level == 3 and model.items.reads_texts:
            model.items.remembered = None  # who reads nothing would not be there when weights are gathered
        self.model, self.level = model, level
        self.scale = place().size
        """DeepSpeed means to average gradients over processes; ours are parts of one sum."""
        optimizer = torch.optim.AdamW(parameter_groups(model, stage), lr=stage.lr, betas=BETAS)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": stage.clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": level, "overlap_comm": False},
        }
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            if not parameter.ndim:  # DeepSpeed sends weights as bytes, and cannot see a scalar as such
                parameter.data = parameter.data.view(1)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=Computation(model, bf16), optimizer=optimizer, config=config
        )
        if level == 3 and self.optimizer.persistent_parameters:
            # The small ones, which it has whole from its first step on: whoever validates before reads them.
            small = self.optimizer.persistent_parameters
            small[0].all_gather(small)
        self.run: Run = self.engine
        self.last = Seen(math.nan, math.nan, -1, math.nan, math.nan)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, step: int, loss: Tensor, share: float) -> None:
        """Update with `share` of the peak learning rates, unless the loss is not finite: then neither this
        nor any later update is made, so that weights and step are those of the failure when someone looks."""
        if self.last.failed_step >= 0:
            return
        value = float(loss)
        if not math.isfinite(value):
            self.last = Seen(value, math.nan, step, value, math.nan)
            return
        set_learning_rates(self.optimizer, share)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        fails = not math.isfinite(norm) or norm < 0
        self.last = Seen(value, norm, step if fails else -1, value, norm)

    def together(self) -> AbstractContextManager[None]:
        """Around several `backward` of one step: each reaches other weights, and DeepSpeed on its own expects
        all weights in each. Until the end every process holds its whole gradients."""
        return self.engine.coalesce_grad_reduction()

    def seen(self) -> Seen:
        return self.last

    def weights(self) -> dict[str, Tensor]:
        import deepspeed

        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            # One at a time: together they may not fit.
            whole = deepspeed.zero.GatheredParameters([parameter]) if self.level == 3 else nullcontext()
            with whole:
                if place().first:
                    found |= copies({name: parameter.data.view(self.shapes[name])})
        if place().first:
            found |= copies(dict(self.model.named_buffers()))
            found = {name: found[name] for name in self.model.state_dict()}
        return found

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        states = list(self.base.state.values())
        if not states:
            return found
        self._link_states()
        step = states[0]["step"]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for kind in MOMENTS:
                    whole = safe_get_full_optimizer_state(parameter, kind)
                    if place().first:
                        found |= copies({f"{name}.{kind}": whole.view(self.shapes[name])})
                if place().first:
                    found |= copies({f"{name}.step": step})
        return found

    def put_back(self, moments: Mapping[str, Tensor]) -> None:
        steps = [value for name, value in moments.items() if name.endswith(".step")]
        if not steps:
            return
        flat = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.level == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        for part in flat:  # what AdamW would make at its first step
            self.base.state[part] = {
                "step": steps[0].clone(),
                **{kind: torch.zeros_like(part) for kind in MOMENTS},
            }
        self._link_states()
        for name, parameter in self.model.named_parameters():
            if f"{name}.step" in moments:
                for kind in MOMENTS:
                    self._put_back(parameter, kind, moments[f"{name}.{kind}"].to(device_of(self.model)))

    def _put_back(self, parameter: Any, kind: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if self.level < 3:
            safe_set_full_optimizer_state(parameter, value, kind)
        else:  # the last share of a weight that does not divide evenly is filled up
            each = safe_get_local_optimizer_state(parameter, kind).numel()
            filled = nn.functional.pad(value.flatten(), (0, each * place().size - value.numel()))
            mine = filled[each * place().rank : each * (place().rank + 1)]
            safe_set_local_optimizer_state(parameter, mine, kind)

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        self.engine.destroy()
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data = weights[name].clone()

    def _link_states(self) -> None:
        """DeepSpeed links moments to parameters after the first step of the first group only, when the other
        groups have none yet: once more."""
        if self.level < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def base(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer


Update = Everywhere | Spread


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In this machine's memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
