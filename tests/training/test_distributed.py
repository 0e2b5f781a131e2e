"""Training in several processes: the losses of one process, whatever each process holds a share of; a
checkpoint that any number of processes continues from."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hllm.data.prepared import Prepared
from hllm.embedding.items import encoded
from hllm.errors import DataError, Terminated
from hllm.models.common.lora import merged_state
from hllm.models.common.recommender import Recommender
from hllm.settings import Stage
from hllm.training import loop
from hllm.training.batches import Batches
from hllm.training.checkpoint import Checkpoints
from hllm.training.loop import fit
from hllm.training.train import validation_ndcg
from hllm.work.ranks import joined, place
from tests.training.world import matrices_spread, on_ranks, prepared_of, tiny_llms

STAGE = Stage(
    history_length=8, batch_size=6, negatives=10, steps=8, lr=3e-3, evaluate_every=4, precision="fp32"
)


def prepared(folder: Path) -> Prepared:
    folder.mkdir(exist_ok=True)
    return prepared_of(folder, [12, 9, 15, 20, 11, 3, 7], items=30)


def trained(
    folder: Path,
    data: Prepared,
    zero: int = 0,
    stop_after: int = 0,
    model: Recommender | None = None,
    validate: Callable[[Recommender], float] | None = None,
    **sets: Any,
) -> tuple[Recommender, dict[str, list[float]]]:
    """A model (small LLMs where none is given) trained from the newest checkpoint in `folder`, and the points
    of its curves. `stop_after`: as SIGTERM would end it, and only one of the processes is told."""
    stage = STAGE.model_copy(update=sets)
    batches = Batches(data, stage.history_length, stage.batch_size, stage.negatives, 1)
    stopping, curves = threading.Event(), {}
    dealt = batches.__class__.__getitem__

    class Watched(Batches):
        def __init__(self) -> None:
            self.__dict__ = batches.__dict__

        def __getitem__(self, step: int) -> Any:
            if step + 1 == stop_after and place().rank == place().size - 1:
                stopping.set()
            return dealt(self, step)

    def log(values: dict[str, float], at: int) -> None:
        for name, value in values.items():
            curves.setdefault(name, []).append(value)

    model = model or tiny_llms(data)
    folder.mkdir(exist_ok=True)
    fit(
        model,
        Watched(),
        stage,
        seed=1,
        checkpoints=Checkpoints(folder),
        stopping=stopping,
        log=log,
        validate=validate or (lambda current: validation_ndcg(current, data, 8, 64)),
        zero=zero,
    )
    return model, curves


def keep(folder: Path, name: str, model: Recommender, curves: dict[str, list[float]]) -> None:
    if place().first:
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(curves))


def assert_alike(
    folder: Path, one: str, other: str, tolerance: float, before: dict[str, torch.Tensor] | None = None
) -> None:
    """The same losses, and the same weights in comparison with how far training has moved them from where
    they were `before`. (Single weights may differ by as much as a step: AdamW moves them by the sign of a
    gradient that is close to nothing.)"""
    curves, others = (json.loads((folder / f"{name}.json").read_text()) for name in (one, other))
    assert curves.keys() == others.keys()
    for name in ("loss", "gradient_norm", "temperature"):
        np.testing.assert_allclose(curves[name], others[name], rtol=tolerance, atol=tolerance, err_msg=name)
    weights, expected = (load_file(folder / f"{name}.safetensors") for name in (one, other))
    assert apart(weights, expected) < 100 * tolerance * apart(expected, before or beginning(folder))


def apart(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The distance between two models."""
    assert weights.keys() == others.keys()
    return float(sum((weights[name] - value).square().sum() for name, value in others.items()) ** 0.5)


def beginning(folder: Path) -> dict[str, torch.Tensor]:
    """The weights before training."""
    return tiny_llms(prepared(folder / "0")).state_dict()


def as_one_of_two(folder: Path) -> None:
    with joined():
        data = prepared(folder / str(place().rank))
        keep(folder, "plain", *trained(folder / "plain", data))
        with pytest.raises(Terminated):
            trained(folder / "parts", data, stop_after=5)
        keep(folder, "continued", *trained(folder / "parts", data))
        with pytest.raises(Terminated):
            trained(folder / "handed-on", data, stop_after=5)
        model, _ = trained(folder / "other", data, steps=1, evaluate_every=0)
        np.save(folder / f"vectors-{place().rank}.npy", encoded(model.items, data, 3, 29, 20))


