"""New and changed item texts, with the champion's Item LLM, into its own views: within the hour.

Reuses everything when the catalogue is the same: the hours without news cost a look.
Paused until you switch it on. It reads the source of the settings file, and validates what it read.
"""

from __future__ import annotations

from airflow.sdk import DAG
from wiring import form
from wiring.clock import by_the_clock, refresh_tasks

settings = form.settings()

with DAG("hllm_items", schedule="@hourly", doc_md=__doc__, **by_the_clock(settings)) as dag:
    refresh_tasks(settings, "items", "Encode the texts that are new or another")
