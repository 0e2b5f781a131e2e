"""Checkpoints without pickles: safetensors for every tensor, JSON for every number, both in one folder that
appears whole.

Batches, negatives and dropout are functions of (seed, step), so weights, optimizer moments and the step's
number are all there is to continue bit-identically on one machine.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hllm.artifacts import digest_file, write_atomically

KEEP = 2


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    numbers: dict[str, Any],
) -> Path:
    """Write `step-N` and drop all but the newest two. `best`: the weights that did best on validation, if
    any."""
    target = folder / f"step-{step:09d}"
    building = folder / f".{target.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for name, state in _moments(model, optimizer).items():
        tensors |= {f"optimizer.{name}.{kind}": value for kind, value in state.items()}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        building / "tensors.safetensors",
    )
    numbers = {**numbers, "step": step, "digest": digest_file(building / "tensors.safetensors")}
    write_atomically(building / "numbers.json", json.dumps(numbers).encode())
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    return target


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Load the newest whole checkpoint into model and optimizer: (numbers, best weights), or None when there
    is none.

    A damaged checkpoint is said aloud and the one before it is used.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            numbers = json.loads((path / "numbers.json").read_text("utf-8"))
            if digest_file(path / "tensors.safetensors") != numbers["digest"]:
                raise ValueError("its digest does not match")
            tensors = load_file(path / "tensors.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            print(
                f"train: checkpoint {path.name} is damaged ({error}); trying the one before", file=sys.stderr
            )
            continue
        model.load_state_dict(_under(tensors, "model."))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = _name_of(model, parameter)
                state = _under(tensors, f"optimizer.{name}.")
                if state:
                    optimizer.state[parameter] = state
        return numbers, _under(tensors, "best.")
    return None


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {_name_of(model, parameter): dict(state) for parameter, state in optimizer.state.items()}


def _name_of(model: nn.Module, parameter: Any) -> str:
    return next(name for name, value in model.named_parameters() if value is parameter)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
