"""`hllm publish`: a version's vectors into Feast, under names of their own.

The order makes every moment safe to be killed in:
    1. the two views, tagged with the export's digest and the moment the publication began: from here on the
       registry itself refuses other data under this version's name
    2. the online rows, in batches; progress.json says how far, a batch written twice is the same rows, and
       what Redis lost since (a restart) is found and written again
    3. the service, tagged with the moment from which its rows can be read: the event time of step 4
    4. the offline tables, each whole or not at all
    5. the manifest: no manifest, no publication
The tag `publication` of the MLflow version says `publishing` from the start and `published` after the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import hllm
from hllm.errors import ConfigError, DataError
from hllm.features.export import ENTITIES, ITEM, USER, Entity, Export
from hllm.features.offline import write_offline
from hllm.features.online import kept_until, publisher, require_room_for, write_online
from hllm.features.refreshed import Refreshed, refreshed
from hllm.features.store import open_store, registry_lock, renew_registry, service_errors, write_yaml
from hllm.features.views import Views, service_name, view_name, views_of
from hllm.settings import Settings
from hllm.work.artifacts import (
    MANIFEST,
    Manifest,
    Store,
    digest_of,
    file_digests,
    read_object,
    upload,
    write_atomically,
)
from hllm.work.termination import say

if TYPE_CHECKING:
    from feast import FeatureStore

    from hllm.registry.versions import VersionInfo

STEP = "publish"
PROGRESS = "progress.json"
DONE = ("published", "verified")


def publish(settings: Settings, version: str | None = None) -> None:
    """Publish a registered version, continue a publication that was killed, or find that it is done.

    A version that serves is never written again: `publication` would no longer say `verified`, and readers
    would be without a model.

    Raises:
        ConfigError: the version serves, and these settings are not those it was published with.
        DataError: the export is damaged, or the name is taken by other data.
        InfraError: a store did not answer; the same command continues.
    """
    from hllm.registry.versions import registered_version, serving_version, set_tags
    from hllm.work.tracking import finish_lost, version_run

    info = registered_version(settings, version)
    outputs, key = Store(settings.run.root), f"v{info.version}"
    export = export_of(settings, info, again=True)
    with (
        service_errors(settings),
        outputs.lock(STEP, key),
        publisher(settings, info.version) as still_here,
    ):
        folder = outputs.folder(STEP, key)
        done = outputs.manifest(STEP, key)
        same = done and done.settings_digest == identity(settings, export)
        whole = same and info.tags.get("publication") in DONE
        if done and whole and registered_service(open_store(settings), info.version) is not None:
            counts = _counts(done.rows)
            finish_lost(settings, info, STEP, done)
            say(f"publish: reused, version {info.version} was published {done.created_at} ({counts})")
            return
        serving = serving_version(settings)
        if serving and serving.version == info.version:
            raise _serves_elsewhere(settings, info, done is not None, bool(same))
        (folder / MANIFEST).unlink(missing_ok=True)
        require_room_for(settings, export, info.version)
        set_tags(settings, info.version, {"publication": "publishing"})
        with version_run(settings, info, STEP, settings.feast.model_dump(mode="json")) as tracker:
            manifest = Publication(
                settings, export, info.version, outputs, resume=done is None, still_here=still_here
            ).run()
            tracker.finish(manifest)
        set_tags(settings, info.version, {"publication": "published"})
    online = manifest.facts
    rate = online["written"] / max(online["online_seconds"], 1e-9)
    say(
        f"publish: version {info.version} in {manifest.seconds:.1f} s "
        f"({_counts(manifest.rows)}; online {rate:,.0f} rows/s), "
        f"service {service_name(info.version)} -> {settings.feast.online} {settings.feast.online_url}"
    )
    typer.echo(f"  for plain Feast: {outputs.location(STEP, key)}/feature_store.yaml")


def publish_again(settings: Settings, version: str | None = None) -> None:
    """Register a published version anew and write its rows again, from the record of its publication, its
    export and what was refreshed since: where the registry, online rows or offline files were lost. The same
    rows with the same times are written, so readers of a version that serves see no other rows meanwhile.

    Raises:
        ConfigError: it was published to other stores than these.
        DataError: it has no record of a publication, or its export is gone.
        InfraError: a store did not answer; the same command continues.
    """
    from hllm.registry.versions import registered_version
    from hllm.work.tracking import version_run

    info = registered_version(settings, version)
    outputs, key = Store(settings.run.root), f"v{info.version}"
    export = export_of(settings, info, again=True)
    require_published_here(settings, info, export)
    with (
        service_errors(settings),
        outputs.lock(STEP, key),
        publisher(settings, info.version) as still_here,
        version_run(settings, info, "publish-again", settings.feast.model_dump(mode="json")) as tracker,
    ):
        record = outputs.manifest(STEP, key)
        assert record is not None  # noqa: S101 - required above
        renewed = renew_registry(settings)
        publication = Publication(
            settings, export, info.version, outputs, resume=False, still_here=still_here, record=record
        )
        tracker.finish(publication.run())
    others = "; other versions' views are to be registered the same way" if renewed else ""
    say(f"publish: version {info.version} written again ({_counts(record.rows)}){others}")


def _serves_elsewhere(settings: Settings, info: VersionInfo, recorded: bool, same: bool) -> ConfigError:
    if not recorded:
        why = f"{publication_folder(settings, info.version)} has no record of its publication"
    elif not same:
        why = "it was published to other stores than those in [feast], or from another export"
    else:
        why = f"the Feast registry {settings.feast.registry} has no service {service_name(info.version)}"
    return ConfigError(
        f"serves now and is not published again: {why}",
        where=f"{info.model} version {info.version}",
        remedy="Are run.root and [feast] the ones it was published with? To publish it elsewhere, or again, "
        "first let another version serve (`hllm promote`, `hllm rollback`), or take this one out of service "
        "yourself: in MLflow, set its tag `publication` to `publishing`.",
    )


def require_published_here(settings: Settings, info: VersionInfo, export: Export) -> None:
    """These settings name the stores that a version was published to.

    Raises:
        ConfigError: they name others.
        DataError: there is no record of its publication.
    """
    key = f"v{info.version}"
    outputs = Store(settings.run.root)
    done = outputs.manifest(STEP, key)
    if done is None:
        raise DataError(
            f"has no record of its publication in {outputs.location(STEP, key)}",
            where=f"{info.model} version {info.version}",
            remedy="Is run.root the one it was published with?",
        )
    if done.settings_digest != identity(settings, export):
        raise ConfigError(
            "was published to other stores than those in [feast], or from another export",
            where=f"{info.model} version {info.version}",
            remedy=f"{outputs.folder(STEP, key) / 'feature_store.yaml'} says which stores they were.",
        )


def export_of(settings: Settings, info: VersionInfo, again: bool = False) -> Export:
    """The export behind a version, fetched if it lives in S3. `again`: all of its bytes are read and compared
    with their digests, whatever is remembered of them."""
    return Export.open(Store(settings.run.root).fetch(*info.output(settings), again=again))


def identity(settings: Settings, export: Export) -> str:
    """What was published and where to: another store needs another publication."""
    where = settings.feast.model_dump(
        include={"project", "registry", "online", "online_url", "offline", "offline_path"}
    )
    return digest_of({"export": export.manifest.digest, "where": where})


def registered_service(store: FeatureStore, version: int) -> Any | None:
    """The version's feature service, or None before it is there."""
    return next(
        (service for service in store.list_feature_services() if service.name == service_name(version)), None
    )


