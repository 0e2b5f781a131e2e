"""What the ID-based user models share, and HSTU against its formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hllm.models.common.history import UNKNOWN_TIME, History
from hllm.models.common.packing import Packing
from hllm.models.hstu.user import HSTUUser
from hllm.models.sasrec.user import SASRecUser

LENGTHS = np.array([1, 3, 3, 6])
START = 1_500_000_000


def histories(lengths: np.ndarray = LENGTHS, seed: int = 3) -> History:
    random = np.random.default_rng(seed)
    packing = Packing(lengths)
    times = [START + np.cumsum(random.integers(0, 10**6, length + 1)) for length in lengths]
    return History(
        packing,
        np.arange(packing.tokens),
        np.concatenate([part[:-1] for part in times]),
        np.concatenate([part[1:] for part in times]),
    )


def vectors(rows: int, seed: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.manual_seed(seed)), dim=-1)


def part_of(history: History, start: int, end: int) -> History:
    part = slice(start, end)
    return History(
        Packing(np.array([end - start])),
        history.items_T[part],
        history.times_T[part],
        history.next_times_T[part],
    )


@pytest.fixture(params=[SASRecUser, HSTUUser])
def user(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return request.param(8, 2, 2, 0.0, 6).eval()


def test_the_future_is_not_seen(user):
    history, before = histories(np.array([5])), vectors(5)
    changed = before.clone()
    changed[3:] = vectors(2, seed=9)
    torch.testing.assert_close(user(before, history)[:3], user(changed, history)[:3])
    assert (user(before, history)[3:] - user(changed, history)[3:]).abs().max() > 1e-4


def test_neighbours_do_not_matter(user):
    history, inputs = histories(), vectors(int(LENGTHS.sum()))
    ends = np.cumsum(LENGTHS)
    alone = [
        user(inputs[end - length : end], part_of(history, end - length, end))
        for length, end in zip(LENGTHS, ends, strict=True)
    ]
    torch.testing.assert_close(user(inputs, history), torch.cat(alone), atol=2e-6, rtol=1e-5)


def test_longer_histories_than_it_knows_are_refused(user):
    with pytest.raises(ValueError, match="a history of 7 events, the model knows 6 positions"):
        user(vectors(7), histories(np.array([7])))


def hstu_by_hand(user: HSTUUser, inputs: torch.Tensor, history: History) -> torch.Tensor:
    """One history, one position and head at a time, as the paper writes it."""
    length = len(inputs)
    hidden = inputs * user.input_scale + user.positions[user.max_history - length :]
    for block in user.blocks:
        gate, value, query, key = F.silu(block.projections(block.norm(hidden))).chunk(4, -1)
        attended = torch.zeros_like(value)
        width = value.shape[1] // block.heads
        for head in range(block.heads):
            columns = slice(head * width, (head + 1) * width)
            for i in range(length):
                for j in range(i + 1):
                    apart = abs(int(history.next_times_T[i]) - int(history.times_T[j]))
                    bucket = min(math.floor(math.log(max(apart, 1)) / 0.301), 128)
                    score = query[i, columns] @ key[j, columns]
                    score = score + block.position_bias[i - j] + block.time_bias[bucket]
                    attended[i, columns] += F.silu(score) / user.max_history * value[j, columns]
        hidden = hidden + block.out(gate * block.attended_norm(attended))
    return F.normalize(hidden, dim=-1)


def test_hstu_is_the_papers_formula():
    torch.manual_seed(1)
    user = HSTUUser(8, 2, 2, 0.0, 6).eval()
    with torch.no_grad():
        for block in user.blocks:
            block.time_bias.normal_()
            block.position_bias.normal_()
    history, inputs = histories(np.array([6])), vectors(6)
    torch.testing.assert_close(
        user(inputs, history), hstu_by_hand(user, inputs, history), atol=1e-6, rtol=1e-5
    )


def test_both_biases_of_hstu_are_used_and_learn():
    """In the public code they are built and left aside."""
    torch.manual_seed(1)
    user, history, inputs = HSTUUser(8, 2, 2, 0.0, 6), histories(), vectors(int(LENGTHS.sum()))
    (user(inputs, history) * vectors(len(inputs), seed=8)).sum().backward()
    for block in user.blocks:
        assert (block.position_bias.grad.abs() > 0).sum() == 6
        assert (block.time_bias.grad.abs() > 0).sum() > 3
    later = History(history.packing, history.items_T, history.times_T, history.next_times_T + 10**8)
    assert (user(inputs, later) - user(inputs, history)).abs().max() > 1e-5


def test_unknown_times_are_told_apart_from_nothing_but_times():
    torch.manual_seed(1)
    user, inputs = HSTUUser(8, 1, 2, 0.0, 6).eval(), vectors(3)
    unknown = History.without_times(Packing(np.array([3])), np.arange(3))
    at_once = History(unknown.packing, unknown.items_T, np.full(3, START), np.full(3, START))
    torch.testing.assert_close(user(inputs, unknown), user(inputs, at_once))
    assert UNKNOWN_TIME < 0
