"""Settings that save memory or time and leave the numbers as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hllm.data.prepared import Prepared
from hllm.models.common.backbone import compile_layers, layers_of
from hllm.models.common.recommender import Recommender
from hllm.settings import Stage
from hllm.training.batches import Batches
from hllm.training.train import prepare_layers
from tests.training.world import prepared_of, tiny_llms


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return prepared_of(tmp_path, [12, 9, 15, 20], items=30)


def step(model: Recommender, prepared: Prepared) -> dict[str, torch.Tensor]:
    """The loss and the gradients of one batch, and how often the layers ran."""
    runs: list[int] = []
    towers: list[Any] = [model.items, model.user]
    for tower in towers:
        for layer in layers_of(tower.decoder)[:-1]:
            layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    model.train()
    loss = model.loss(Batches(prepared, 8, 4, 10, seed=1)[0])
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {**found, "loss": loss.detach(), "runs": torch.tensor(len(runs))}


def test_layers_computed_again_have_the_same_gradients(prepared: Prepared):
    expected = step(tiny_llms(prepared), prepared)
    model = tiny_llms(prepared)
    prepare_layers(model, Stage(gradient_checkpointing=True))
    found = step(model, prepared)
    assert found.pop("runs") == 2 * expected.pop("runs")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_layers_are_compiled_once_for_batches_of_any_lengths(prepared: Prepared):
    from torch._dynamo.testing import CompileCounter

    model, plain, counter = tiny_llms(prepared), tiny_llms(prepared), CompileCounter()
    for tower in (model.items, model.user):
        compile_layers(tower.decoder, counter)
    batches, compiled = Batches(prepared, 8, 4, 10, seed=1), []
    for number in range(3):
        torch.testing.assert_close(model.loss(batches[number]), plain.loss(batches[number]))
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled[1] == compiled[2]


@pytest.mark.slow
def test_compiled_layers_compute_the_same(prepared: Prepared):
    expected = step(tiny_llms(prepared, layers=1), prepared)
    model = tiny_llms(prepared, layers=1)
    prepare_layers(model, Stage(compile=True))
    found = step(model, prepared)
    for name in expected.keys() - {"runs"}:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)
