"""The processes that compute one step together: one for each GPU, or as many as `run.processes` says.

All of them run the same step over the same inputs, each over its share; the first alone writes outputs, talks
to MLflow and decides what is there already. `torchrun` says who is who (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT); `hllm.work.launch` starts it. A process by itself is the first of one, and
nothing here costs it anything.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hllm.errors import InfraError

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others, which may be reading inputs or writing outputs."""

GONE = "another process of this step is gone"


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0


_place = Place()


def place() -> Place:
    return _place


def told(environ: Any = os.environ) -> bool:
    """Whether whoever started this process said which of several it is."""
    return "RANK" in environ and "LOCAL_RANK" in environ and "WORLD_SIZE" in environ


@contextmanager
def joined(alone_too: bool = False) -> Iterator[Place]:
    """Meet the other processes, if there are any, until the end of the block. `alone_too`: also set up
    `torch.distributed` for a process without others (DeepSpeed asks for it).

    Raises:
        InfraError: one of them is gone: it was killed, or its machine was lost.
    """
    global _place
    if not told() and not alone_too:
        yield _place
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if told():
        found = Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        if cuda:
            torch.cuda.set_device(found.local_rank % torch.cuda.device_count())
        with mortal():
            dist.init_process_group(backend, timeout=PATIENCE)
    else:
        found = Place()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    before, _place = _place, found
    try:
        yield found
    except RuntimeError as error:
        if not _of_another(error):
            raise
        said = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].partition("\n")[0]
        raise InfraError(f"{GONE}: {said}", remedy="Its own message, or its machine's, says why.") from error
    finally:
        _place = before
        if dist.is_initialized():
            dist.destroy_process_group()


def _of_another(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process. NCCL and the store have types of their own for
    it; gloo only says it in words."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)


@contextmanager
def mortal() -> Iterator[None]:
    """SIGTERM ends the process at once: waiting for one that never comes, it would not hear of it otherwise,
    and there is nothing to save yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def let_all_have(tensor: torch.Tensor) -> None:
    """In place: the first process's values, in every process."""
    if _place.size > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, 0)


def barrier() -> None:
    """Wait until every process is here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether it is true in any process: all go on with the same answer. Waits for no GPU."""
    if _place.size == 1:
        return flag
    import torch

    told = torch.tensor([int(flag)])
    return bool(total(told).item())


def total(values: Any) -> Any:
    """The sum over all processes, in place, of a tensor or an array. The same bits in every process."""
    if _place.size == 1:
        return values
    import numpy as np
    import torch
    import torch.distributed as dist

    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    dist.all_reduce(tensor)
    return values


def turns(count: int) -> Iterator[tuple[int, bool]]:
    """The share of `count` pieces of work, dealt like cards: (number, whether it is this process's).

    Every process gets equally many, as models whose weights are spread over the processes run in step: some
    do the last piece again, and are told that its result is not theirs to give.
    """
    for round_ in range(-(-count // _place.size)):
        number = round_ * _place.size + _place.rank
        yield min(number, count - 1), number < count
