"""What the demo ends with: the models compared, three users, one ranking request, where to look further."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tabulate import tabulate

from hllm.demo.services import HOST, MLFLOW_PORT
from hllm.pipeline import keys, pipeline_key
from hllm.report.figures import models_in_order
from hllm.settings import Settings
from hllm.work.artifacts import Store
from hllm.work.mlflow import page_root

METRICS = ("recall@10", "ndcg@10", "ndcg@50")
USERS = 3


def summary(settings: Settings, airflow_url: str, say: Callable[[str], Any]) -> None:
    all_keys = keys(settings)
    store = Store(settings.run.root)
    evaluated = store.fetch("evaluate", all_keys["evaluate"])
    metrics = json.loads((evaluated / "metrics.json").read_text("utf-8"))
    examples = json.loads((evaluated / "examples.json").read_text("utf-8"))
    record = store.folder("register", pipeline_key(all_keys))
    say("")
    say(comparison(metrics))
    for example in examples[:USERS]:
        say("")
        say(about_user(example))
    say("")
    if examples:
        say(one_request(settings, examples[0]))
    say("")
    say(f"report     {(record / 'report.html').resolve().as_uri()}")
    pages = page_root(settings) or f"http://{HOST}:{MLFLOW_PORT}/"
    say(f"MLflow     {pages}#/models/{settings.mlflow.model_name} (`make ui` starts its pages)")
    say(f"Airflow    {airflow_url} (`make ui` starts its pages)")


def comparison(metrics: dict[str, Any]) -> str:
    """The models on the same held-out events, with their intervals."""
    mode = metrics["headline"]
    rows = []
    for model in models_in_order(metrics, None):
        overall = model.entry["overall"][mode]
        rows.append((model.name, *(_interval(overall.get(metric)) for metric in METRICS)))
    about = (
        "items the user already has left out" if mode == "filtered" else "items the user already has included"
    )
    return (
        f"{metrics['rows']:,} held-out events, ranked among all {metrics['catalogue']:,} items ({about}):\n"
        + tabulate(rows, headers=("", *METRICS), disable_numparse=True)
    )


def about_user(example: dict[str, Any]) -> str:
    """What a user had, what the candidate recommends, and what the user really chose."""

    def titles(items: list[dict[str, str]]) -> str:
        return "; ".join(item["title"] for item in items)

    return (
        f"user {example['user_id']}\n"
        f"  last five     {titles(example['history'][-5:])}\n"
        f"  recommended   {titles(example['recommended'][:5])}\n"
        f"  really chose  {example['chosen']['title']} (ranked {example['rank']:,})"
    )


def one_request(settings: Settings, example: dict[str, Any]) -> str:
    """What a ranking service reads from Feast for five candidates, of the version that serves."""
    from hllm.features.request import request_table
    from hllm.registry.versions import serving_version

    serving = serving_version(settings)
    if serving is None:
        return "one ranking request: no version serves yet, so there is nothing to read"
    items = [item["item_id"] for item in example["recommended"]]
    table = request_table(settings, serving.version, example["user_id"], items)
    return (
        f"one ranking request reads from Feast, version {serving.version} of {serving.model} "
        f"(published vectors have read the whole history, what was really chosen too):\n{table}"
    )


def _interval(figure: dict[str, float] | None) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" if figure else "-"
