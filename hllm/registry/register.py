"""`hllm register`: the gate, the report, and a version in MLflow that a person can decide about.

One pipeline has one version. Running it again finds that version; only a changed threshold or a new champion
makes the gate judge again, and never after a person has decided. A process killed in between leaves work that
the next run completes: the version is created with its tags in one request, so it is never found half made.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import hllm
from hllm.errors import DataError, GateError
from hllm.models.family import family
from hllm.pipeline import export_step, keys, pipeline_key, steps
from hllm.registry import versions
from hllm.registry.versions import CANDIDATE, VersionInfo
from hllm.report.description import describe
from hllm.serving.mlflow_model import log_package
from hllm.settings import Settings
from hllm.work import costs, tracking
from hllm.work import mlflow as server
from hllm.work.artifacts import Manifest, Store, digest_of, write_atomically
from hllm.work.objects import upload
from hllm.work.step import limit_threads, settings_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from hllm.evaluation.gate import Verdict

STEP = "register"


@dataclass(frozen=True)
class Registered:
    version: int
    run_id: str
    passed: bool


@dataclass(frozen=True)
class Finished:
    """Every finished output of one pipeline."""

    pipeline: str
    keys: Mapping[str, str]
    manifests: dict[str, Manifest]
    folders: dict[str, Path]
    export: str
    """Name of the export step."""


def register(settings: Settings) -> Registered:
    """Register the evaluated candidate.

    Raises:
        DataError: a step has not run with these settings.
        GateError: the candidate is not good enough; its version stands in MLflow and says why.
        InfraError: MLflow does not answer.
    """
    limit_threads(settings)
    client = server.client(settings)
    pipeline = pipeline_key(keys(settings))
    store = Store(settings.run.root)
    with store.lock(STEP, pipeline):
        finished = _finished(settings, store, pipeline)
        serving = versions.serving_version(settings)
        found = _whole(settings, store, finished, versions.version_of_pipeline(settings, pipeline))
        judged = _judgement(settings, finished, serving)
        known = found is not None and "gate" in found.tags and found.tags.get("judged") == judged
        if found and (known or "decided_by" in found.tags):
            _keep_record(settings, store, found)
            typer.echo(f"register: reused, {_says(found)}")
        else:
            gate = {"gate": settings.gate.model_dump(mode="json")}
            with tracking.child_run(settings, pipeline, STEP, gate) as tracker:
                version, passed = _judge_and_register(settings, store, client, finished, serving, found)
                verdict = "passed" if passed else "failed"
                tracker.note({"hllm.version": str(version), "hllm.gate": verdict})
            versions.set_tags(settings, version, {"judged": judged})  # last: from here on it is "reused"
            found = versions.registered_version(settings, str(version))
            _keep_record(settings, store, found)
            typer.echo(f"register: {_says(found)} -> {store.folder(STEP, pipeline) / 'report.html'}")
    passed = found.tags.get("gate") == "passed"
    if not passed and "decided_by" not in found.tags:
        raise GateError(
            f"version {found.version} did not pass: {found.tags.get('gate_reasons', '')}",
            where="gate",
            remedy=f"The version stays in MLflow with its report, {found.tags['report']}.",
        )
    return Registered(found.version, found.run_id, passed)


def _whole(
    settings: Settings, store: Store, finished: Finished, found: VersionInfo | None
) -> VersionInfo | None:
    """The version with the tags that say where its output and its report are, if a hand took them away."""
    if found is None:
        return None
    lost = {} if found.tags.get("report") else {"report": f"runs:/{found.run_id}/report.html"}
    try:
        found.output(settings)
    except DataError:
        lost["export"] = store.location(finished.export, finished.keys[finished.export])
    if not lost:
        return found
    versions.set_tags(settings, found.version, lost)
    return versions.registered_version(settings, str(found.version))


def _finished(settings: Settings, store: Store, pipeline: str) -> Finished:
    all_keys = keys(settings)
    folders = {name: store.fetch(name, all_keys[name], again=True) for name in steps(settings)}
    manifests = {name: manifest for name, folder in folders.items() if (manifest := Manifest.read(folder))}
    return Finished(pipeline, all_keys, manifests, folders, export_step(family(settings.model.family)))


def _judge_and_register(
    settings: Settings,
    store: Store,
    client: MlflowClient,
    finished: Finished,
    serving: VersionInfo | None,
    found: VersionInfo | None,
) -> tuple[int, bool]:
    """The version, and whether it passed the gate."""
    from hllm.evaluation.gate import judge
    from hllm.evaluation.names import ranking_metric

    metrics = json.loads((finished.folders["evaluate"] / "metrics.json").read_text("utf-8"))
    champion = _champion_entry(settings, store, finished, serving)
    verdict = judge(settings, metrics, champion[1] if champion else None)
    with server.mlflow_errors(settings):
        parent = tracking.parent_run(client, settings, finished.pipeline)
        experiment = client.get_run(parent).info.experiment_id
    page = f"#/experiments/{experiment}/runs/{parent}"
    ranking = _ranking(settings, finished, serving)
    report = _write_report(settings, store, finished, metrics, verdict, champion, ranking, page)
    with server.mlflow_errors(settings):
        _complete_parent(client, settings, finished, parent, metrics, verdict)
        for path in (
            report,
            finished.folders["validate"] / "validation.json",
            finished.folders["evaluate"] / "metrics.json",
            *([finished.folders["rank"] / "ranking.json"] if ranking else []),
        ):
            client.log_artifact(parent, str(path))
    description = describe(
        metrics,
        verdict,
        champion,
        finished.manifests | {"export": finished.manifests[finished.export]},
        metric=ranking_metric(settings.gate.metric, metrics["cutoffs"]),
        ranking=ranking,
        report=f"{page}/artifacts/report.html",
    )
    tags = _tags(settings, store, finished, verdict, parent)
    if found is None:
        model_id = log_package(client, settings, parent, finished.folders[finished.export] / "package")
        version = _create(client, settings, parent, model_id, description, tags | {"publication": "absent"})
    else:
        version = found.version
        versions.set_tags(settings, version, tags)
        with server.mlflow_errors(settings):
            client.update_model_version(settings.mlflow.model_name, str(version), description)
    _point_candidate(settings, version, verdict.passed)
    return version, verdict.passed


def _create(
    client: MlflowClient,
    settings: Settings,
    run_id: str,
    model_id: str,
    description: str,
    tags: dict[str, str],
) -> int:
    from mlflow.exceptions import MlflowException

    model = settings.mlflow.model_name
    with server.mlflow_errors(settings):
        try:
            client.create_registered_model(model, description=_MODEL_DESCRIPTION)
        except MlflowException as error:
            if error.error_code not in {"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"}:
                raise
        made = client.create_model_version(
            model, f"models:/{model_id}", run_id, tags=tags, description=description, model_id=model_id
        )
        client.set_logged_model_tags(
            model_id, {"mlflow.modelVersions": json.dumps([{"name": model, "version": int(made.version)}])}
        )
    return int(made.version)


def _tags(
    settings: Settings, store: Store, finished: Finished, verdict: Verdict, parent: str
) -> dict[str, str]:
    export = finished.manifests[finished.export]
    whole = costs.total(settings.report, finished.manifests.values())
    return {
        "gate": "passed" if verdict.passed else "failed",
        "gate_reasons": "; ".join(verdict.reasons)[:4000],
        "family": settings.model.family,
        "objective": str(export.facts.get("objective", "generative")),
        "width": str(export.facts["width"]),
        "as_of": str(export.facts.get("as_of", "")),
        "pipeline": finished.pipeline,
        "export": store.location(finished.export, finished.keys[finished.export]),
        "data_digest": finished.manifests["prepare"].digest,
        "settings_digest": digest_of(settings.model_dump(mode="json")),
        "git_commit": git_commit(),
        "report": f"runs:/{parent}/report.html",
        "cost": f"{whole.pop('cost'):.4f} {settings.report.currency}",
        **{name: f"{value:.0f}" for name, value in whole.items()},
        **({"ranking": store.location("rank", finished.keys["rank"])} if "rank" in finished.keys else {}),
    }


def _judgement(settings: Settings, finished: Finished, serving: VersionInfo | None) -> str:
    """What a verdict depends on; the same again needs no second judgement."""
    return digest_of(
        {
            "gate": settings.gate.model_dump(mode="json"),
            "evaluation": finished.manifests["evaluate"].digest,
            "champion": serving.version
            if serving and serving.tags.get("pipeline") != finished.pipeline
            else None,
        }
    )


def _champion_entry(
    settings: Settings, store: Store, finished: Finished, serving: VersionInfo | None
) -> tuple[int, dict[str, Any]] | None:
    """The serving version measured on this pipeline's held-out events; kept, because it takes a while."""
    if serving is None or serving.tags.get("pipeline") == finished.pipeline:
        return None
    evaluated = finished.keys["evaluate"]
    kept = (
        store.folder(STEP, finished.pipeline)
        / f"champion-{serving.version}-{serving.run_id[:8]}-{evaluated}.json"
    )
    if kept.exists():
        return serving.version, json.loads(kept.read_text("utf-8"))
    from hllm.data.prepared import Prepared
    from hllm.embedding.package import Package
    from hllm.evaluation.evaluate import evaluate_package
    from hllm.report.changes import changes

    package = Package.open(versions.download_package(settings, serving.version))
    prepared = Prepared.open(finished.folders["prepare"])
    entry, _ = evaluate_package(prepared, package, settings, finished.folders["evaluate"])
    candidate = Package.open(finished.folders[finished.export] / "package")
    entry["changes"] = changes(settings, prepared, candidate, package)
    write_atomically(kept, json.dumps(entry).encode())
    return serving.version, entry


