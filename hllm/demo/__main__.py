"""`python -m hllm.demo`: the real DAGs, start to champion. `python -m hllm.demo --ui`: both web pages."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from hllm import settings as settings_module
from hllm.demo.api import Api
from hllm.demo.follow import Approver, follow, release_run
from hllm.demo.preflight import preflight
from hllm.demo.services import (
    ROOT,
    Airflow,
    Processes,
    end_leftovers,
    processes,
    running_airflow,
    start_airflow,
    start_mlflow,
)
from hllm.demo.summary import summary
from hllm.errors import HLLMError
from hllm.settings import Settings


def demo(settings: Settings, config: str, home: Path) -> None:
    """Train, register, approve, publish and promote with Airflow; then show what came out."""
    began = time.monotonic()
    say = _say
    say(f"HLLM demo: {config}, outputs in {settings.run.root}, Airflow in {home}")
    say(f"machine: {preflight(settings, home)}")
    with processes(home / "services") as group:
        airflow = _airflow(group, settings, config, home)
        api = Api(airflow)
        if airflow.pid == os.getpid():
            _clear_the_way(api)
        say("hllm_train:")
        run = api.trigger("hllm_train", {"config": config})
        follow(api, "hllm_train", run, home, say)
        if _candidate_announced(api, run):
            say("hllm_release:")
            release = release_run(api, run)
            approver = Approver(Api(airflow, settings.release.approved_by), settings, release, say)
            follow(api, "hllm_release", release, home, say, approver)
            if api.task_state("hllm_release", release, "promote") != "success":
                say("the candidate was rejected: nothing was published, the champion stays")
        else:
            say("hllm_release: not started, this version serves already")
        summary(settings, airflow.url, say)
        say(f"\nthe run took {time.monotonic() - began:.0f} s")


def ui(settings: Settings, config: str, home: Path) -> None:
    """Airflow and MLflow until Ctrl-C."""
    with processes(home / "services") as group:
        airflow = _airflow(group, settings, config, home)
        mlflow = start_mlflow(group, settings)
        _say(f"Airflow    {airflow.url}   user admin, password {_password(airflow)}")
        _say(f"MLflow     {mlflow}/#/models/{settings.mlflow.model_name}")
        _say("Ctrl-C stops both.")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                group.check()
                time.sleep(1)
        _say("\nstopping")


def _airflow(group: Processes, settings: Settings, config: str, home: Path) -> Airflow:
    found = running_airflow(home)
    if found:
        _say(f"Airflow runs already: {found.url}")
        return found
    left = end_leftovers(home / "services")
    if left:
        _say(f"ended {left} processes that an earlier run had left behind")
    began = time.monotonic()
    found = start_airflow(group, settings, config, home)
    _say(
        f"Airflow: web server, scheduler, DAG processor at {found.url} after {time.monotonic() - began:.0f} s"
    )
    return found


def _clear_the_way(api: Api) -> None:
    """Runs that an interrupted demo left half done would hold the next one up; finished steps are reused."""
    for dag in ("hllm_train", "hllm_release"):
        for run in api.active_runs(dag):
            api.give_up(dag, run)
            _say(f"{dag}: gave up the interrupted run {run}")


def stop(home: Path) -> None:
    """End a `make ui` or `make demo` that runs somewhere else, and whatever a killed one left."""
    found = running_airflow(home)
    if found:
        with contextlib.suppress(psutil.NoSuchProcess):
            owner = psutil.Process(found.pid)
            owner.terminate()
            owner.wait(60)
    left = end_leftovers(home / "services")
    _say("stopped" if found or left else "nothing was running")


def _candidate_announced(api: Api, run: str) -> bool:
    return api.task_state("hllm_train", run, "register") == "success"


def _password(airflow: Airflow) -> str:
    """Shown to a person at a terminal; a log gets the file's name only."""
    if sys.stdout.isatty():
        return str(json.loads(airflow.passwords.read_text("utf-8"))["admin"])
    return f"in {airflow.passwords}"


def _say(line: str) -> None:
    print(line, flush=True)


def main(
    config: Annotated[str, typer.Option("--config", "-c", help="Settings file.")] = "configs/demo.toml",
    show: Annotated[bool, typer.Option("--ui", help="Only start both web pages, until Ctrl-C.")] = False,
    end: Annotated[bool, typer.Option("--stop", help="Only end what an earlier run left running.")] = False,
    home: Annotated[Path, typer.Option(help="Airflow's folder: database, logs, passwords.")] = Path(
        "runs/airflow"
    ),
) -> None:
    os.chdir(ROOT)
    try:
        if end:
            stop(home.resolve())
        else:
            (ui if show else demo)(settings_module.load(config), config, home.resolve())
    except HLLMError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the next run continues where this one was", err=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    typer.run(main)
