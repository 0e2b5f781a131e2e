"""One command, several processes: a step that asks for them starts `torchrun` on itself.

`hllm train` on a machine with four GPUs runs as four processes, and as eight on two such machines, if the
pods (or the shell) say where the first is: as Kubeflow's TrainJob does (PET_NNODES, PET_NODE_RANK,
PET_MASTER_ADDR, PET_MASTER_PORT), or with RANK and WORLD_SIZE counting machines, MASTER_ADDR and MASTER_PORT.
A process that `torchrun` has started already is told its place and starts nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from hllm.errors import HLLMError, InfraError, Terminated
from hllm.settings import Runner, Settings
from hllm.work.ranks import GONE, mortal, told

TELLING = (64, 65, 66, 75)
"""Exit codes that say what happened; the other processes then die of it in their own ways."""


class ProcessFailed(HLLMError):
    """One of the processes of a step failed: its own message, its own exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def wanted(settings: Settings) -> int:
    """How many processes this machine should run; 0 when this process is to do it alone, or is one of
    them."""
    if told():
        return 0
    count = settings.run.processes
    if not count:
        import torch

        count = max(1, torch.cuda.device_count())
    return count if count > 1 or machines() > 1 else 0


def machines(environ: dict[str, str] | os._Environ[str] = os.environ) -> int:
    """How many machines work together, as far as the environment says."""
    text = environ.get("PET_NNODES") or environ.get("WORLD_SIZE") or "1"
    return int(text.rpartition(":")[2])


def run(count: int, argv: Sequence[str], runner: Runner) -> None:
    """`python -m hllm.cli ARGV` in `count` processes of this machine, until all have ended well.

    Raises:
        InfraError: another machine did not come, or was lost while they met.
        ProcessFailed: with the exit code of the one that failed first.
        Terminated: SIGTERM came; the processes have written their checkpoint.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    with tempfile.TemporaryDirectory(prefix="hllm-") as folder:
        leave, os.environ["HLLM_TERMINATION_LOG"] = os.environ.get("HLLM_TERMINATION_LOG"), f"{folder}/last"
        os.environ["HLLM_LAUNCHED"] = "1"
        program = ["-m", "hllm.cli", *argv]
        arguments = [
            f"--nproc-per-node={count}",
            f"--shutdown-timeout={runner.grace_seconds}",
            *_meeting_place(round(runner.start_minutes * 60)),
            *program,
        ]
        try:
            config, command, rest = config_from_args(get_args_parser().parse_args(arguments))
            with mortal():  # until torchrun listens itself
                elastic_launch(config, command)(*rest)
        except ChildFailedError as error:
            said = {rank: _last_line(Path(f"{folder}/last.{rank}")) for rank in error.failures}
            rank, failure = min(
                error.failures.items(),
                key=lambda item: (
                    GONE in said[item[0]],
                    item[1].exitcode == Terminated.exit_code,  # torchrun stops those that are left
                    item[1].exitcode not in TELLING,
                    item[1].timestamp,
                ),
            )
            if failure.exitcode == Terminated.exit_code:
                raise Terminated from None
            message = said[rank] or "it left no message"
            exit_code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            raise ProcessFailed(f"process {rank} of {count}: {message}", exit_code) from None
        except SignalException:
            raise Terminated from None
        except DistError as error:
            why = str(error).partition("\n")[0]
            raise InfraError(
                f"the {machines()} machines of this step did not meet: {why}",
                remedy="Each waits runner.start_minutes for the others; the missing one's own log says why.",
            ) from error
        finally:
            del os.environ["HLLM_LAUNCHED"], os.environ["HLLM_TERMINATION_LOG"]
            if leave is not None:
                os.environ["HLLM_TERMINATION_LOG"] = leave


def _last_line(left: Path) -> str:
    """What a process left as its reason; nothing, where it was killed."""
    return left.read_text("utf-8").partition("\n")[0] if left.exists() else ""


def _meeting_place(patience_seconds: int) -> list[str]:
    if machines() == 1:
        return ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
    patience = f"--rdzv-conf=timeout={patience_seconds}"
    if "PET_NNODES" in os.environ:
        return [patience]  # torchrun reads the rest by itself
    return [
        patience,
        f"--nnodes={os.environ['WORLD_SIZE']}",
        f"--node-rank={os.environ.get('RANK', '0')}",
        f"--master-addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
        f"--master-port={os.environ.get('MASTER_PORT', '29500')}",
    ]


def die_with_parent() -> None:
    """Linux: SIGTERM when torchrun is gone, so that a retry does not find its output locked by an orphan."""
    if sys.platform == "linux" and "HLLM_LAUNCHED" in os.environ:
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
