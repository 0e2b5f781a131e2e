"""Logs the deployable package as an MLflow model: code from a file, weights as safetensors, a signature."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hllm
from hllm.registry import server
from hllm.settings import Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

REQUIREMENTS = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch", "transformers")
"""What the package needs to be loaded and asked; pinned at what is installed here."""


def log_package(client: MlflowClient, settings: Settings, run_id: str, package: Path) -> str:
    """The id of the logged model; the one of an earlier, killed attempt if that had been complete."""
    found = _logged_before(client, settings, run_id)
    if found:
        return found
    import mlflow

    server.point_fluent_at(settings)
    here = Path(hllm.__file__).parent
    with server.mlflow_errors(settings), mlflow.start_run(run_id=run_id, log_system_metrics=False):
        logged = mlflow.pyfunc.log_model(
            name=settings.mlflow.model_name,
            python_model=str(here / "registry" / "pyfunc_model.py"),
            artifacts={"package": str(package)},
            code_paths=[str(here)],
            signature=signature(),
            input_example=input_example(package),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    return str(logged.model_id)


def signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(Array(DataType.string), "history")]),
        outputs=Schema(
            [ColSpec(Array(DataType.string), "item_ids"), ColSpec(Array(DataType.double), "scores")]
        ),
        params=ParamSchema(
            [ParamSpec("k", DataType.long, 10), ParamSpec("filter_history", DataType.boolean, True)]
        ),
    )


def input_example(package: Path) -> Any:
    """One history: the first items of the catalogue, so that the example can really be scored."""
    import pandas as pd
    import pyarrow.parquet as parquet

    table = parquet.read_table(package / "items.parquet", columns=["item_id"])
    ids = table["item_id"].slice(0, 3).to_pylist()
    return pd.DataFrame({"history": [[str(item_id) for item_id in ids]]}), {"k": 10, "filter_history": True}


def _logged_before(client: MlflowClient, settings: Settings, run_id: str) -> str | None:
    with server.mlflow_errors(settings):
        experiment = client.get_run(run_id).info.experiment_id
        models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    ready = [model for model in models if model.status == "READY"]
    return str(ready[0].model_id) if ready else None
