"""The loss against a plain loop over the paper's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hllm.models.common.backbone import build_decoder
from hllm.models.common.history import History
from hllm.models.common.items import IdItems
from hllm.models.common.packing import Packing
from hllm.models.common.recommender import Batch, Recommender, info_nce, no_negatives
from hllm.models.common.settings import Decoder
from hllm.models.hllm.features import EventFeatures
from hllm.models.hllm.users import DecoderUser
from hllm.models.sasrec.user import SASRecUser


def vectors(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loss_by_hand(outputs, targets, negatives, excluded, scale):
    losses = []
    for t in range(len(outputs)):
        positive = math.exp(scale * float(outputs[t] @ targets[t]))
        total = positive
        for n in range(len(negatives)):
            if not excluded[t, n]:
                total += math.exp(scale * float(outputs[t] @ negatives[n]))
        losses.append(-math.log(positive / total))
    return sum(losses) / len(losses)


def test_info_nce_is_the_papers_formula():
    outputs, targets, negatives = vectors(6, 8, seed=1), vectors(6, 8, seed=2), vectors(5, 8, seed=3)
    excluded = torch.tensor(np.random.default_rng(0).random((6, 5)) < 0.3)
    found = info_nce(outputs, targets, negatives, excluded, torch.tensor(10.0))
    assert float(found) == pytest.approx(loss_by_hand(outputs, targets, negatives, excluded, 10.0), rel=1e-5)


def test_own_items_and_twins_of_the_target_are_no_negatives():
    own_SN = np.array([[True, False, False], [False, False, False]])
    batch = Batch(
        History.without_times(Packing(np.array([1, 2])), np.array([0, 1, 2])),
        np.array([1, 2, 3]),
        np.array([4, 5, 6]),
        own_SN,
        target_texts_T=np.array([1, 2, 3]),
        negative_texts_N=np.array([4, 2, 3]),
    )
    expected = [[True, False, False], [False, True, False], [False, False, True]]
    assert no_negatives(batch, torch.device("cpu")).tolist() == expected


def test_collapsed_item_vectors_are_no_way_to_a_small_loss():
    """A mask by the cosine of two vectors would drop every negative here."""
    same = vectors(1, 8, seed=1).expand(4, -1)
    loss = info_nce(same, same, same, torch.zeros(4, 4, dtype=torch.bool), torch.tensor(20.0))
    assert float(loss) == pytest.approx(math.log(5))


def test_a_row_without_any_negative_has_a_finite_gradient():
    outputs = vectors(2, 4, seed=1).requires_grad_()
    loss = info_nce(
        outputs,
        vectors(2, 4, seed=2),
        vectors(3, 4, seed=3),
        torch.ones(2, 3, dtype=torch.bool),
        torch.tensor(5.0),
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()


def test_temperature_starts_where_the_setting_says_and_is_clamped():
    model = Recommender(IdItems(4, 8), SASRecUser(8, 1, 1, 0.0, 5), 0.07)
    assert float(model.scale) == pytest.approx(1 / 0.07)
    for far, edge in ((9.0, 100.0), (-9.0, 1.0)):
        model.log_scale.data.fill_(far)
        assert float(model.scale) == pytest.approx(edge)


def test_a_temperature_that_went_past_its_bound_comes_back():
    model = Recommender(IdItems(4, 8), SASRecUser(8, 1, 1, 0.0, 5), 0.07)
    for far, inwards in ((9.0, 1.0), (-9.0, -1.0)):
        for sign in (inwards, -inwards):
            model.log_scale.data.fill_(far)
            model.log_scale.grad = None
            (model.scale * sign).backward()
            assert float(model.log_scale.grad) == pytest.approx(
                sign * float(model.scale) if sign == inwards else 0.0
            )


def test_every_distinct_item_is_encoded_once():
    encoded: list[np.ndarray] = []

    class Counting(IdItems):
        def forward(self, items_K):
            encoded.append(items_K)
            return super().forward(items_K)

    model = Recommender(Counting(9, 8), SASRecUser(8, 1, 1, 0.0, 5), 0.07)
    batch = Batch(
        History.without_times(Packing(np.array([2, 3])), np.array([1, 1, 2, 1, 2])),
        np.array([1, 2, 1, 2, 3]),
        np.array([3, 7]),
        np.zeros((2, 2), bool),
        np.array([1, 2, 1, 2, 3]),
        np.array([3, 7]),
    )
    model.loss(batch).backward()
    assert [sorted(items) for items in encoded] == [[1, 2, 3, 7]]


def test_what_the_user_llm_is_told_of_an_event_reaches_no_target():
    """HLLM: IDs and times are summed into the User LLM's input, targets stay pure item vectors."""
    torch.manual_seed(0)
    features = EventFeatures(16, "day", 4, items=9)
    user = DecoderUser(build_decoder(Decoder(width=16), 64), 8, features).eval()
    model = Recommender(IdItems(9, 8), user, 0.07)
    times = 1_500_000_000 + 86_400 * np.arange(6)
    history = History(Packing(np.array([2, 3])), np.array([1, 1, 2, 1, 2]), times[:-1], times[1:])
    targets, negatives = np.array([3, 4, 5, 6, 3]), np.array([7, 8])
    batch = Batch(history, targets, negatives, np.zeros((2, 2), bool), targets, negatives)

    def loss_with(known: list[int]) -> float:
        with torch.no_grad():
            features.ids.zero_()[known] = torch.randn(16, generator=torch.manual_seed(1))
            return float(model.loss(batch))

    assert loss_with([3, 4, 5, 6, 7, 8]) == loss_with([])
    assert loss_with([1]) != loss_with([])
