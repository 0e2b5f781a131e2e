"""Checkpoints without pickles: safetensors for every tensor, JSON for every number, both in one folder that
appears whole, here and, where outputs live in S3, there.

Batches, negatives and dropout are functions of (seed, step), so weights, optimizer moments and the step's
number are all there is to continue bit-identically on one machine.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hllm.work.artifacts import digest_file, write_atomically
from hllm.work.objects import delete_objects, download, list_objects, s3_client, upload
from hllm.work.ranks import place, total

Restored = tuple[dict[str, Any], dict[str, Tensor]]
"""The numbers and the tensors of a checkpoint."""
TENSORS, NUMBERS = "tensors.safetensors", "numbers.json"
STEP = re.compile(r"step-\d{9}")
"""The name of a checkpoint: nothing else is read or removed."""


@dataclass(frozen=True)
class Checkpoints:
    """The newest `keep` checkpoints of one training: folders `step-N` in `folder`, and the same objects under
    `location` (s3://...), so that a process on another machine continues where this one was killed."""

    folder: Path
    location: str = ""
    keep: int = 2
    beside: tuple[Path, ...] = ()
    """Files that belong to a checkpoint, such as the curves so far: put back where they are missing."""

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Path:
        """Write `step-N`, carry it to `location`, drop all but the newest.

        Raises:
            InfraError: it could not be carried to S3 (it is whole in `folder`).
        """
        target = self.folder / f"step-{step:09d}"
        building = self.folder / f".{target.name}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save_file(dict(tensors), building / TENSORS)
        for path in self.beside:
            if path.exists():
                shutil.copy(path, building)
        whole = {**numbers, "step": step, "digest": digest_file(building / TENSORS)}
        write_atomically(building / NUMBERS, json.dumps(whole).encode())
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
        for old in self._here()[: -self.keep]:
            shutil.rmtree(old)
        if self.location:
            self._carry(target)
        return target

    def newest(self) -> Restored | None:
        """(numbers, tensors) of the newest whole checkpoint, here or in S3; None when there is none.

        A damaged checkpoint is said aloud and removed, and the one before it is used.

        Raises:
            InfraError: S3 does not answer.
        """
        there = self._there()
        here = {path.name for path in self._here()}
        for name in sorted(here | {name for name, files in there.items() if NUMBERS in files}, reverse=True):
            path, why = self.folder / name, "it is gone"
            for fetch in (False, True):
                if fetch and NUMBERS not in there.get(name, {}):
                    continue
                if fetch:
                    shutil.rmtree(path, ignore_errors=True)
                    for part, location in there[name].items():
                        download(location, path / part)
                elif name not in here:
                    continue
                try:
                    numbers, tensors = _read(path)
                except (OSError, ValueError, KeyError, SafetensorError) as error:
                    why = str(error)
                    continue
                for companion in self.beside:
                    if (path / companion.name).exists() and not companion.exists():
                        shutil.copy(path / companion.name, companion)
                return numbers, tensors
            print(
                f"train: checkpoint {name} is damaged ({why}); trying the one before",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(path, ignore_errors=True)
            delete_objects(there.get(name, {}).values())
        return None

    def _here(self) -> list[Path]:
        """The checkpoints in `folder`, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if STEP.fullmatch(path.name))

    def _carry(self, checkpoint: Path) -> None:
        """The numbers last: a checkpoint without them is none."""
        client = s3_client()
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == NUMBERS):
            upload(path, f"{self.location}/{checkpoint.name}/{path.name}", client)
        there = self._there(client)
        for old in sorted(there)[: -self.keep]:
            delete_objects(there[old].values(), client)

    def _there(self, client: Any = None) -> dict[str, dict[str, str]]:
        """What is in S3: checkpoint -> file -> location."""
        found: dict[str, dict[str, str]] = {}
        for location in list_objects(f"{self.location}/", client) if self.location else ():
            name, _, file = location.removeprefix(f"{self.location}/").partition("/")
            if STEP.fullmatch(name) and file in (NUMBERS, TENSORS, *(path.name for path in self.beside)):
                found.setdefault(name, {})[file] = location
        return found


def _read(path: Path) -> Restored:
    numbers = json.loads((path / NUMBERS).read_text("utf-8"))
    if digest_file(path / TENSORS) != numbers["digest"]:
        raise ValueError("its digest does not match")
    return numbers, load_file(path / TENSORS)


def shared(found: Restored | None) -> Restored | None:
    """What the first process found, in every process."""
    if place().size == 1:
        return found
    shapes = found and {name: [str(value.dtype), *value.shape] for name, value in found[1].items()}
    header = json.dumps([found[0], shapes] if found else None).encode()
    size = total(torch.tensor([len(header) if place().first else 0]))
    text = torch.zeros(int(size), dtype=torch.uint8)
    if place().first:
        text.copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    told = json.loads(bytes(total(text).tolist()))
    if told is None:
        return None
    numbers, shapes = told
    tensors: dict[str, Tensor] = {}
    for name, (dtype, *shape) in shapes.items():
        empty = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        tensors[name] = found[1][name] if found else empty
        torch.distributed.broadcast(tensors[name], 0)
    return numbers, tensors


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one kind (model, optimizer, best), by their own names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
