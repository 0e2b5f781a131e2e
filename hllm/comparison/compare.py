"""`hllm compare`: several models under one budget and the same seeds, and what sets them apart."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from hllm.comparison.file import Comparison, read
from hllm.comparison.result import Result, as_numbers, result_of
from hllm.comparison.work import Pipeline, jobs, pipelines, run
from hllm.errors import ConfigError
from hllm.work.artifacts import Manifest, Store, digest_of, file_digests, write_atomically

STEP = "compare"


def compare(
    path: Path, overrides: tuple[str, ...] = (), seeds: tuple[int, ...] = (), dry_run: bool = False
) -> Path | None:
    """Train and evaluate what is not done yet, then write the table and the page, and log both to MLflow.

    `overrides` (`a.b=c`) go to every model; `seeds`, if any, are taken instead of the file's.

    Raises:
        ConfigError, DataError, InfraError: the file is wrong, or a step failed; the same command goes on.
        Terminated: SIGTERM arrived; the same command goes on.
    """
    comparison = read(path, overrides, seeds)
    found = pipelines(comparison)
    _same_headline(path, found)
    if dry_run:
        _say_plan(comparison, found)
        return None
    _run_all(comparison, found)
    result = result_of(comparison, found)
    folder = _write(result, found)
    from hllm.comparison.record import record

    record(result, found, folder)
    from hllm.comparison.table import text_table

    typer.echo("")
    typer.echo(text_table(result))
    typer.echo(f"compare: done -> {folder / 'index.html'}")
    return folder


def _run_all(comparison: Comparison, found: list[Pipeline]) -> None:
    work = [job for job, manifest in jobs(found) if manifest is None]
    for number, job in enumerate(work, start=1):
        typer.echo(f"[{number}/{len(work)}] {job}")
        run(comparison, job)
        if job.step == "evaluate":
            _say_figures(comparison, job.pipeline)


def _say_plan(comparison: Comparison, found: list[Pipeline]) -> None:
    from tabulate import tabulate

    rows = [
        (
            job.step,
            f"done in {manifest.seconds:.0f} s" if manifest else "to do",
            job.pipeline.entry.name,
            job.pipeline.seed,
            job.pipeline.keys[job.step],
        )
        for job, manifest in jobs(found)
    ]
    typer.echo(f"{comparison.title}: {len(comparison.entries)} models, {len(comparison.seeds)} seeds")
    typer.echo(tabulate(rows, headers=("step", "state", "first for", "seed", "key"), disable_numparse=True))


def _say_figures(comparison: Comparison, pipeline: Pipeline) -> None:
    metrics = json.loads((pipeline.folder("evaluate") / "metrics.json").read_text("utf-8"))
    overall = metrics["models"][pipeline.entry.label]["overall"][metrics["headline"]]
    shown = ", ".join(
        f"{metric} {overall[metric.name]['value']:.4f}"
        for metric in comparison.metrics
        if not metric.segment and metric.name in overall
    )
    typer.echo(f"{pipeline.entry.name}, seed {pipeline.seed}: {shown}")


def _same_headline(path: Path, found: list[Pipeline]) -> None:
    filters = {pipeline.settings.evaluation.filter_history for pipeline in found}
    if len(filters) > 1:
        raise ConfigError("the models differ in evaluation.filter_history", where=path)


def _write(result: Result, found: list[Pipeline]) -> Path:
    """results.json, table.md and index.html, as an output with a manifest."""
    from hllm.comparison.page import page
    from hllm.comparison.table import markdown_table

    comparison = result.comparison
    store = Store(found[0].settings.run.root)
    key = comparison_key(comparison, found)
    folder = store.folder(STEP, key)
    numbers = json.dumps(as_numbers(result), indent=1, ensure_ascii=False)
    write_atomically(folder / "results.json", numbers.encode())
    write_atomically(folder / "table.md", markdown_table(result).encode())
    write_atomically(folder / "index.html", page(result, found).encode())
    files = file_digests(folder)
    manifest = Manifest(
        step=STEP,
        key=key,
        settings_digest=key,
        code_version=found[0].finished("evaluate").code_version,
        created_at=found[-1].finished("evaluate").created_at,
        seconds=0.0,
        digest=digest_of(files),
        rows={"models": len(comparison.entries), "seeds": len(comparison.seeds)},
        files=files,
    )
    store.finish(manifest)
    return folder


def comparison_key(comparison: Comparison, found: list[Pipeline]) -> str:
    """The same models, seeds and metrics have the same key."""
    return digest_of(
        {
            "name": comparison.name,
            "models": [(one.entry.name, one.entry.label, one.seed, one.keys["evaluate"]) for one in found],
            "metrics": [str(metric) for metric in comparison.metrics],
            "reference": comparison.reference,
        }
    )
