"""The whole tree of settings, and looking into it by dotted names."""

from __future__ import annotations

from typing import Any

from hllm.settings.data import Data, Prepare, Validation
from hllm.settings.evaluation import Evaluation, Gate, Ranking
from hllm.settings.model import Model
from hllm.settings.run import Run
from hllm.settings.runner import Report, Runner
from hllm.settings.section import Section
from hllm.settings.services import Feast, Mlflow, Release, Watch
from hllm.settings.training import Embed, Train


class Settings(Section):
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
