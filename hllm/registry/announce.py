"""What a registered version says to whoever releases it, within the 4 KB of a termination message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hllm.registry import versions
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work.artifacts import Store

DESCRIPTION_LIMIT = 2800


def announcement(settings: Settings, version: int) -> dict[str, Any]:
    """The version, its verdict, links that work outside MLflow's pages (none where nobody shows them now);
    `serves`: it is the champion."""
    info = versions.registered_version(settings, str(version))
    last = versions.last_promoted(settings)
    pages = server.page_root(settings)
    if pages:
        description = info.description.replace("](#/", f"]({pages}#/")
    else:
        description = re.sub(r"\[([^]]*)\]\(#/[^)]*\)", r"\1", info.description)
    if len(description) > DESCRIPTION_LIMIT:
        description = description[:DESCRIPTION_LIMIT].rpartition("\n")[0] + "\n\nThe rest is in MLflow."
    store = Store(settings.run.root)
    report = f"{store.location('register', info.tags.get('pipeline', ''))}/report.html"
    return {
        "model": info.model,
        "version": info.version,
        "gate": info.tags.get("gate", ""),
        "page": f"{pages}#/models/{info.model}/versions/{info.version}" if pages else "",
        "report": report if store.remote else Path(report).resolve().as_uri(),
        "description": description,
        "serves": versions.CHAMPION in info.aliases and last is not None and last.version == info.version,
    }
