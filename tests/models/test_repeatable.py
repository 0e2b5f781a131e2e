"""Gradients are the same bits every time, on several threads too: continued runs and seeds rely on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from hllm.models.common.backbone import build_decoder
from hllm.models.common.history import History
from hllm.models.common.items import IdItems
from hllm.models.common.packing import Packing
from hllm.models.common.recommender import Batch, Recommender
from hllm.models.common.settings import Decoder
from hllm.models.hllm.features import EventFeatures
from hllm.models.hllm.items import TextItems
from hllm.models.hllm.model import HLLM
from hllm.models.hllm.users import DecoderUser
from hllm.models.hstu.user import HSTUUser
from hllm.models.sasrec.user import SASRecUser

ITEMS, WINDOWS, LENGTH, WIDTH = 60, 48, 24, 64
"""Large enough for PyTorch to share every operation over threads."""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def texts() -> TextItems:
    items = TextItems(build_decoder(Decoder(width=WIDTH, layers=1), 256), whiten=True, vector="mean")
    tokens = np.random.default_rng(1).integers(0, 256, ITEMS * 12).astype(np.int32)
    items.attach(tokens, np.arange(ITEMS + 1) * 12, trim=True)
    return items


def llm(objective: str = "generative") -> DecoderUser:
    features = EventFeatures(WIDTH, "day", 16, ITEMS)
    return DecoderUser(build_decoder(Decoder(width=WIDTH, layers=1), 256), 0, features, objective)


MODELS: dict[str, Callable[[], Recommender]] = {
    "sasrec": lambda: Recommender(IdItems(ITEMS, WIDTH), SASRecUser(WIDTH, 1, 2, 0.0, LENGTH), 0.07),
    "hstu": lambda: Recommender(IdItems(ITEMS, WIDTH), HSTUUser(WIDTH, 1, 2, 0.0, LENGTH), 0.07),
    "hllm": lambda: HLLM(texts(), llm(), 0.07),
    "early fusion": lambda: HLLM(texts(), llm("early_fusion"), 0.07),
    "late fusion": lambda: HLLM(texts(), llm("late_fusion"), 0.07),
}


def batch() -> Batch:
    """Few items, each of them many times: whose gradients add up."""
    rng = np.random.default_rng(0)
    events_SL = rng.integers(0, ITEMS, (WINDOWS, LENGTH + 1))
    times_T = 10**9 + rng.integers(0, 10**7, WINDOWS * LENGTH)
    targets_T, negatives_N = events_SL[:, 1:].ravel(), np.arange(ITEMS)
    return Batch(
        History(Packing(np.full(WINDOWS, LENGTH)), events_SL[:, :-1].ravel(), times_T, times_T + 1000),
        targets_T,
        negatives_N,
        np.zeros((WINDOWS, ITEMS), bool),
        targets_T,
        negatives_N,
        rng.integers(0, 2, WINDOWS * LENGTH).astype(np.int8),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_is_the_same_every_time(name: str):
    found = []
    for _ in range(4):
        torch.manual_seed(0)
        model = MODELS[name]()
        model.loss(batch()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for again in found[1:]:
        assert [key for key, value in again.items() if not torch.equal(value, found[0][key])] == []