def as_one_of_two_by_zero(folder: Path) -> None:
    levels = json.loads(os.environ["LEVELS"])
    with joined(), matrices_spread():
        data = prepared(folder / str(place().rank))
        for precision in ("fp32", "bf16"):
            keep(folder, precision, *trained(folder / precision, data, precision=precision))
        keep(folder, "accumulated", *trained(folder / "accumulated", data, accumulate=2))
        for precision in ("fp32", "bf16"):
            for level in levels:
                name = f"zero-{level}-{precision}"
                keep(folder, name, *trained(folder / name, data, zero=level, precision=precision))
        for level in levels:
            with pytest.raises(Terminated):
                trained(folder / f"parts-{level}", data, zero=level, stop_after=5)
            keep(folder, f"continued-{level}", *trained(folder / f"parts-{level}", data, zero=level))
            found = trained(folder / f"accumulated-{level}", data, zero=level, accumulate=2)
            keep(folder, f"accumulated-{level}", *found)
            with failing_at(3), pytest.raises(DataError, match="the loss is nan at step 3"):
                trained(folder / f"failing-{level}", data, zero=level, evaluate_every=0)


@contextmanager
def failing_at(step: int) -> Iterator[None]:
    """The loss of one step is not a number; those after it are fine again."""
    before = loop.backpropagate

    def backpropagate(*args: Any) -> torch.Tensor:
        seed = args[5]
        return before(*args) * (math.nan if seed % 1_000_003 == step else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "backpropagate", backpropagate)
        yield


def as_one_of_two_with_adapters(folder: Path) -> None:
    with joined(), matrices_spread():
        data = prepared(folder / str(place().rank))
        model, curves = trained(folder / "work", data, zero=3, model=tiny_llms(data, lora_rank=2))
        keep(folder, "zero-3", model, curves)
        if place().first:
            save_file(merged_state(model.user.decoder), folder / "merged.safetensors")


def test_two_processes_train_as_one_does_and_either_continues_what_the_other_began(tmp_path: Path):
    on_ranks(f"{__name__}:as_one_of_two", tmp_path)
    data = prepared(tmp_path / "alone")
    keep(tmp_path, "alone", *trained(tmp_path / "work", data))
    assert_alike(tmp_path, "plain", "alone", 1e-4)
    assert (tmp_path / "continued.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert list((tmp_path / "handed-on").glob("step-000000005"))
    keep(tmp_path, "handed-on", *trained(tmp_path / "handed-on", data))
    handed_on, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("handed-on", "alone"))
    assert apart(handed_on, alone) < 0.01 * apart(alone, beginning(tmp_path))
    model, _ = trained(tmp_path / "other-alone", data, steps=1, evaluate_every=0)
    vectors = encoded(model.items, data, 3, 29, 20)
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"vectors-{rank}.npy"), vectors, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="DeepSpeed compiles its communication on a CPU")
@pytest.mark.parametrize("level", [1, 2, 3])
def test_zero_trains_as_plain_data_parallelism_does(level: int, tmp_path: Path):
    on_ranks(f"{__name__}:as_one_of_two_by_zero", tmp_path, LEVELS=json.dumps([level]))
    assert_alike(tmp_path, f"zero-{level}-fp32", "fp32", 1e-4)
    assert_alike(tmp_path, f"zero-{level}-bf16", "bf16", 2e-2)
    assert_alike(tmp_path, f"accumulated-{level}", "accumulated", 1e-4)
    continued, whole = (
        load_file(tmp_path / f"{name}.safetensors") for name in (f"continued-{level}", f"zero-{level}-fp32")
    )
    for name, value in whole.items():
        assert torch.equal(continued[name], value), name
    # One process without DeepSpeed continues from what two with it have written.
    alone, _ = trained(tmp_path / f"parts-{level}", prepared(tmp_path / "alone"))
    assert apart(alone.state_dict(), whole) < 0.01 * apart(whole, beginning(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="DeepSpeed compiles its communication on a CPU")
def test_adapters_train_under_zero_as_they_do_alone_and_are_merged_whole(tmp_path: Path):
    on_ranks(f"{__name__}:as_one_of_two_with_adapters", tmp_path)
    data = prepared(tmp_path / "alone")
    model, curves = trained(tmp_path / "work-alone", data, model=tiny_llms(data, lora_rank=2))
    keep(tmp_path, "alone", model, curves)
    start = tiny_llms(data, lora_rank=2).state_dict()
    assert_alike(tmp_path, "zero-3", "alone", 1e-4, start)
    weights = load_file(tmp_path / "zero-3.safetensors")
    for name, value in start.items():
        if ".base_layer." in name:
            assert torch.equal(weights[name], value), f"{name} is not an adapter, and learned"
    merged, whole = load_file(tmp_path / "merged.safetensors"), merged_state(model.user.decoder)
    assert not [name for name in merged if "lora" in name or "base_layer" in name]
    assert apart(merged, whole) < 0.01 * apart(whole, merged_state(tiny_llms(data, lora_rank=2).user.decoder))