@dataclass
class Publication:
    """One publication under way."""

    settings: Settings
    export: Export
    version: int
    outputs: Store
    resume: bool
    """False when an earlier publication ended but was found damaged: everything is written again."""
    still_here: Callable[[], None]
    record: Manifest | None = None
    """Of the publication that is written again: its moments stay."""

    def __post_init__(self) -> None:
        self.key = f"v{self.version}"
        self.folder = self.outputs.folder(STEP, self.key)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = open_store(self.settings)

    def run(self) -> Manifest:
        began = time.monotonic()
        views, started_at = self._register_views()
        progress = self._read_progress(started_at)
        written, online_began = 0, time.monotonic()
        for entity in ENTITIES:
            start = kept_until(self.settings, self.export, entity, self.version, progress.get(entity.name, 0))
            self._write_online(views, entity, started_at, progress, start)
            written += self.export.rows(entity) - start
        later = refreshed(self.settings, self.version)  # none, unless all of it is written again
        self._write_online_again(views, later)
        online_seconds = time.monotonic() - online_began
        available_at = self._register_service(views)
        for entity in ENTITIES:
            write_offline(
                self.settings, self.export, entity, version=self.version, at=available_at, scratch=self.folder
            )
        for one in later:
            for entity in one.entities:
                write_offline(
                    self.settings,
                    one,
                    entity,
                    version=self.version,
                    at=one.available_at,
                    scratch=self.folder,
                    part=one.part,
                )
        write_yaml(self.settings, self.folder)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return self._finish(
            started_at, available_at, began, {"written": written, "online_seconds": round(online_seconds, 3)}
        )

    def _register_views(self) -> tuple[Views, datetime]:
        """The views of this version, and the moment its publication began, as the registry knows it."""
        with registry_lock(self.settings):
            name = view_name(USER, self.version)  # the first that is registered
            known = next((view for view in self.store.list_feature_views() if view.name == name), None)
            model = self.settings.mlflow.model_name
            if known and known.tags.get("model") != model:
                raise ConfigError(
                    f"{name} belongs to the registered model {known.tags.get('model')}, not to {model}",
                    where=f"Feast project {self.settings.feast.project}",
                    remedy="Every registered model needs a Feast project of its own: set feast.project.",
                )
            if known and known.tags.get("export") != self.export.manifest.digest:
                raise DataError(
                    f"{name} already holds the vectors of another export "
                    f"({known.tags.get('export')}, not {self.export.manifest.digest})",
                    where=f"Feast project {self.settings.feast.project}",
                    remedy="Versions are never overwritten. "
                    "Do two MLflow registries share this Feast project? Then set feast.project.",
                )
            started_at = (
                datetime.fromisoformat(known.tags["started_at"])
                if known
                else self._moment("started_at") or datetime.now(UTC).replace(microsecond=0)
            )
            views = views_of(self.settings, self.version, self._tags(started_at))
            there = {entity.name for entity in self.store.list_entities()}
            new: list[Any] = [entity for entity in views.entities if entity.name not in there]
            self.store.apply([*new, views.users, views.items, views.affinity])
        return views, started_at

    def _moment(self, name: str) -> datetime | None:
        """When it happened in the publication that is written again."""
        return datetime.fromisoformat(self.record.facts[name]) if self.record else None

    def _tags(self, started_at: datetime) -> dict[str, str]:
        facts = self.export.manifest.facts
        return {
            "model": self.settings.mlflow.model_name,
            "model_version": str(self.version),
            "family": str(facts.get("family", "")),
            "width": str(self.export.width),
            "as_of": str(facts.get("as_of", "")),
            "export": self.export.manifest.digest,
            "started_at": started_at.isoformat(),
        }

    def _write_online(
        self, views: Views, entity: Entity, started_at: datetime, progress: dict[str, Any], start: int
    ) -> None:
        def written(rows: int) -> None:
            self.still_here()
            progress[entity.name] = rows
            self._save(PROGRESS, progress)

        write_online(
            self.settings,
            self.store,
            views.of(entity),
            self.export,
            entity,
            version=self.version,
            at=started_at,
            start=start,
            written=written,
        )

    def _write_online_again(self, views: Views, later: list[Refreshed]) -> None:
        """What was refreshed since, over what was just written."""
        for one in later:
            for entity in one.entities if one.kind != "backfill" else ():
                write_online(
                    self.settings,
                    self.store,
                    views.of(entity),
                    one,
                    entity,
                    version=self.version,
                    at=datetime.fromisoformat(one.manifest.facts["started_at"]),
                    start=0,
                    written=lambda _: self.still_here(),
                )

    def _register_service(self, views: Views) -> datetime:
        """Open the version for reading. The moment is fixed once; a resumed publication finds it there.

        Rounded up to a whole second: a join must never find a vector before it could be read."""
        known = registered_service(self.store, self.version)
        if known is not None:
            return datetime.fromisoformat(known.tags["available_at"])
        soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
        available_at = self._moment("available_at") or soon
        started_at = datetime.fromisoformat(views.users.tags["started_at"])
        with registry_lock(self.settings):
            self.store.apply(
                [
                    views.service(
                        self.version, {**self._tags(started_at), "available_at": available_at.isoformat()}
                    )
                ]
            )
        return available_at

    def _read_progress(self, started_at: datetime) -> dict[str, Any]:
        of = {"identity": identity(self.settings, self.export), "started_at": started_at.isoformat()}
        path = self.folder / PROGRESS
        try:
            text = path.read_bytes() if path.exists() else self._remote(PROGRESS)
            found = json.loads(text) if text and self.resume else {}
        except ValueError:
            found = {}
        return found if of.items() <= found.items() else of

    def _remote(self, name: str) -> bytes | None:
        return read_object(f"{self.outputs.location(STEP, self.key)}/{name}") if self.outputs.remote else None

    def _save(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / name, json.dumps(content).encode())
        if self.outputs.remote:
            upload(self.folder / name, f"{self.outputs.location(STEP, self.key)}/{name}")

    def _finish(
        self, started_at: datetime, available_at: datetime, began: float, facts: dict[str, Any]
    ) -> Manifest:
        files, registry = file_digests(self.folder), self.settings.feast.registry
        manifest = Manifest(
            step=STEP,
            key=self.key,
            settings_digest=identity(self.settings, self.export),
            code_version=hllm.__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 3),
            digest=digest_of(files),
            rows={f"{entity.name}s": self.export.rows(entity) for entity in ENTITIES},
            facts={
                **facts,
                "service": service_name(self.version),
                "views": [view_name(entity, self.version) for entity in (USER, ITEM)],
                "started_at": started_at.isoformat(),
                "available_at": available_at.isoformat(),
                "export": self.export.manifest.digest,
                "registry": registry if "://" in registry else str(Path(registry).absolute()),
            },
            files=files,
        )
        self.outputs.finish(manifest)
        return manifest


def _counts(rows: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in rows.items())


def publication_folder(settings: Settings, version: int) -> Path:
    """Where a publication keeps its manifest and the feature_store.yaml for plain Feast users."""
    return Store(settings.run.root).folder(STEP, f"v{version}")
