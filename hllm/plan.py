"""`hllm plan`: the steps, what is cached, and what would run."""

from __future__ import annotations

import typer
from tabulate import tabulate

from hllm.artifacts import Store
from hllm.settings import Settings
from hllm.steps import keys, pipeline_key, steps


def plan(settings: Settings) -> None:
    store, all_keys = Store(settings.run.root), keys(settings)
    rows = []
    for step in steps(settings).values():
        manifest = store.manifest(step.name, all_keys[step.name])
        state = f"done {manifest.created_at}" if manifest else "to do"
        rows.append(
            (
                step.name,
                state,
                f"{manifest.seconds:.0f} s" if manifest else "",
                all_keys[step.name],
                f"hllm {' '.join(step.argv)}",
            )
        )
    for command, after in (
        ("register", "evaluate"),
        ("publish", "approval"),
        ("verify", "publish"),
        ("promote", "verify"),
    ):
        rows.append((command, f"after {after}", "", "", f"hllm {command}"))
    typer.echo(f"pipeline {pipeline_key(all_keys)} of {settings.run.name}, outputs in {settings.run.root}")
    typer.echo(tabulate(rows, headers=("step", "state", "took", "key", "command")))
