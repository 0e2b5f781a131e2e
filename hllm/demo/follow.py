"""Following a DAG run from outside: one line per task as it ends, and the answer to an approval."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from hllm.demo.api import FINISHED, Api
from hllm.errors import HLLMError, InfraError
from hllm.settings import Settings

POLL_SECONDS = 1.0
ANSWER_AFTER_SECONDS = 5.0
"""Airflow hears up to a heartbeat (2 s here) later that the asking process has ended. An answer that comes
sooner starts the task again, the old end is taken for the end of the new start, and the task fails."""


class Stopped(HLLMError):
    """A task of the run failed; carries its command's exit code."""

    def __init__(self, what: str, exit_code: int, log: Path | str) -> None:
        super().__init__(what, remedy=f"Its log: {log}")
        self.exit_code = exit_code


def follow(
    api: Api,
    dag: str,
    run: str,
    home: Path,
    say: Callable[[str], Any],
    meanwhile: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Say a line for every task that ends; return when the run has succeeded.

    Raises:
        Stopped: the run failed.
    """
    seen: set[str] = set()
    retried: set[tuple[str, int]] = set()
    while True:
        state = api.run_state(dag, run)  # before the tasks: a finished run has no task left to see
        for task in sorted(api.tasks(dag, run), key=lambda task: task["end_date"] or ""):
            name = task["task_id"]
            if task["state"] == "up_for_retry" and (name, task["try_number"]) not in retried:
                retried.add((name, task["try_number"]))
                say(f"  {name:<16} tries again by itself: {api.ended(dag, run, name).get('line', '')}")
            if task["state"] in FINISHED and name not in seen:
                seen.add(name)
                _tell(api, dag, run, task, home, say)
            elif meanwhile:
                meanwhile(task)
        if state == "success":
            return
        if state == "failed":
            raise Stopped(
                f"{dag} failed", HLLMError.exit_code, home / "logs" / f"dag_id={dag}" / f"run_id={run}"
            )
        time.sleep(POLL_SECONDS)


def _tell(api: Api, dag: str, run: str, task: dict[str, Any], home: Path, say: Callable[[str], Any]) -> None:
    name, state = task["task_id"], task["state"]
    ended = api.ended(dag, run, name)
    line = str(ended.get("line", "")).removeprefix(f"{name}: ")
    if state == "failed":
        log = (
            home
            / "logs"
            / f"dag_id={dag}"
            / f"run_id={run}"
            / f"task_id={name}"
            / f"attempt={task['try_number']}.log"
        )
        raise Stopped(f"{name}: {line or 'failed'}", ended.get("exit_code") or HLLMError.exit_code, log)
    if state == "success" or (state == "skipped" and line):
        say(f"  {name:<16} {_seconds(task):>6.1f} s  {line or 'done'}")


def _seconds(task: dict[str, Any]) -> float:
    if not task["start_date"] or not task["end_date"]:
        return 0.0
    started, ended = (datetime.fromisoformat(task[key]) for key in ("start_date", "end_date"))
    return (ended - started).total_seconds()


def release_run(api: Api, train_run: str, seconds: float = 30.0) -> str:
    """The release that the candidate of a training run has started.

    Raises:
        InfraError: none was started.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = api.runs_started_by("hllm_release", train_run)
        if found:
            return found[0]
        time.sleep(POLL_SECONDS)
    raise InfraError("the candidate has started no release", where=api.url, remedy="Is hllm_release paused?")


class Approver:
    """Watches for the approval request: answers it if the settings say so, else says where a person can."""

    def __init__(self, api: Api, settings: Settings, run: str, say: Callable[[str], Any]) -> None:
        self.api, self.settings, self.run, self.say = api, settings, run, say
        self._asked: dict[int, float] = {}
        """Number of the try -> when its request was first seen: a try that went wrong asks again."""
        self._answered: set[int] = set()

    def __call__(self, task: dict[str, Any]) -> None:
        attempt = task["try_number"]
        if task["task_id"] != "approve" or task["state"] != "awaiting_input" or attempt in self._answered:
            return
        release = self.settings.release
        if attempt not in self._asked:
            self._asked[attempt] = time.monotonic()
            page = f"/dags/hllm_release/runs/{self.run}/tasks/approve/required_actions"
            self.say(f"  approve          a person is asked: {self.api.url}{page}")
            if not release.approve_automatically:
                self.say(f"{'':<18} waiting for an answer, at most {release.timeout_hours:g} hours")
        if release.approve_automatically and time.monotonic() - self._asked[attempt] >= ANSWER_AFTER_SECONDS:
            self.api.approve("hllm_release", self.run, "approve", "release.approve_automatically is true")
            name = release.approved_by
            self.say(
                f"  approve          answered in the name {name!r}: release.approve_automatically is true"
            )
            self._answered.add(attempt)