def _ranking(settings: Settings, finished: Finished, serving: VersionInfo | None) -> dict[str, Any] | None:
    """What the vectors gain a ranker, beside the serving version's if that was measured, too."""
    if "rank" not in finished.folders:
        return None
    from hllm.evaluation.ranker_champion import ranking_of

    champion, location = None, serving.tags.get("ranking", "") if serving else ""
    if serving and location and serving.tags.get("pipeline") != finished.pipeline:
        step, key = serving.output(settings, "ranking")
        other = Store(settings.run.root)
        if other.manifest(step, key) is not None:  # somebody may have cleared old outputs
            champion = (serving.version, other.fetch(step, key))
    return ranking_of(settings, finished.folders["rank"], champion)


def _write_report(
    settings: Settings,
    store: Store,
    finished: Finished,
    metrics: dict[str, Any],
    verdict: Verdict,
    champion: tuple[int, dict[str, Any]] | None,
    ranking: dict[str, Any] | None,
    page: str,
) -> Path:
    from hllm.report import write_report

    path = store.folder(STEP, finished.pipeline) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = server.page_root(settings)
    links = {"MLflow run": pages + page} if pages else {}
    write_report(
        path,
        settings=settings,
        metrics=metrics,
        verdict=verdict,
        champion=champion[1] if champion else None,
        folders=dict(finished.folders),
        manifests=dict(finished.manifests),
        links=links,
        ranking=ranking,
    )
    return path


