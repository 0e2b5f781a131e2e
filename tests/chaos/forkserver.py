"""Commands in forks of a process that has imported everything: a try costs what the command itself takes.

The process that forks must have no thread of its own, or a lock that another thread holds stays locked in
the child for ever. So nothing here queries DuckDB or computes with torch; the threads are counted.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # set: the command does not start itself again with another allocator
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "TQDM_DISABLE": "1",
    "RCLONE_DIR_CACHE_TIME": "20ms",  # worlds are put back behind the S3 server's back
}
FIRST = ("pyarrow", "pandas", "torch", "duckdb", "mlflow", "feast", "great_expectations", "boto3", "hllm.cli")


@dataclass(frozen=True)
class Job:
    """A command line, or a function of no arguments, in a child."""

    argv: tuple[str, ...] = ()
    act: Callable[[], Any] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[], None] | None = None
    """Called in the child before the command begins: counts writes, shifts the clock."""


@dataclass(frozen=True)
class Ended:
    """`code` as a shell sees it: 137 for SIGKILL, 143 for SIGTERM."""

    code: int
    output: str
    seconds: float


class ForkServer:
    """Imports once; `run` forks."""

    def __init__(self, scratch: Path) -> None:
        assert set(QUIET.items()) <= set(os.environ.items()), "start this process with QUIET"
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._modules = scratch / "modules.json"
        importlib.import_module(FIRST[0])
        self._threads = threads()  # Arrow's allocator has one, and looks after it in forks
        for name in FIRST:
            importlib.import_module(name)
            self._check(name)

    def learn(self) -> None:
        """Import what the last command has imported."""
        for name in json.loads(self._modules.read_text()) if self._modules.exists() else ():
            if name not in sys.modules and not name.startswith(("tests.", "__")):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
                self._check(name)

    def run(
        self, job: Job, after: float | None = None, how: int = signal.SIGKILL, limit: float = 150
    ) -> Ended:
        """Until it has ended; `after` so many seconds it is sent the signal `how`."""
        log, began = self.scratch / "output.log", time.monotonic()
        self._modules.unlink(missing_ok=True)
        # This process's own handler must not run in the child: it would take the worlds down.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        child = os.fork()
        if child == 0:
            self._be(job, log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        status, sent = 0, after is None
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            passed = time.monotonic() - began
            if not sent and after is not None and passed >= after:
                os.kill(child, how)
                sent = True
            if passed > limit:  # it hangs, and says where
                os.kill(child, signal.SIGUSR1)
                time.sleep(0.5)
                os.kill(child, signal.SIGKILL)
                limit = float("inf")
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # whatever it had started, as a container's end would
        code = os.waitstatus_to_exitcode(status)
        said = log.read_text("utf-8", "replace") if log.exists() else ""
        return Ended(128 - code if code < 0 else code, said, time.monotonic() - began)

    def call(self, act: Callable[[], Any]) -> Any:
        """What a function gives in a child, as JSON."""
        result = self.scratch / "result.json"
        result.unlink(missing_ok=True)
        ended = self.run(Job(act=lambda: result.write_text(json.dumps(act()))))
        if ended.code:
            raise RuntimeError(ended.output[-3000:])
        return json.loads(result.read_text())

    def _check(self, name: str) -> None:
        if threads() > self._threads:
            raise RuntimeError(f"importing {name} has started a thread: cannot fork safely")

    def _be(self, job: Job, log: Path) -> None:
        """Be the command, and end: a signal at the very last must not unwind into the suite's own frames."""
        code = 70
        try:
            code = self._act(job, log)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os._exit(code)

    def _act(self, job: Job, log: Path) -> int:
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faulthandler.register(signal.SIGUSR1)
            os.environ.update(job.environment)
            random.seed()
            sys.argv = ["hllm", *job.argv]
            if job.prepare:
                job.prepare()
            if job.act:
                job.act()
            else:
                from hllm.cli import main

                main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else bool(leaving.code)
        except BaseException:
            traceback.print_exc()
        if job.argv:
            with contextlib.suppress(OSError):
                self._modules.write_text(json.dumps(sorted(sys.modules)))
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        return code


def threads() -> int:
    return len(os.listdir("/proc/self/task"))
