"""What a registered version was made from: the outputs and the settings of its pipeline's steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hllm.artifacts import Store
from hllm.errors import ConfigError, DataError
from hllm.registry import server
from hllm.registry.tracking import flatten, metric_name, text
from hllm.registry.versions import VersionInfo
from hllm.settings import Settings


def output_of(settings: Settings, info: VersionInfo, step: str) -> Path:
    """The folder of a step's output in the pipeline that made a version, fetched if it lies in S3.

    Raises:
        DataError: MLflow does not know it, or it was deleted.
    """
    with server.mlflow_errors(settings):
        run = server.client(settings).get_run(info.run_id)
    key = run.data.tags.get(f"hllm.output.{step}")
    if key is None:
        raise DataError(f"has no record of its step {step}", where=f"{info.model} version {info.version}")
    root = info.tags["export"].rstrip("/").rsplit("/", 2)[0]
    return Store(root).fetch(step, key)


def require_same_settings(settings: Settings, info: VersionInfo, names: Iterable[str]) -> None:
    """The settings at hand say of these what the version was trained with.

    Raises:
        ConfigError: one is another.
    """
    with server.mlflow_errors(settings):
        recorded = server.client(settings).get_run(info.run_id).data.params
    for dotted in names:
        value = settings.at(dotted)
        value = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, said in flatten({dotted: value}).items():
            was = recorded.get(metric_name(name))
            if was is not None and was != text(said):
                raise ConfigError(
                    f"{name} is {said}, version {info.version} of {info.model} was trained with {was}",
                    remedy="Its model reads texts as in its training: use the settings file of that version.",
                )
