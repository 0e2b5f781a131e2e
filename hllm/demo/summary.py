"""What the demo ends with: the models compared, three users, one ranking request, where to look further."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tabulate import tabulate

from hllm.artifacts import Store
from hllm.demo.services import ROOT
from hllm.settings import Settings
from hllm.steps import keys, pipeline_key

MODELS = {
    "hllm-2": "HLLM after stage 2",
    "hllm-1": "HLLM after stage 1",
    "sasrec-1": "SASRec",
    "popular": "most-popular",
}
METRICS = ("recall@10", "ndcg@10", "ndcg@50")
USERS = 3


def summary(settings: Settings, config: str, airflow_url: str, say: Callable[[str], Any]) -> None:
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
        say(one_request(config, examples[0]))
    say("")
    say(f"report     {(record / 'report.html').resolve().as_uri()}")
    say(f"MLflow     {settings.mlflow.tracking_uri} (its pages: make ui)")
    say(f"Airflow    {airflow_url} while it runs (its pages: make ui)")


def comparison(metrics: dict[str, Any]) -> str:
    """The models on the same held-out events, with their intervals."""
    mode = metrics["headline"]
    rows = []
    for label, name in MODELS.items():
        if label in metrics["models"]:
            overall = metrics["models"][label]["overall"][mode]
            rows.append((name, *(_interval(overall.get(metric)) for metric in METRICS)))
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


def one_request(config: str, example: dict[str, Any]) -> str:
    """What a ranking service reads from Feast for a user and five items: the example that ships with it."""
    items = [item["item_id"] for item in example["recommended"]]
    argv = [
        sys.executable,
        "feature_repo/read_features.py",
        "--config",
        config,
        "--user",
        example["user_id"],
        "--items",
        *items,
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        return f"one ranking request: {lines[-1]}"
    return f"one ranking request reads from Feast (feature_repo/read_features.py):\n{done.stdout.rstrip()}"


def _interval(figure: dict[str, float] | None) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]" if figure else "-"
