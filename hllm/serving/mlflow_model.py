"""Logs the deployable package as an MLflow model: code from a file, weights as safetensors, a signature."""

from __future__ import annotations

import ast
import shutil
import tempfile
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hllm.models
from hllm.models.family import GROUP
from hllm.models.load import family_in
from hllm.settings import Settings
from hllm.work import mlflow as server

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

HERE = Path(hllm.__file__).parent
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch", "transformers")
"""What the package needs to be loaded and asked; pinned at what is installed here."""


def log_package(client: MlflowClient, settings: Settings, run_id: str, package: Path) -> str:
    """The id of the logged model; the one of an earlier, killed attempt if that had been complete."""
    server.point_fluent_at(settings)  # creating the version reads that address too
    found = _logged_before(client, settings, run_id)
    if found:
        return found
    import mlflow

    with (
        tempfile.TemporaryDirectory() as scratch,
        server.mlflow_errors(settings),
        mlflow.start_run(run_id=run_id, log_system_metrics=False),
    ):
        logged = mlflow.pyfunc.log_model(
            name=settings.mlflow.model_name,
            python_model=str(HERE / "serving" / "pyfunc_model.py"),
            artifacts={"package": str(package)},
            code_paths=[str(copy_sources(Path(scratch), package))],
            signature=signature(package),
            input_example=input_example(package),
            pip_requirements=_requirements(package),
        )
    return str(logged.model_id)


def copy_sources(folder: Path, package: Path) -> Path:
    """A copy of the modules that a package needs, those of its family among them, and of no others: the model
    needs no `hllm` installed."""
    kind = family_in(package)
    needed: dict[Path, Path] = {}
    waiting = ["hllm.embedding.package", f"hllm.models.{kind.name}.family", kind.code]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or path in needed:
            continue
        place = Path(*name.split("."))
        needed[path] = place / path.name if path.name == "__init__.py" else place.with_suffix(".py")
        waiting += [name.rpartition(".")[0], *_imports(path)]
    for path, place in needed.items():
        copy = folder / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return folder / "hllm"


def _source(module: str) -> Path | None:
    """The file of one of our modules or of a family beside them; None for names inside a module and for
    everybody else's."""
    top, *parts = module.split(".")
    if top != "hllm":
        return None
    places = [HERE.joinpath(*parts)]
    if parts[:1] == ["models"]:
        places += [Path(each).joinpath(*parts[1:]) for each in hllm.models.__path__]
    files = [file for path in places for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def _requirements(package: Path) -> list[str]:
    """What is installed here; a family that was installed by itself is needed, too."""
    name = family_in(package).name
    others = [entry.dist for entry in entry_points(group=GROUP) if entry.name == name and entry.dist]
    return [
        *(f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS),
        *(f"{each.name}=={each.version}" for each in others),
    ]


def _imports(path: Path) -> list[str]:
    """Everything a file imports, inside functions too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def signature(package: Path) -> Any:
    """Histories in; beside them candidates where the model was trained to judge them, and times where it
    reads them."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from hllm.embedding.package import Package

    inputs: list[Any] = [ColSpec(Array(DataType.string), "history")]
    found = Package.open(package)
    if found.objective != "generative":
        inputs.append(ColSpec(Array(DataType.string), "candidates", required=False))
    if found.reads_times:
        inputs.append(ColSpec(Array(DataType.long), "times", required=False))
        inputs.append(ColSpec(DataType.long, "asked_at", required=False))
    return ModelSignature(
        inputs=Schema(inputs),
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
