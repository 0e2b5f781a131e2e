"""The asset between the two DAGs: a registered candidate, with everything its release must know.

The event carries the version and the settings it was trained with, so a release acts on exactly what was
registered, whatever is trained, edited or renamed meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, Context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from wiring import form

from hllm.settings import ENV_PREFIX

CANDIDATE = Asset("hllm_candidate", uri="hllm://candidate")


@dataclass(frozen=True)
class Candidate:
    """What a release is about. `environment`: the settings of the run that registered it."""

    version: str
    environment: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)
    """`model`, `report`, `gate`, `description` of the version, for the person who decides."""


def announce(context: Context, result: str) -> None:
    """Register's result becomes the event that starts a release, unless the version already serves."""
    about = json.loads(result)
    if about.get("serves"):
        raise AirflowSkipException(f"version {about['version']} is the champion already: there is nothing to approve or publish")
    context["outlet_events"][CANDIDATE].extra = {"about": about, "environment": form.environment(context["params"])}


def candidate_of(context: Context) -> Candidate:
    """The one candidate of this release run: the newest event that started it, or the version typed in the form.

    Events that came while another release waited are older candidates: their versions stay in MLflow.
    """
    events = [event for found in context["triggering_asset_events"].values() for event in found]
    if events:
        extra = max(events, key=lambda event: event.timestamp).extra
        about = extra.get("about", {})
        # Whoever may post asset events must not set PATH or LD_PRELOAD of our commands.
        environment = {key: str(value) for key, value in extra.get("environment", {}).items() if key == "HLLM_CONFIG" or key.startswith(ENV_PREFIX)}
        if "version" in about:
            return Candidate(str(about["version"]), environment, about)
    if context["params"].get("version"):
        return Candidate(str(context["params"]["version"]), {"HLLM_CONFIG": str(form.ROOT / context["params"]["config"])})
    raise AirflowFailException("No candidate: trigger hllm_train, or give `version` when triggering this DAG by hand.")


def body(candidate: Candidate) -> str:
    """What the approver reads (Markdown)."""
    about = candidate.about
    lines = [f"**{about.get('model', 'Model')} version {candidate.version}**"]
    if about.get("gate"):
        lines.append(f"Gate: **{about['gate']}**")
    if about.get("description"):
        lines.append(about["description"])
    if about.get("report"):
        lines.append(f"Report: {_link(about['report'])}")
    lines.append("Approve: it is published to Feast, read back, compared, and becomes the champion. Reject: nothing is published, and the version keeps your note.")
    return "\n\n".join(lines)


def _link(location: str) -> str:
    """Browsers open no file links from web pages: a local path is shown as text, to be copied."""
    return f"[open]({location})" if location.startswith(("http://", "https://")) else f"`{Path(location).resolve().as_uri() if '://' not in location else location}`"
