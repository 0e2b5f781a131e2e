"""Every setting, in one frozen tree read from one TOML file.

Order of precedence, last wins: the defaults of the sections, the TOML file, the environment
(`HLLM__HLLM__STAGE1__BATCH_SIZE=64`), `--set hllm.stage1.batch_size=64`.
Unknown keys are errors. `Settings.model_json_schema()` also feeds the trigger form in Airflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hllm.settings.data import Columns, Data, Prepare, Validation
    from hllm.settings.evaluation import Evaluation, Gate, Ranking
    from hllm.settings.keys import describe
    from hllm.settings.loading import ENV_PREFIX, load, read_toml
    from hllm.settings.model import Model
    from hllm.settings.run import Run
    from hllm.settings.runner import Pod, Report, Runner
    from hllm.settings.section import Section
    from hllm.settings.services import Feast, Mlflow, Release, Watch
    from hllm.settings.training import Embed, Stage, Train
    from hllm.settings.tree import Settings

_HOMES = {
    "Columns": "data",
    "Data": "data",
    "Prepare": "data",
    "Validation": "data",
    "Evaluation": "evaluation",
    "Gate": "evaluation",
    "Ranking": "evaluation",
    "describe": "keys",
    "ENV_PREFIX": "loading",
    "load": "loading",
    "read_toml": "loading",
    "Model": "model",
    "Run": "run",
    "Pod": "runner",
    "Report": "runner",
    "Runner": "runner",
    "Section": "section",
    "Feast": "services",
    "Mlflow": "services",
    "Release": "services",
    "Watch": "services",
    "Embed": "training",
    "Stage": "training",
    "Train": "training",
    "Settings": "tree",
}


def __getattr__(name: str) -> Any:
    """Read when first asked for: families import their sections from here while the tree is being built of
    theirs."""
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "ENV_PREFIX",
    "Columns",
    "Data",
    "Embed",
    "Evaluation",
    "Feast",
    "Gate",
    "Mlflow",
    "Model",
    "Pod",
    "Prepare",
    "Ranking",
    "Release",
    "Report",
    "Run",
    "Runner",
    "Section",
    "Settings",
    "Stage",
    "Train",
    "Validation",
    "Watch",
    "describe",
    "load",
    "read_toml",
]
