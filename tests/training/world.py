"""Prepared data and models small enough to train in a blink."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm.data.prepared import Prepared, write_arrays
from hllm.models.common.backbone import build_decoder
from hllm.models.common.items import IdItems
from hllm.models.common.lora import choose_what_learns
from hllm.models.common.recommender import Recommender
from hllm.models.common.settings import Decoder
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.users import DecoderUser
from hllm.models.load import new_model
from hllm.models.sasrec.user import SASRecUser
from hllm.settings import Settings
from tests.conftest import free_port

FEATURES = {"user_features": {"time": "hour", "time_width": 4, "item_id": True}}
ADAPTED = {"item_llm": {"lora_rank": 2}, "user_llm": {"lora_rank": 2}}
"""Settings of the model that are more than two plain towers."""


def prepared_of(folder: Path, lengths: list[int], items: int, seed: int = 0) -> Prepared:
    """Users with histories of the given lengths; the last two events of those with three or more are held
    out."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    held = np.array(lengths) >= 3
    write_arrays(
        folder,
        event_items=rng.integers(0, items, offsets[-1]),
        event_times=np.arange(offsets[-1]),
        event_labels=np.full(offsets[-1], -1),
        user_offsets=offsets,
        train_ends=offsets[1:] - 2 * held,
        valid_ends=offsets[1:] - 1 * held,
        token_ids=rng.integers(0, 256, items * 4),
        token_offsets=np.arange(items + 1) * 4,
    )
    return Prepared.open(folder)


def tiny_model(items: int, dropout: float = 0.3) -> Recommender:
    torch.manual_seed(3)
    return Recommender(IdItems(items, 16), SASRecUser(16, 1, 2, dropout, 20), 0.07)


def tiny_llms(prepared: Prepared, layers: int = 2, lora_rank: int = 0) -> Recommender:
    """Both towers text-reading LLMs, small ones; with adapters that learn, if they have a rank."""
    torch.manual_seed(4)
    shape = Decoder(width=16, heads=2, layers=layers, lora_rank=lora_rank)
    decoders = [build_decoder(shape, 256) for _ in range(2)]
    for decoder in decoders:
        choose_what_learns(decoder, shape, "the tests")
    items = TextItems(decoders[0])
    torch.nn.init.normal_(items.item_token)
    items.attach(prepared.token_ids, prepared.token_offsets, trim=True)
    return Recommender(items, DecoderUser(decoders[1]), 0.07)


def tiny_hllm(prepared: Prepared, layers: int = 2, **model: Any) -> Recommender:
    """What these settings of the section `hllm` make of two small random towers."""
    tower = {"width": 16, "heads": 2, "layers": layers}
    towers = {name: tower | model.get(name, {}) for name in ("item_llm", "user_llm")}
    return new_model(Settings.model_validate({"hllm": model | towers}), "hllm", prepared)


def labelled(prepared: Prepared) -> Prepared:
    """The same, and two of three events say whether the user liked the item."""
    labels = np.random.default_rng(0).choice([-1, 0, 1], len(prepared.event_items)).astype(np.int8)
    return dataclasses.replace(prepared, event_labels=labels)


@contextmanager
def matrices_spread() -> Iterator[None]:
    """DeepSpeed leaves weights of fewer than 100,000 numbers whole in every process: here that were all."""
    import deepspeed

    initialize = deepspeed.initialize

    def spreading(**given: Any) -> Any:
        given["config"]["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        return initialize(**given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", spreading)
        yield


def on_ranks(
    function: str, folder: Path, count: int = 2, seconds: float = 300, **environment: str
) -> list[str]:
    """`module:function(folder)` in so many processes that know each other, as torchrun would start them; what
    they said."""
    module, _, name = function.partition(":")
    script = f"from pathlib import Path; from {module} import {name}; {name}(Path({str(folder)!r}))"
    meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = [folder / f"said-by-{rank}.txt" for rank in range(count)]  # a pipe that nobody reads fills up
    processes = []
    try:
        for rank in range(count):
            with said[rank].open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", script],
                        cwd=Path(__file__).parents[2],
                        env=os.environ
                        | meeting
                        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
                        | environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        for process, path in zip(processes, said, strict=True):
            assert process.wait(timeout=seconds) == 0, path.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [path.read_text() for path in said]
