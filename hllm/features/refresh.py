"""`hllm refresh`: new and changed items, and users who were active, with the model that serves.

Rows go into the views of the version that made them; its other rows stay. It may be killed at any moment:
    1. plan.json: from what, and as of when; then the vectors, in shards; then `computed`
    2. online rows, in batches
    3. the moment from which they can be read, fixed once: the event time of step 4
    4. one more offline file (PostgreSQL: rows of that event time), whole or not at all
    5. the manifest: no manifest, no refresh
Of two runs at once one wins, and the other ends with 75 and says who. When another version is promoted
meanwhile, the version that was begun is finished (a rollback finds it fresh), then the new one is refreshed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

import hllm
from hllm.errors import ConfigError, DataError
from hllm.features.export import ITEM, USER, Export, Vectors
from hllm.features.offline import write_offline
from hllm.features.online import publisher, write_online
from hllm.features.publish import STEP as PUBLISH
from hllm.features.publish import export_of, require_published_here
from hllm.features.refreshed import STEP, refreshed
from hllm.features.store import open_store, registry_lock, service_errors
from hllm.features.stores.s3_files import as_feast_reads
from hllm.features.views import offline_source, view_name, views_of
from hllm.models.family import TrainedModel, family
from hllm.pipeline import tokenizer_setting
from hllm.settings import Settings
from hllm.work.artifacts import (
    WORK,
    Manifest,
    Store,
    clear,
    digest_of,
    file_digests,
    file_schemas,
    write_atomically,
)
from hllm.work.ranks import device
from hllm.work.termination import say

if TYPE_CHECKING:
    from hllm.registry.versions import VersionInfo

OWN_FILE = re.compile(r"items\.parquet|users-\d{5}\.parquet")
"""The files of a refresh: others that a plan names are not its own."""
PLAN = "plan.json"
UNCHANGED_TAG = "items_unchanged_at"
"""Of a version: when a look at the catalogue last found nothing new; no refresh is recorded then."""
Kind = Literal["users", "items"]
TEXTS = ("prepare.prompt", "prepare.fields", "prepare.field_template", "prepare.field_separator")


def refresh(settings: Settings, kind: Kind, *, until: str = "") -> None:
    """Bring the serving version's vectors up to date with the validated data of these settings.

    Raises:
        ConfigError: nothing serves, or its model was trained on texts put together in another way.
        DataError: the data were not validated yet.
        InfraError: somebody else writes to this version, or a store does not answer.
    """
    from hllm.registry.versions import serving_version

    info = serving_version(settings)
    if info is None:
        raise ConfigError(
            "no version serves: there is nothing to refresh",
            where=settings.mlflow.model_name,
            remedy="Approve one in Airflow, or run `hllm promote`.",
        )
    while True:
        _refresh(settings, info, kind, _moment(until))
        now = serving_version(settings)
        if now is None or now.version == info.version:
            return
        typer.echo(f"refresh: version {now.version} was promoted meanwhile; {kind} of it follow")
        info = now


def _refresh(settings: Settings, info: VersionInfo, kind: Kind, until: datetime) -> None:
    from hllm.registry.versions import set_tags
    from hllm.work.tracking import finish_lost, version_run

    export, outputs = export_of(settings, info), Store(settings.run.root)
    with service_errors(settings), writing(settings, info, export) as still_here:
        work = Refresh(settings, info, export, kind, outputs, still_here)
        work.finish_leftover()
        source, as_of = work.source(until)
        done = refreshed(settings, info.version, kind)
        if done and done[-1].manifest.facts["source"] == source:
            finish_lost(settings, info, f"refresh-{kind}", done[-1].manifest)
            say(
                f"refresh: reused, {kind} of version {info.version} are as of {done[-1].as_of} "
                "and nothing changed since"
            )
            if kind == "items":
                set_tags(settings, info.version, {UNCHANGED_TAG: until.isoformat()})
            return
        with version_run(settings, info, f"refresh-{kind}", {"as_of": as_of.isoformat()}) as tracker:
            work.compute(source, as_of)
            manifest = work.publish()
            tracker.finish(manifest)
    count = manifest.rows[kind]
    say(
        f"refresh: {count:,} {kind} of version {info.version} as of {manifest.facts['as_of']} in "
        f"{manifest.seconds:.1f} s, readable from {manifest.facts['available_at']}"
    )


@contextmanager
def writing(settings: Settings, info: VersionInfo, export: Export) -> Iterator[Callable[[], None]]:
    """Nobody else writes rows of this version. Yields what says "still here".

    Raises:
        InfraError: somebody does.
        ConfigError: the version is not published in these stores, or was retired meanwhile.
    """
    from hllm.registry.versions import registered_version

    number = info.version
    with (
        Store(settings.run.root).lock(PUBLISH, f"v{number}"),
        publisher(settings, number) as still_here,
    ):
        require_published_here(settings, info, export)
        if not registered_version(settings, str(number)).verified:
            raise ConfigError("is no longer published", where=f"{info.model} version {number}")
        yield still_here


@dataclass
class Refresh:
    """One refresh under way."""

    settings: Settings
    info: VersionInfo
    export: Export
    kind: Kind
    outputs: Store
    still_here: Callable[[], None]

    def __post_init__(self) -> None:
        self.version, self.began = self.info.version, time.monotonic()
        self.before = refreshed(self.settings, self.version)
        mine = [one for one in self.before if one.kind == self.kind]
        self.number = mine[-1].number + 1 if mine else 1
        self.key = f"v{self.version}-{self.kind}-{self.number:04d}"
        self.folder = self.outputs.folder(STEP, self.key)
        self.entity = USER if self.kind == "users" else ITEM

    def source(self, until: datetime) -> tuple[str, datetime]:
        """A digest of what a refresh now would be made from, and how far that reaches in time."""
        validated = self._validated()
        if self.kind == "items":
            return digest_of(validated.files["items.parquet"]), until
        as_of = min(until, _newest(self._log(), until))
        items = sum(one.kind == "items" for one in self.before)
        return digest_of([validated.files["interactions.parquet"], items, as_of.isoformat()]), as_of

    def finish_leftover(self) -> None:
        """A refresh that a killed process had begun to write is written whole before anything new."""
        if self._plan().get("computed"):
            typer.echo(f"refresh: finishing {self.key}, which a process that ended had begun")
            self.publish()
            self.__post_init__()

    def compute(self, source: str, as_of: datetime) -> None:
        """The vectors, in the folder of this refresh; shards of a killed run with the same plan are kept."""
        if self._plan().get("source") != source:
            clear(self.folder)
        started_at = self._plan().get("started_at", self._now().isoformat())
        self._save({"source": source, "as_of": as_of.isoformat(), "started_at": started_at})
        if self.kind == "items":
            self._encode_items()
        else:
            self._encode_users(as_of)
        for path in self._files():
            self.outputs.carry(STEP, self.key, path.name)
        self._save({**self._plan(), "computed": True})

    def publish(self) -> Manifest:
        """Online, then offline, then the manifest."""
        plan, vectors = self._plan(), Vectors(self.folder, self.export.width)
        rows = vectors.rows(self.entity) if self._files() else 0
        store = open_store(self.settings)
        started_at = datetime.fromisoformat(plan["started_at"])
        if rows:
            view = store.get_feature_view(view_name(self.entity, self.version))
            write_online(
                self.settings,
                store,
                view,
                vectors,
                self.entity,
                version=self.version,
                at=started_at,
                start=0,
                written=lambda _: self.still_here(),
            )
        if "available_at" not in plan:
            # Rounded up: a join must never find a vector before it could be read. And no two alike.
            plan["available_at"] = (max(self._now(), started_at) + timedelta(seconds=1)).isoformat()
            self._save(plan)
        if rows:
            self._see_all_files(store)
            write_offline(
                self.settings,
                vectors,
                self.entity,
                version=self.version,
                at=datetime.fromisoformat(plan["available_at"]),
                scratch=self.folder,
                part=f"{self.kind}-{self.number:04d}",
            )
        return self._finish(plan, rows)

    def _now(self) -> datetime:
        """This moment, but later than all that the version's views hold: a clock may be behind."""
        now = datetime.now(UTC).replace(microsecond=0)
        record = self.outputs.manifest(PUBLISH, f"v{self.version}")
        held = [one.available_at for one in self.before if one.kind != "backfill"]
        if record:
            held.append(datetime.fromisoformat(record.facts["available_at"]))
        newest = max(held, default=now)
        if now < newest - timedelta(seconds=2):  # a publication rounds its moment up
            typer.echo(
                f"refresh: this machine's clock ({now.isoformat()}) is behind what version {self.version} "
                f"holds ({newest.isoformat()}): times go on from there",
                err=True,
            )
        return max(now, newest)

    def _encode_items(self) -> None:
        from hllm.embedding.refresh import encode_changed_items
        from hllm.registry.outputs import output_of, require_same_settings

        name = self.info.tags.get("family") or self.settings.model.family
        if "texts" not in family(name).reads:
            typer.echo(f"refresh: {name} knows items by their ids, not by texts: new ones have no vector")
            return
        require_same_settings(
            self.settings, self.info, (*TEXTS, "prepare.max_tokens", tokenizer_setting(self.settings))
        )
        known = [output_of(self.settings, self.info, "prepare") / "items.parquet"]
        known += [one.folder / "items.parquet" for one in self.before if one.kind == "items" and one.entities]
        encode_changed_items(
            self.settings,
            self._fetch() / "items.parquet",
            known,
            output_of(self.settings, self.info, TrainedModel(family(name), 1).train_step),
            self.folder,
            self.folder / WORK,
        )

    def _encode_users(self, as_of: datetime) -> None:
        from hllm.data.engine import duck
        from hllm.embedding.package import Package
        from hllm.embedding.refresh import Log
        from hllm.models.load import load_user_model

        package = self.export.folder / "package"
        ids, vectors_ID = items_of(self.export, self.before)
        published = [self.export.files(USER)]
        published += [one.files(USER) for one in self.before if one.kind == "users" and one.entities]
        until = int(as_of.timestamp())
        with duck.connect(self.folder / WORK, self.settings.run.threads) as db:
            log = Log(db, self._log(), ids, vectors_ID, until, Package.open(package).max_history)
            if log.choose_changed(published):
                model = load_user_model(package).to(device())
                log.write_users(self.settings, model, self.folder, until)

    def _see_all_files(self, store: Any) -> None:
        """Views published by earlier releases read their first file alone: from now on all of them."""
        if self.settings.feast.offline != "file":
            return
        view = store.get_feature_view(view_name(self.entity, self.version))
        pattern = offline_source(self.settings, self.entity, self.version)
        if view.batch_source.path != as_feast_reads(pattern):
            with registry_lock(self.settings):
                views = views_of(self.settings, self.version, view.tags)
                store.apply([views.users, views.items])

    def _finish(self, plan: dict[str, Any], rows: int) -> Manifest:
        clear(self.folder / WORK)
        (self.folder / PLAN).unlink(missing_ok=True)
        files = file_digests(self.folder)
        manifest = Manifest(
            step=STEP,
            key=self.key,
            settings_digest=digest_of(self.settings.feast.model_dump(mode="json")),
            code_version=hllm.__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.began, 3),
            digest=digest_of(files),
            rows={self.kind: rows},
            facts={
                "version": self.version,
                "kind": self.kind,
                "number": self.number,
                "width": self.export.width,
                "source": plan["source"],
                "as_of": plan["as_of"],
                "started_at": plan["started_at"],
                "available_at": plan["available_at"],
            },
            files=files,
            schema=file_schemas(self.folder, files),
        )
        self.outputs.finish(manifest, carried=set(files))
        return manifest

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("users-*.parquet" if self.kind == "users" else "items.parquet"))

    def _plan(self) -> dict[str, Any]:
        path = self.folder / PLAN
        if not path.exists() and not self.outputs.bring(STEP, self.key, PLAN):
            return {}
        try:
            plan = dict(json.loads(path.read_bytes()))
            moments = [plan[name] for name in ("started_at", "available_at", "as_of") if name in plan]
            for moment in moments:
                datetime.fromisoformat(moment)
            names = [name for name in plan.get("files", ()) if OWN_FILE.fullmatch(name)]
        except (ValueError, TypeError, RecursionError):  # half a file, or somebody's hand: begun anew
            path.unlink()
            return {}
        for name in names:
            if not (self.folder / name).exists():
                self.outputs.bring(STEP, self.key, name)
        return plan

    def _save(self, plan: dict[str, Any]) -> None:
        names = [path.name for path in self._files()] if plan.get("computed") or plan.get("files") else []
        write_atomically(self.folder / PLAN, json.dumps({**plan, "files": names}).encode())
        self.outputs.carry(STEP, self.key, PLAN)

    def _validated(self) -> Manifest:
        return validated(self.settings)

    def _fetch(self) -> Path:
        return self.outputs.fetch("validate", self._validated().key)

    def _log(self) -> Path:
        return self._fetch() / "interactions.parquet"


