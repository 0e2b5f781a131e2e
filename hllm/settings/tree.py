"""The whole tree of settings, and looking into it by dotted names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pydantic import create_model

from hllm.errors import ConfigError
from hllm.settings.data import Data, Prepare, Validation
from hllm.settings.evaluation import Evaluation, Gate, Ranking
from hllm.settings.model import Model
from hllm.settings.run import Run
from hllm.settings.runner import Report, Runner
from hllm.settings.section import Section
from hllm.settings.services import Feast, Mlflow, Release, Watch
from hllm.settings.training import Embed, Train


class Tree(Section):
    """The sections that are always there."""

    run: Run = Run()
    data: Data = Data()
    validation: Validation = Validation()
    prepare: Prepare = Prepare()
    model: Model = Model()
    train: Train = Train()
    embed: Embed = Embed()
    evaluation: Evaluation = Evaluation()
    ranking: Ranking = Ranking()
    gate: Gate = Gate()
    report: Report = Report()
    mlflow: Mlflow = Mlflow()
    feast: Feast = Feast()
    watch: Watch = Watch()
    release: Release = Release()
    runner: Runner = Runner()

    def at(self, dotted: str) -> Any:
        """The value or section at `a.b.c`."""
        value: Any = self
        for part in dotted.split("."):
            value = getattr(value, part)
        return value


def _with_families() -> type[Tree]:
    """The tree with a section for every model family that is found. Families are plugins: they are asked for
    by name, as nothing here may import what stands above the settings."""
    families = importlib.import_module("hllm.models.family").families()
    sections: dict[str, Any] = {}
    for family in families.values():
        if family.name in Tree.model_fields:
            raise ConfigError(
                f"a model family cannot be called {family.name}: that is a section of the settings already",
                where=family.code,
            )
        if family.settings.model_fields:
            sections[family.name] = (family.settings, family.settings())
    return create_model("Settings", __base__=Tree, **sections)


if TYPE_CHECKING:

    class Settings(Tree):
        """The tree with a section for every model family; reached by `at`."""
else:
    Settings = _with_families()
