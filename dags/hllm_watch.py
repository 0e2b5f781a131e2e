"""What serves, looked at every hour: fresh, complete, sound, and the same online and offline?

An alert fails the task with exit code 66 and says what to do; page and metrics are written either way.
Paused until you switch it on.
"""

from __future__ import annotations

from airflow.sdk import DAG
from wiring import form
from wiring.clock import by_the_clock
from wiring.runner import hllm_task, of_the_form

settings = form.settings()

with DAG("hllm_watch", schedule="@hourly", doc_md=__doc__, **by_the_clock(settings)) as dag:
    hllm_task(
        settings,
        "watch",
        ("watch",),
        environment=of_the_form,
        doc_md="**Look at the vectors that serve**\n\n`hllm watch`",
    )
