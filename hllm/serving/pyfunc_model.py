"""The model as MLflow loads it: histories of item ids in, recommended item ids out.

MLflow keeps this file as source beside the package's safetensors, and a copy of the `hllm` sources beside
both: the model loads where the requirements are installed, `hllm` itself or not. Nothing in it is a pickle.

    model = mlflow.pyfunc.load_model("models:/hllm@champion")
    model.predict(pandas.DataFrame({"history": [["50", "181"]]}), params={"k": 10, "filter_history": True})

A version that was trained discriminatively (early or late fusion) also takes candidates, and its signature
says so; it answers with them in their order, each with the probability that the user likes it:

    model.predict(pandas.DataFrame({"history": [["50", "181"]], "candidates": [["172", "1"]]}))

A version that reads when things happened also takes `times`, the second (UTC) of each event of a history, and
`asked_at`, that of the question; without them the model takes all times as unknown.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Recommender(PythonModel):
    """One row per user: column `history`, item ids from oldest to newest; unknown ids are skipped. With a
    column `candidates`, item ids to be judged; a candidate that the model does not know has the score nan."""

    def load_context(self, context: Any) -> None:
        from pathlib import Path

        from hllm.embedding.package import Package

        self.package = Package.open(Path(context.artifacts["package"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        asked = {"k": 10, "filter_history": True} | (params or {})
        histories = _ids(model_input["history"])
        times, asked_at = (
            model_input[name].tolist() if name in model_input else None for name in ("times", "asked_at")
        )
        if "candidates" in model_input:
            item_ids = _ids(model_input["candidates"])
            found = self.package.scores(histories, item_ids, times, asked_at)
            scores = [row.astype(float).tolist() for row in found]
        else:
            k, filter_history = int(asked["k"]), bool(asked["filter_history"])
            best = self.package.recommend(histories, k, filter_history, times, asked_at)
            item_ids = [[item_id for item_id, _ in row] for row in best]
            scores = [[float(score) for _, score in row] for row in best]
        return pd.DataFrame({"item_ids": item_ids, "scores": scores}, index=model_input.index)


def _ids(column: Any) -> list[list[str]]:
    return [[str(item_id) for item_id in ids] for ids in column]


set_model(Recommender())
