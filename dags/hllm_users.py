"""Users who were active since the last run, with the champion's User LLM, into its own views: daily.

A missed day needs no run of its own: the next one encodes whoever was active in either. Days of the past, for
training ranking models, are `hllm backfill`.
Paused until you switch it on. It reads the source of the settings file, and validates what it read.
"""

from __future__ import annotations

from airflow.sdk import DAG
from wiring import form
from wiring.runner import hllm_task, retries

settings = form.settings()

with DAG(
    "hllm_users",
    schedule="@daily",
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    params={"config": form.config_param()},
    default_args=retries(settings),
    tags=["hllm"],
    doc_md=__doc__,
) as dag:
    ingest, validate, refresh = (
        hllm_task(
            settings,
            name,
            command,
            environment=lambda context: form.environment(context["params"]),
            max_active_tis_per_dag=1,
            doc_md=f"**{what}**\n\n`hllm {' '.join(command)}`",
        )
        for name, command, what in (
            ("ingest", ("ingest",), "The log and the catalogue as they are now"),
            ("validate", ("validate",), "Checked; rows that fail go to quarantine"),
            ("refresh-users", ("refresh", "users"), "Encode users of whom the log knows more"),
        )
    )
    ingest >> validate >> refresh