def validated(settings: Settings) -> Manifest:
    """The validated tables of today's source.

    Raises:
        DataError: there are none yet.
    """
    from hllm.pipeline import keys

    found = Store(settings.run.root).manifest("validate", keys(settings)["validate"])
    if found is None:
        raise DataError(
            "needs the output of validate, which has not run with these settings and data",
            where="refresh",
            remedy="Run `hllm ingest` and `hllm validate` with the same settings first.",
        )
    return found


def items_of(export: Export, before: list[Any]) -> tuple[Any, Any]:
    """Ids (Arrow) and vectors (I, D) of a version's items: the package's, in its order, then new ones."""
    import numpy as np
    import pyarrow as pa

    from hllm.embedding.package import Package

    package = Package.open(export.folder / "package")
    ids, vectors_ID = package.item_ids, package.item_vectors
    later = [one for one in before if one.kind == "items" and one.entities]
    if later:
        rows = {name: row for row, name in enumerate(ids)}
        ids = list(ids)
        found = [batch for one in later for batch in one.batches(ITEM, 50_000)]
        new = [name for batch in found for name in batch.ids if name not in rows]
        for name in dict.fromkeys(new):
            rows[name] = len(ids)
            ids.append(name)
        whole = np.empty((len(ids), export.width), np.float32)
        whole[: len(vectors_ID)] = vectors_ID
        for batch in found:
            whole[[rows[name] for name in batch.ids]] = batch.vectors_ND
        vectors_ID = whole
    return pa.array(ids, pa.string()), vectors_ID


def _newest(log: Path, until: datetime) -> datetime:
    """The newest event that is not later than `until`."""
    import duckdb

    from hllm.data.engine import duck

    query = f"SELECT max(timestamp) FROM {duck.parquet(log)} WHERE timestamp <= {int(until.timestamp())}"
    with duckdb.connect() as db:
        found = db.execute(query).fetchall()[0][0]
    if found is None:
        raise DataError(f"has no event until {until.isoformat()}", where=str(log))
    return datetime.fromtimestamp(found, UTC)


def _moment(text: str) -> datetime:
    """Now, or the moment that was typed: a day is its beginning (UTC)."""
    if not text:
        return datetime.now(UTC).replace(microsecond=0)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            "is not an ISO 8601 time", where=f"--until {text}", remedy="Like 2026-03-01."
        ) from None
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    if found > datetime.now(UTC) + timedelta(days=1) or found.year < 1971:
        raise ConfigError("is no moment that events can be known until", where=f"--until {text}")
    return found
