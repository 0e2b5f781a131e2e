"""A probe's output is what transformers computes for the history's first events and the probe after them; the
history's own outputs do not know that it is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hllm.models.common.history import UNKNOWN_TIME
from hllm.models.common.packing import Packing, run_packed
from hllm.models.hllm.probes import ProbedPacking, Probes
from tests.models.test_packing import pair  # noqa: F401

LENGTHS = np.array([1, 2, 2, 6, 6])
# (history, events read): several at one place, none for the second history, all places of one of them
PLACES = np.array([(0, 1), (0, 0), (2, 2), (2, 1), (2, 2), (3, 1), (3, 3), (3, 6), (4, 6), (4, 2), (4, 5)])


def probes(places: np.ndarray = PLACES) -> Probes:
    nothing = np.full(len(places), UNKNOWN_TIME)
    return Probes(places[:, 0], places[:, 1], np.arange(len(places)), nothing)


def test_every_probe_equals_its_history_with_it_appended_in_transformers(pair):  # noqa: F811
    packed, plain = pair
    events, appended = torch.randn(int(LENGTHS.sum()), 32), torch.randn(len(PLACES), 32)
    packing = ProbedPacking(Packing(LENGTHS), probes(), torch.device("cpu"))
    histories = events.split(LENGTHS.tolist())
    with torch.no_grad():
        together = run_packed(packed, torch.cat([events, appended]), packing)
        for row, (history, reads) in enumerate(PLACES):
            alone = torch.cat([histories[history][:reads], appended[row : row + 1]])
            expected = plain(inputs_embeds=alone[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(together[len(events) + row], expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(together[: len(events)], run_packed(packed, events, Packing(LENGTHS)))


def test_a_probe_learns_through_what_it_reads_and_through_nothing_else(pair):  # noqa: F811
    packed, _ = pair
    events = torch.randn(int(LENGTHS.sum()), 32, requires_grad=True)
    appended = torch.randn(len(PLACES), 32, requires_grad=True)
    packing = ProbedPacking(Packing(LENGTHS), probes(), torch.device("cpu"))
    run_packed(packed, torch.cat([events, appended]), packing)[len(events) + 9].sum().backward()
    assert events.grad is not None
    assert appended.grad is not None
    start = int(LENGTHS[:4].sum())  # probe 9 reads two events of the last history
    read = {start, start + 1}
    window = getattr(packed.config, "sliding_window", None)
    assert window is None or window > 2
    assert set(torch.nonzero(events.grad.abs().sum(1)).flatten().tolist()) == read
    assert torch.nonzero(appended.grad.abs().sum(1)).flatten().tolist() == [9]


def test_probes_out_of_order_are_refused():
    packing = ProbedPacking(Packing(LENGTHS), probes(PLACES[::-1].copy()), torch.device("cpu"))
    with pytest.raises(ValueError, match="sorted by the history"):
        _ = packing.runs
