"""Users who were active since the last run, with the champion's User LLM, into its own views: daily.

A missed day needs no run of its own: the next one encodes whoever was active in either. Days of the past, for
training ranking models, are `hllm backfill`.
Paused until you switch it on. It reads the source of the settings file, and validates what it read.
"""

from __future__ import annotations

from airflow.sdk import DAG
from wiring import form
from wiring.clock import by_the_clock, refresh_tasks

settings = form.settings()

with DAG("hllm_users", schedule="@daily", doc_md=__doc__, **by_the_clock(settings)) as dag:
    refresh_tasks(settings, "users", "Encode users of whom the log knows more")
