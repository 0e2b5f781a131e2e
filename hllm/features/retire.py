"""`hllm retire`: of published versions, those that nobody will go back to make room.

Kept are the champion, the version it replaced, one more before that, and everything newer than the champion,
which may be on its way to replace it. Of all others the online rows, offline files, views and service go.
What is needed to publish them again stays: the MLflow version, its model and its export. In this order:
    1. the version's tags: `publication = retired`, who, when and why; from here on nothing resolves to it
    2. service and views, in Feast's registry
    3. online rows
    4. offline files, refreshes and the record of the publication
A process killed on the way leaves a version that is retired and not yet cleaned: the next run finishes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hllm.features.export import ENTITIES
from hllm.features.offline import remove_offline
from hllm.features.online import publisher, rows_of
from hllm.features.publish import STEP as PUBLISH
from hllm.features.publish import registered_service
from hllm.features.refreshed import STEP as REFRESH
from hllm.features.store import open_store, registry_lock, service_errors
from hllm.features.stores.redis import connect
from hllm.features.views import service_name, view_name
from hllm.registry import versions
from hllm.registry.promote import REPLACED_TAG
from hllm.registry.versions import VersionInfo
from hllm.settings import Settings
from hllm.work import tracking
from hllm.work.artifacts import Store, user_name
from hllm.work.progress import Progress
from hllm.work.termination import say

KEEP = 3
"""The champion, the version before it, and one more."""
RETIRED = "retired"
CLEANED_TAG = "retired_rows"


REMOVED = "its service, views, online rows and offline files"


def retire(settings: Settings, *, by: str = "", note: str = "") -> list[int]:
    """Remove what older versions have published; returns which they were.

    Raises:
        InfraError: somebody is writing to one of them, or a store does not answer.
    """
    removed = []
    for info in to_retire(settings):
        began = time.monotonic()
        with (
            service_errors(settings),
            Store(settings.run.root).lock(PUBLISH, f"v{info.version}"),
            publisher(settings, info.version) as still_here,
        ):
            audit = {
                "retired_by": by or user_name(),
                "retired_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "retired_note": note,
            }
            with tracking.version_run(settings, info, "retire", audit) as tracker:
                if info.tags.get("publication") != RETIRED:
                    retired = {**audit, CLEANED_TAG: None, "publication": RETIRED}  # what decides is last
                    versions.set_tags(settings, info.version, retired)
                _remove(settings, info, still_here)
                tracker.note({"hllm.removed": REMOVED})
            versions.set_tags(settings, info.version, {CLEANED_TAG: REMOVED})
        removed.append(info.version)
        say(f"retire: version {info.version}: {REMOVED} removed in {time.monotonic() - began:.1f} s")
    if not removed:
        say("retire: nothing to remove")
    return removed


def to_retire(settings: Settings) -> list[VersionInfo]:
    """Published versions that are neither kept nor still on their way, and retired ones not yet cleaned."""
    serving = versions.serving_version(settings)
    if serving is None:
        return []
    known = {info.version: info for info in versions.all_versions(settings)}
    kept = [serving.version]
    before = versions.number_in(serving.tags.get(REPLACED_TAG, ""))
    while before in known and before not in kept:
        kept.append(before)
        before = versions.number_in(known[before].tags.get(REPLACED_TAG, ""))
    published = [info for info in known.values() if info.tags.get("publication") in versions.PUBLISHING]
    older = [info.version for info in published if info.version < serving.version]
    kept = [*kept[:KEEP], *(number for number in reversed(older) if number not in kept[:KEEP])][:KEEP]
    return [
        info
        for info in known.values()
        if (info in published and info.version < serving.version and info.version not in kept)
        or (info.tags.get("publication") == RETIRED and CLEANED_TAG not in info.tags)
    ]


def _remove(settings: Settings, info: VersionInfo, still_here: Callable[[], None]) -> None:
    _remove_from_feast(settings, info.version)
    if settings.feast.online == "redis":
        _remove_redis_rows(settings, info.version, still_here)
    for entity in ENTITIES:
        remove_offline(settings, entity, info.version)
    outputs = Store(settings.run.root)
    for manifest in outputs.finished(REFRESH):
        if manifest.facts["version"] == info.version:
            outputs.forget(REFRESH, manifest.key)
    outputs.forget(PUBLISH, f"v{info.version}")


def _remove_from_feast(settings: Settings, version: int) -> None:
    """The service first: nobody finds views that are going. SQLite and PostgreSQL drop the views' tables."""
    store = open_store(settings)
    names = {view_name(entity, version) for entity in ENTITIES}
    with registry_lock(settings):
        service = registered_service(store, version)
        if service is not None:
            store.delete_feature_service(service_name(version))
        going: list[Any] = [
            *(
                view
                for view in store.list_on_demand_feature_views()
                if view.name == f"hllm_affinity_v{version}"
            ),
            *(view for view in store.list_feature_views() if view.name in names),
        ]
        if going:
            store.apply([], objects_to_delete=going, partial=False)


def _remove_redis_rows(settings: Settings, version: int, still_here: Callable[[], None]) -> None:
    redis = connect(settings)
    for entity in ENTITIES:
        with Progress(f"retire {view_name(entity, version)}", 0) as progress:

            def gone(count: int, progress: Progress = progress) -> None:
                still_here()
                progress.advance(count)

            rows_of(settings, entity, version).remove(redis, gone)