def _complete_parent(
    client: MlflowClient,
    settings: Settings,
    finished: Finished,
    parent: str,
    metrics: dict[str, Any],
    verdict: Verdict,
) -> None:
    """What the reviewer finds on the parent even when its steps were reused from an earlier pipeline."""
    decided: dict[str, str] = {}
    for step in steps(settings).values():
        decided |= tracking.flatten(settings_of(step, settings))
    tracking.log_params(client, parent, decided)
    taken = costs.total(settings.report, finished.manifests.values())
    for name, manifest in finished.manifests.items():
        taken |= {f"{what}/{name}": value for what, value in manifest.usage.items()}
        taken[f"seconds/{name}"] = manifest.seconds
    tracking.log_metrics_now(client, parent, tracking.headline_metrics(metrics) | taken)
    outputs = {f"{tracking.OUTPUT_TAG}{name}": key for name, key in finished.keys.items()}
    tracking.log_tags(client, parent, outputs | {"hllm.gate": "passed" if verdict.passed else "failed"})
    tracking.log_dataset(client, parent, finished.manifests["prepare"], settings)


def _point_candidate(settings: Settings, version: int, passed: bool) -> None:
    """The alias names the newest version that a person should look at."""
    if passed:
        versions.set_alias(settings, CANDIDATE, version)
    elif CANDIDATE in versions.registered_version(settings, str(version)).aliases:
        versions.remove_alias(settings, CANDIDATE)


def _keep_record(settings: Settings, store: Store, info: VersionInfo) -> None:
    """registered.json, for people and for the tasks that follow on this machine."""
    record = {
        "model": info.model,
        "version": info.version,
        "run_id": info.run_id,
        "report": info.tags["report"],
        "export": dict(zip(("step", "key"), info.output(settings), strict=True)),
    }
    folder = store.folder(STEP, info.tags["pipeline"])
    write_atomically(folder / "registered.json", json.dumps(record, indent=1).encode())
    if store.remote:
        for name in ("registered.json", "report.html"):
            if (folder / name).exists():
                upload(folder / name, f"{store.location(STEP, info.tags['pipeline'])}/{name}")


def git_commit() -> str:
    """The commit these sources are at, `-dirty` when they differ from it; the code version without git."""
    here = Path(hllm.__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return f"v{hllm.__version__}"
    return commit + ("-dirty" if changed else "")


def _git(folder: Path, *argv: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *argv], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def _says(info: VersionInfo) -> str:
    waiting = ", waiting for a decision" if CANDIDATE in info.aliases else ""
    return f"{info.model} version {info.version}, gate {info.tags.get('gate', 'unknown')}{waiting}"


_MODEL_DESCRIPTION = (
    "User and item vectors of a recommender. The alias `candidate` waits for a decision; `champion` serves. "
    "Move `champion` with `hllm promote` and `hllm rollback`: they check that its vectors are published."
)
