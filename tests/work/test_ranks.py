"""Who does what when several processes compute one step."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hllm.errors import InfraError
from hllm.work import ranks
from hllm.work.ranks import Place, any_of, barrier, joined, place, told, total, turns
from tests.training.world import on_ranks


@pytest.mark.parametrize("count", [0, 1, 5, 6])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_piece_of_work_is_done_once_and_all_processes_take_as_many_turns(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    dealt = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "_place", Place(rank, size, rank))
        dealt.append(list(turns(count)))
    assert sorted(number for own in dealt for number, mine in own if mine) == list(range(count))
    assert len({len(own) for own in dealt}) == 1
    assert all(0 <= number < count for own in dealt for number, _ in own)


def test_a_process_by_itself_is_the_first_of_one_and_waits_for_nobody():
    with joined() as alone:
        assert alone == place() == Place(0, 1, 0)
        values = np.arange(3)
        assert total(values) is values
        assert (any_of(True), any_of(False)) == (True, False)


def test_deepspeed_can_be_alone():
    import torch.distributed as dist

    with joined(alone_too=True) as alone:
        assert alone == Place(0, 1, 0)
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_a_number_of_machines_is_no_place():
    assert told({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert not told({"RANK": "0", "WORLD_SIZE": "2"})


def one_leaves(folder: Path) -> None:
    with pytest.raises(InfraError, match=r"^another process of this step is gone: .*(reset|closed)"):
        meet_twice()


def meet_twice() -> None:
    with joined() as here:
        barrier()
        if not here.first:
            os._exit(0)
        barrier()


def test_whoever_is_left_says_that_another_is_gone(tmp_path: Path):
    on_ranks(f"{__name__}:one_leaves", tmp_path)


def start_apart(folder: Path) -> None:
    """As machines do whose linear algebra rounds differently."""
    from hllm.settings import Stage
    from hllm.training.updates import Everywhere
    from tests.training.world import tiny_model

    with joined() as here:
        model = tiny_model(30)
        for parameter in model.parameters():
            parameter.data += here.rank
        Everywhere(model, Stage(), bf16=False)
        weights = [value.double().sum() for value in model.state_dict().values()]
        for mine, both in zip(weights, [total(value.clone()) for value in weights], strict=True):
            assert both == 2 * mine


def test_plain_data_parallelism_starts_from_the_weights_of_the_first_process(tmp_path: Path):
    on_ranks("tests.work.test_ranks:start_apart", tmp_path)
