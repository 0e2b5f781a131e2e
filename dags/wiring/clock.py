"""The DAGs that the clock starts: how they run, and the tasks that bring what serves up to date."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

from hllm.settings import Settings
from wiring import form
from wiring.runner import hllm_task, of_the_form, retries


def by_the_clock(settings: Settings) -> dict[str, Any]:
    """How such a DAG runs: paused until somebody wants it, one run at a time, none for a missed hour.

    Two of them may meet, reading the same source or writing to the same version; whoever comes second ends
    with 75. Six more tries take about an hour.
    """
    patience = {"retries": max(6, settings.runner.retries), "retry_delay": timedelta(minutes=3)}
    return {
        "catchup": False,
        "is_paused_upon_creation": True,
        "max_active_runs": 1,
        "params": {"config": form.config_param()},
        "default_args": retries(settings) | patience,
        "tags": ["hllm"],
    }


def refresh_tasks(settings: Settings, what: Literal["users", "items"], about: str) -> None:
    """The log and the catalogue of now, validated; then `hllm refresh`."""
    ingest, validate, refresh = (
        hllm_task(
            settings,
            name,
            command,
            environment=of_the_form,
            max_active_tis_per_dag=1,
            doc_md=f"**{does}**\n\n`hllm {' '.join(command)}`",
        )
        for name, command, does in (
            ("ingest", ("ingest",), "The log and the catalogue as they are now"),
            ("validate", ("validate",), "Checked; rows that fail go to quarantine"),
            (f"refresh-{what}", ("refresh", what), about),
        )
    )
    ingest >> validate >> refresh
