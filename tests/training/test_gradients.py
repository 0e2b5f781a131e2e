"""One step is one step: in parts or at once, by one process or by two, loss and gradients are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hllm.data.prepared import Prepared
from hllm.models.common.items import CachedItems, IdItems
from hllm.models.common.recommender import Recommender
from hllm.models.sasrec.user import SASRecUser
from hllm.training.batches import Batches
from hllm.training.gradients import Computation, backpropagate
from hllm.work.ranks import joined, place, total
from tests.training.world import on_ranks, prepared_of, tiny_llms

KINDS = ("texts", "ids", "cached")
PARTS = (1, 3)


def prepared(folder: Path) -> Prepared:
    folder.mkdir(exist_ok=True)
    return prepared_of(folder, [12, 9, 15, 20, 11, 3, 7], items=30)


def model_of(kind: str, data: Prepared) -> Recommender:
    if kind == "texts":
        return tiny_llms(data)
    torch.manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(30, 16), dim=-1).numpy()
    items = IdItems(30, 16) if kind == "ids" else CachedItems(vectors)
    return Recommender(items, SASRecUser(16, 2, 2, 0.0, 20), 0.07)


def gradients(kind: str, data: Prepared, parts: int, step: int = 0) -> dict[str, torch.Tensor]:
    """The loss, and every parameter's gradient, of all processes together."""
    model = model_of(kind, data)
    batch = Batches(data, 8, 6, 10, seed=1)[step]
    run = Computation(model, bf16=False)
    loss = backpropagate(model, run, lambda part: part.backward(), batch, parts, seed=5)
    found = {"loss": loss}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = total(parameter.grad)
    return found


def as_one_of_two(folder: Path) -> None:
    with joined():
        data = prepared(folder / str(place().rank))
        last = Batches(data, 8, 6, 10, seed=1).steps_per_epoch - 1  # may have fewer windows than processes
        for kind in KINDS:
            for parts in PARTS:
                for step in (0, last):
                    found = gradients(kind, data, parts, step)
                    save_file(found, folder / f"{kind}-{parts}-{step > 0}-{place().rank}.safetensors")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # a temperature's gradient is a small difference of large numbers
        torch.testing.assert_close(found[name], value, atol=5e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_have_the_loss_and_the_gradients_of_the_whole(kind: str, parts: int, tmp_path: Path):
    """50: more parts than windows."""
    data = prepared(tmp_path)
    assert_close(gradients(kind, data, parts), gradients(kind, data, 1))


def test_no_part_of_a_step_draws_what_a_part_of_another_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = prepared(tmp_path)
    model, batch = tiny_llms(data), Batches(data, 8, 6, 10, seed=1)[0]
    drawn: list[set[int]] = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: drawn[-1].add(seed))
    for step in range(7, 13):
        drawn.append(set())
        backpropagate(model, Computation(model, bf16=False), lambda part: part.backward(), batch, 3, step)
        drawn[-1].remove(step)  # of a step in one part
    assert len(set.union(*drawn)) == sum(map(len, drawn)) == 6 * 6


def test_at_once_is_the_models_own_loss(tmp_path: Path):
    data = prepared(tmp_path)
    model = tiny_llms(data)
    loss = model.loss(Batches(data, 8, 6, 10, seed=1)[0])
    loss.backward()
    found = gradients("texts", data, 1)
    assert torch.equal(found["loss"], loss.detach())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path: Path):
    on_ranks(f"{__name__}:as_one_of_two", tmp_path)
    data = prepared(tmp_path / "alone")
    last = Batches(data, 8, 6, 10, seed=1).steps_per_epoch - 1
    for kind in KINDS:
        for parts in PARTS:
            for step in (0, last):
                expected = gradients(kind, data, 1, step)
                for rank in range(2):
                    found = load_file(tmp_path / f"{kind}-{parts}-{step > 0}-{rank}.safetensors")
                    assert_close(found, expected)


def test_in_parts_the_items_of_a_step_are_read_a_part_at_a_time(tmp_path: Path):
    data = prepared(tmp_path)
    model, read = tiny_llms(data), []
    encode = model.items.forward

    def reading(items_K: np.ndarray) -> torch.Tensor:
        read.append(items_K)
        return encode(items_K)

    model.items.forward = reading  # type: ignore[method-assign]
    batch = Batches(data, 8, 6, 10, seed=1)[0]
    backpropagate(model, Computation(model, False), lambda part: part.backward(), batch, 3, seed=5)
    assert max(map(len, read)) <= -(-len(batch.distinct_K) // 3)
    assert sorted(np.concatenate(read)) == sorted(np.repeat(batch.distinct_K, 2))
