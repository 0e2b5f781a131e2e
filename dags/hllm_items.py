"""New and changed item texts, with the champion's Item LLM, into its own views: within the hour.

Reuses everything when the catalogue is the same: the hours without news cost a look.
Paused until you switch it on. It reads the source of the settings file, and validates what it read.
"""

from __future__ import annotations

from airflow.sdk import DAG
from wiring import form
from wiring.runner import hllm_task, retries

settings = form.settings()

with DAG(
    "hllm_items",
    schedule="@hourly",
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
            ("refresh-items", ("refresh", "items"), "Encode the texts that are new or another"),
        )
    )
    ingest >> validate >> refresh
