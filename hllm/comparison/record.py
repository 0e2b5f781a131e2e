"""What MLflow remembers of a comparison: one run with the table and the page, below it one run per model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hllm.comparison.file import Entry
from hllm.comparison.result import Result
from hllm.comparison.work import Pipeline
from hllm.pipeline import pipeline_key
from hllm.work import mlflow as server
from hllm.work import tracking

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def record(result: Result, found: Sequence[Pipeline], folder: Path) -> str:
    """The comparison's run; the same comparison again is the same run.

    Raises:
        InfraError: MLflow does not answer.
    """
    settings = found[0].settings
    client = server.client(settings)
    with server.mlflow_errors(settings):
        parent = tracking.parent_run(client, settings, folder.name)
        client.update_run(parent, name=f"compare {result.comparison.name}")
        title = result.comparison.title
        tracking.log_tags(client, parent, {"hllm.comparison": title, "hllm.output": str(folder)})
        for name in ("index.html", "table.md", "results.json"):
            client.log_artifact(parent, str(folder / name))
        for entry in result.comparison.entries:
            _record_model(client, parent, result, entry, [one for one in found if one.entry is entry])
        client.set_terminated(parent, "FINISHED")
    return parent


def _record_model(
    client: MlflowClient, parent: str, result: Result, entry: Entry, own: Sequence[Pipeline]
) -> None:
    """Means with the ends of their intervals, what the model cost, and which pipelines it is made of."""
    run = _model_run(client, parent, entry.name)
    values: dict[str, float] = {}
    for metric, figure in result.figures.found[entry.name].items():
        name = metric.replace(" ", "/")
        values |= {name: figure["value"], f"{name}/low": figure["low"], f"{name}/high": figure["high"]}
    effort = result.efforts[entry.name]
    values |= {
        "parameters": float(effort.parameters),
        "train_seconds": effort.seconds,
        "peak_memory_mb": float(effort.memory_mb),
    }
    tracking.log_metrics_now(client, run, values)
    tags = {
        "hllm.settings": result.settings[entry.name],
        "hllm.pipelines": ", ".join(pipeline_key(one.keys) for one in own),
        "hllm.seeds": ", ".join(str(one.seed) for one in own),
        "hllm.label": entry.label,
    }
    tracking.log_tags(client, run, {name: text[:5000] for name, text in tags.items()})
    client.set_terminated(run, "FINISHED")


def _model_run(client: MlflowClient, parent: str, name: str) -> str:
    experiment = client.get_run(parent).info.experiment_id
    tags = {"mlflow.parentRunId": parent, "hllm.model": name}
    for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"):
        if run.data.tags.get("hllm.model") == name:
            return str(run.info.run_id)
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
