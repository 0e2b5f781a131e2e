"""`hllm plan`: the steps, what is cached, and what would run."""

from __future__ import annotations

import typer
from tabulate import tabulate

from hllm.errors import HLLMError
from hllm.pipeline import keys, pipeline_key, steps
from hllm.settings import Settings
from hllm.work import costs
from hllm.work.artifacts import Store
from hllm.work.objects import read_object

RELEASE = {"register": "evaluate", "publish": "approval", "verify": "publish", "promote": "verify"}
"""What acts on services -> what it waits for."""


def plan(settings: Settings) -> None:
    """Print it. MLflow is asked only about a pipeline that was registered; a line says if it is away."""
    store, all_keys = Store(settings.run.root), keys(settings)
    pipeline = pipeline_key(all_keys)
    rows, expected, unknown = [], [], []
    for step in steps(settings).values():
        manifest = store.manifest(step.name, all_keys[step.name])
        state = f"done {manifest.created_at}" if manifest else "to do"
        took = f"{manifest.seconds:.0f} s" if manifest else ""
        if manifest is None:
            if guess := costs.estimate(settings, store, step.name):
                expected.append(guess)
                took = f"about {guess[0]:.0f} s"
            else:
                unknown.append(step.name)
        rows.append(
            (
                step.name,
                state,
                took,
                all_keys[step.name],
                f"hllm {' '.join(step.argv)}",
            )
        )
    states, problem = {}, ""
    if _was_registered(store, pipeline):
        try:
            states = _release_states(settings, pipeline)
        except HLLMError as error:
            states, problem = dict.fromkeys(RELEASE, "unknown"), error.first_line
    for command, before in RELEASE.items():
        rows.append((command, states.get(command, f"after {before}"), "", "", f"hllm {command}"))
    typer.echo(f"pipeline {pipeline} of {settings.run.name}, outputs in {settings.run.root}")
    typer.echo(tabulate(rows, headers=("step", "state", "took", "key", "command")))
    if expected:
        typer.echo(_expectation(settings, expected, unknown))
    if problem:
        typer.echo(f"unknown: {problem}")


def _expectation(settings: Settings, expected: list[tuple[float, float, float]], unknown: list[str]) -> str:
    """What the steps that are to do may cost, as far as earlier runs tell."""
    seconds, machine_seconds, gpu_seconds = (sum(parts) for parts in zip(*expected, strict=True))
    said = f"to do: about {seconds:.0f} s"
    if gpu_seconds:
        said += f", {gpu_seconds / 3600:.2f} GPU hours"
    if cost := costs.price(settings.report, machine_seconds, gpu_seconds):
        said += f", {cost:.4f} {settings.report.currency}"
    said += ", by the newest earlier run of each step"
    return said + (f"; never run here: {', '.join(unknown)}" if unknown else "")


def _was_registered(store: Store, pipeline: str) -> bool:
    """`hllm register` leaves a record: without one, MLflow, whose import takes seconds, is not asked."""
    if store.remote:
        return read_object(f"{store.location('register', pipeline)}/registered.json") is not None
    return (store.folder("register", pipeline) / "registered.json").exists()


def _release_states(settings: Settings, pipeline: str) -> dict[str, str]:
    """Command -> its state, by the tags of the version that the pipeline registered; only what has begun."""
    from hllm.registry import versions

    info = versions.version_of_pipeline(settings, pipeline)
    if info is None:  # another MLflow than the one it was registered in, or somebody deleted the version
        return {"register": "to do"}
    states = {"register": f"done: version {info.version}, gate {info.tags.get('gate', 'unknown')}"}
    publication, decision = info.tags.get("publication"), info.tags.get("decision")
    if publication == "publishing":
        states["publish"] = "to do: begun, or found damaged"
    elif publication in ("published", versions.VERIFIED):
        states |= {"publish": "done", "verify": "done" if info.verified else "to do"}
    serving = versions.serving_version(settings)
    if serving and serving.version == info.version:
        states["promote"] = "done: it serves"
    elif decision == "rolled back":
        states["promote"] = f"rolled back by {info.tags.get('rolled_back_by', '?')}"
    elif decision == "rejected":
        states["promote"] = f"rejected by {info.tags.get('decided_by', '?')}"
    elif decision == "approved" and serving:
        by = info.tags.get("decided_by", "?")
        states["promote"] = f"approved by {by}, but version {serving.version} serves"
    elif info.verified:
        states["promote"] = "to do"
    return states
