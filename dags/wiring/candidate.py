"""The asset between the two DAGs: a registered candidate, with everything its release must know.

The event carries the version and the settings it was trained with, so a release acts on exactly what was
registered, whatever is trained, edited or renamed meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow.sdk import Asset, Context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from wiring import form

CANDIDATE = Asset("hllm_candidate", uri="hllm://candidate")
ANNOUNCER = ("hllm_train", "register")
"""DAG and task whose events are believed in full."""


@dataclass(frozen=True)
class Candidate:
    """What a release is about. `environment`: the settings of the run that registered it."""

    version: str
    environment: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)
    """What `hllm register` said of the version: `model`, `gate`, `description`, `page`, `report`."""


def announce(context: Context, result: str) -> None:
    """Register's result becomes the event that starts a release, unless the version already serves."""
    about = json.loads(result)
    if about.get("serves"):
        raise AirflowSkipException(
            f"version {about['version']} is the champion already: there is nothing to approve or publish"
        )
    context["outlet_events"][CANDIDATE].extra = {
        "about": about,
        "environment": form.environment(context["params"]),
    }


def candidate_of(context: Context) -> Candidate:
    """The one candidate of this release run: the newest event that started it, or the version in its form.

    Events that came while another release waited are older candidates: their versions stay in MLflow.
    """
    events = [event for found in context["triggering_asset_events"].values() for event in found]
    if events:
        event = max(events, key=lambda event: event.timestamp)
        about = event.extra.get("about") if isinstance(event.extra, Mapping) else None
        version = about.get("version") if isinstance(about, Mapping) else None
        if type(version) is not int or version < 1:
            raise AirflowFailException(
                f"The event that started this run names no version: {str(version)[:100]!r}. Trigger this DAG "
                "by hand, with `version`."
            )
        if not _announced(event):
            return Candidate(str(version), {"HLLM_CONFIG": str(form.ROOT / form.config_path())})
        return Candidate(str(version), dict(event.extra["environment"]), dict(about))
    if context["params"].get("version"):
        return Candidate(
            str(context["params"]["version"]), {"HLLM_CONFIG": str(form.ROOT / context["params"]["config"])}
        )
    raise AirflowFailException(
        "No candidate: trigger hllm_train, or give `version` when triggering this DAG by hand."
    )


def _announced(event: Any) -> bool:
    """Whether our own task wrote it, which Airflow itself records. Of one that somebody posted, or that
    another DAG emits, the version alone counts: its settings, text and links are anybody's."""
    source = (getattr(event, "source_dag_id", None), getattr(event, "source_task_id", None))
    return source == ANNOUNCER and not event.extra.get("from_rest_api")


def body(candidate: Candidate) -> str:
    """What the approver reads (Markdown)."""
    about = candidate.about
    parts = [
        about.get("description")
        or f"Version {candidate.version}, asked for by hand or by an event that hllm_train did not write.",
        f"[The version in MLflow]({about['page']})" if about.get("page") else "",
        # A browser opens no file from a web page: the address of a local report is there to be copied.
        f"The report: `{about['report']}`" if about.get("report") else "",
        "**Approve**: its vectors are published to Feast, read back, compared, and it becomes the champion. "
        "**Reject**: nothing is published, and the version keeps your note.",
    ]
    return "\n\n".join(part for part in parts if part)
