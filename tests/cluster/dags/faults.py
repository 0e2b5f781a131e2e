"""One DAG per fault, each with one real step of the product: what Airflow makes of pods that go wrong.

The faults are named in the file HLLM_CLUSTER_FAULTS: name -> step, settings that differ, environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Context
from wiring.runner import Environment, hllm_task

from hllm.pipeline import steps
from hllm.settings import load


def environment(values: Mapping[str, str]) -> Environment:
    def found(context: Context) -> Mapping[str, str]:
        return {"HLLM_CONFIG": "/etc/hllm/hllm.toml", **values}

    return found


for name, fault in json.loads(Path(os.environ["HLLM_CLUSTER_FAULTS"]).read_text("utf-8")).items():
    sets = [f"{dotted}={json.dumps(value)}" for dotted, value in fault["sets"].items()]
    settings = load(os.environ["HLLM_CONFIG"], sets, environ={})
    with DAG(
        f"fault_{name}",
        schedule=None,
        catchup=False,
        default_args={"retries": settings.runner.retries, "retry_delay": timedelta(seconds=2)},
    ) as dag:
        step = steps(settings)[fault["step"]]
        hllm_task(settings, step.name, step.argv, environment=environment(fault["environment"]))
    globals()[dag.dag_id] = dag
