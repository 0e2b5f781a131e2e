"""How a task runs one `hllm` command. DAGs ask `hllm_task`, whatever runner the settings chose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from hllm.settings import Settings
from wiring import form
from wiring.form import ROOT

RETRY_HELPS = {75, 128 + signal.SIGTERM, 128 + signal.SIGKILL}
"""InfraError, and commands stopped from outside: the next try continues from a checkpoint."""

Environment = Callable[[Context], Mapping[str, str]]
"""What a command finds in its environment, known when the task runs."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its code, one line for people, and the JSON it left for later tasks, if any."""

    exit_code: int
    line: str
    result: str = ""


class LocalProcess:
    """One command as a process of its own, its output passed on line by line."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, argv: Sequence[str], environment: Mapping[str, str], say: Callable[[str], Any]) -> Ended:
        """Start it, say its lines as they come, wait for its end."""
        with tempfile.TemporaryDirectory(prefix="hllm-") as folder:
            words = Path(folder, "last-words")
            words.touch()
            # A session of its own: whoever kills the task's process group leaves it time for a checkpoint.
            self._process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={
                    **os.environ,
                    **environment,
                    "PYTHONUNBUFFERED": "1",
                    "HLLM_TERMINATION_LOG": str(words),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if self._stopped:
                self.stop()
            last = ""
            for content in self._process.stdout or ():
                line = content.decode("utf-8", "replace").rstrip("\r\n")
                last = (
                    last if not line or line[0].isspace() else line
                )  # indented lines explain the one before
                say(line)
            code = self._process.wait()
            exit_code = 128 - code if code < 0 else code
            line, _, result = words.read_text("utf-8", "replace").strip().partition("\n")
            return Ended(exit_code, line or last, result)

    def stop(self) -> None:
        """Ask it to stop. It finishes its unit of work and checkpoints; `run` waits for that."""
        self._stopped = True
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


class LocalStep(BaseOperator):
    """One `hllm` command on the machine of the Airflow worker."""

    ui_color = "#e8f0fe"

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Environment,
        on_result: Callable[[Context, str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.command = list(command)
        self.environment = environment
        self.on_result = on_result
        self.process = LocalProcess()

    def execute(self, context: Context) -> None:
        # The `hllm` of this very environment, whatever PATH says.
        argv = [str(Path(sys.executable).with_name("hllm")), *self.command]
        environment = self.environment(context)
        self.log.info("hllm %s with %s", " ".join(self.command), ", ".join(sorted(environment)))
        ended = self.process.run(argv, environment, self.log.info)
        # For people and for whoever follows the run; no task reads it.
        context["ti"].xcom_push("ended", {"exit_code": ended.exit_code, "line": ended.line})
        if ended.exit_code:
            raise failure(self.command, ended)
        if self.on_result:
            self.on_result(context, ended.result)

    def on_kill(self) -> None:
        self.process.stop()


def failure(command: Sequence[str], ended: Ended) -> AirflowException:
    """The exception that makes Airflow retry what a retry can mend, and fail at once what it cannot."""
    message = f"hllm {' '.join(command)} ended with {ended.exit_code}: {ended.line or 'it said nothing'}"
    return AirflowException(message) if ended.exit_code in RETRY_HELPS else AirflowFailException(message)


def of_the_form(context: Context) -> dict[str, str]:
    """The environment of a task that only the trigger form decides about."""
    return form.environment(context["params"])


def retries(settings: Settings) -> dict[str, Any]:
    """How every task of every DAG is tried again: the `default_args` of a DAG."""
    return {
        "retries": settings.runner.retries,
        "retry_delay": timedelta(seconds=15),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=15),
    }


def hllm_task(
    settings: Settings, task_id: str, command: Sequence[str], environment: Environment, **kwargs: Any
) -> BaseOperator:
    """The task for one command, by the runner that the settings chose."""
    if settings.runner.kind == "kubernetes":
        from wiring.nodes import NodesStep  # the provider is needed, and takes its time, only here
        from wiring.pod import PodStep

        asked = {"settings": settings, "task_id": task_id, "command": command, "environment": environment}
        nodes = settings.runner.pod_of(task_id).nodes
        return NodesStep(nodes=nodes, **asked, **kwargs) if nodes > 1 else PodStep(**asked, **kwargs)
    return LocalStep(task_id=task_id, command=command, environment=environment, **kwargs)
