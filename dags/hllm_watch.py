"""What serves, looked at every hour: fresh, complete, sound, and the same online and offline?

An alert fails the task with exit code 66 and says what to do; page and metrics are written either way.
Paused until you switch it on.
"""

from __future__ import annotations

from airflow.sdk import DAG
from wiring import form
from wiring.runner import hllm_task, retries

settings = form.settings()

with DAG(
    "hllm_watch",
    schedule="@hourly",
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    params={"config": form.config_param()},
    default_args=retries(settings),
    tags=["hllm"],
    doc_md=__doc__,
) as dag:
    hllm_task(
        settings,
        "watch",
        ("watch",),
        environment=lambda context: form.environment(context["params"]),
        doc_md="**Look at the vectors that serve**\n\n`hllm watch`",
    )
