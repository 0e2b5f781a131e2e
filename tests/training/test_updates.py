"""Whatever the settings make of the model, ZeRO trains it as plain data parallelism does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hllm.data.prepared import Prepared
from hllm.embedding.scores import judges
from hllm.errors import Terminated
from hllm.models.common.items import CachedItems
from hllm.models.common.recommender import Recommender
from hllm.models.hllm.model import HLLM
from hllm.models.load import new_model
from hllm.settings import Settings
from hllm.training.train import prepare_layers, validation_auc, validation_ndcg
from hllm.work.ranks import joined, place
from tests.training.test_distributed import STAGE, assert_alike, keep, prepared, trained
from tests.training.world import ADAPTED, FEATURES, labelled, matrices_spread, on_ranks, tiny_hllm

LEVELS = (1, 2, 3)
FROZEN = {"item_llm": {"frozen": True}}
LATE_AND_ALL = {"objective": "late_fusion", "dropout": 0.1, "whiten": True, **FEATURES, **ADAPTED}
SHAPE = {"width": 16, "layers": 1}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whitening": ({"whiten": True}, {}),
    "features": (FEATURES, {}),
    "early-fusion": ({"objective": "early_fusion", **FEATURES}, {}),
    "late-fusion": ({"objective": "late_fusion"}, {}),
    "adapters": (ADAPTED, {}),
    "frozen-items": (FROZEN, {}),
    "frozen-items-whitened": (FROZEN | {"whiten": True}, {"accumulate": 2}),
    "frozen-user": ({"user_llm": {"frozen": True}}, {}),
    "towers-of-two-widths": ({"item_llm": {"width": 24}, "item_vector": "mean"}, {}),
    "computed-again": ({"objective": "early_fusion", **ADAPTED}, {"gradient_checkpointing": True}),
    "second-stage": ({**FEATURES, "user_llm": {"lora_rank": 2}}, {}),
    "sasrec": (SHAPE, {}),
    "hstu": (SHAPE, {}),
    "all-at-once": (LATE_AND_ALL, {"accumulate": 2}),
}
"""Settings of the model and of its stage."""


def labelled_events(folder: Path) -> Prepared:
    return labelled(prepared(folder))


def model_of(kind: str, data: Prepared) -> Recommender:
    model, stage = KINDS[kind]
    if kind in ("sasrec", "hstu"):
        return new_model(Settings.model_validate({kind: model}), kind, data)
    built = tiny_hllm(data, **model)
    if kind == "second-stage":
        vectors = built.item_vectors(np.arange(data.items)).detach().numpy()
        return HLLM(CachedItems(vectors), built.user, 0.07)
    prepare_layers(built, STAGE.model_copy(update=stage))
    return built


def ever_better(data: Prepared, first: int) -> Callable[[Recommender], float]:
    """Looks at the validation events as training does, and likes every look more than the one before: so that
    it is the last weights that are kept."""
    looks = count(first)

    def validate(model: Recommender) -> float:
        measure = validation_auc if judges(model.user) else validation_ndcg
        return next(looks) + measure(model, data, 8, 64) / 10

    return validate


def as_one_of_two(folder: Path) -> None:
    with joined(), matrices_spread():
        data = labelled_events(folder / str(place().rank))

        def train(name: str, kind: str, level: int, stop_after: int = 0, look: int = 0) -> None:
            stage = {"steps": 5, "evaluate_every": 5, **KINDS[kind][1]}
            given = {"model": model_of(kind, data), "validate": ever_better(data, look), **stage}
            keep(folder, name, *trained(folder / name, data, level, stop_after, **given))

        for level in (0, *LEVELS):
            for kind in KINDS:
                train(f"{kind}-{level}", kind, level)
        for level in LEVELS:
            with pytest.raises(Terminated):
                train(f"continued-{level}", "all-at-once", level, stop_after=2)
            train(f"continued-{level}", "all-at-once", level, look=1)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every kind of model ended as, at every level of ZeRO and (0) without."""
    if not shutil.which("c++"):
        pytest.skip("DeepSpeed compiles its communication on a CPU")
    folder = tmp_path_factory.mktemp("zero")
    on_ranks(f"{__name__}:as_one_of_two", folder, seconds=900)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_trains_every_kind_of_model_as_plain_data_parallelism_does(
    kind: str, level: int, ended: Path, tmp_path: Path
):
    before = model_of(kind, labelled_events(tmp_path))
    assert_alike(ended, f"{kind}-{level}", f"{kind}-0", 1e-4, before.state_dict())
    scores = [
        json.loads((ended / f"{kind}-{number}.json").read_text())["valid_ndcg@10"] for number in (level, 0)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    after = load_file(ended / f"{kind}-{level}.safetensors")
    for name, parameter in before.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(after[name], parameter), f"{name} is not to learn, and did"


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_zero_continues_adapters_features_and_heads_bit_for_bit(level: int, ended: Path):
    continued, whole = (ended / f"{name}-{level}.safetensors" for name in ("continued", "all-at-once"))
    assert continued.read_bytes() == whole.read_bytes()
    one, other = (json.loads(path.with_suffix(".json").read_text()) for path in (continued, whole))
    assert one["loss"][-1] == other["loss"][-1]


@pytest.mark.slow
def test_what_deepspeed_calls_by_old_names_does_not_fill_the_log(ended: Path):
    for rank in range(2):
        assert "Warning" not in (ended / f"said-by-{rank}.txt").read_text()
