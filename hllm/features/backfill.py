"""`hllm backfill`: user vectors of past days, for ranking models that train on the days before a publication.

For each day, the vectors that a daily refresh after its end would have made: of its active users (on the
first day of everybody known until then), from events until the end of the day. Their event time is the end of
the day plus `feast.publication_lag_minutes`: the moment from which they could have been read. Items get their
vectors at the first of these moments. Only the offline store is written: what is read online is newer.

The model has learned from the events until `trained_until`; vectors of those days have seen what ranking
models are asked to predict. Such days are refused, unless they are asked for; the record of the day, the name
of its file and the tag `leaks_until` of the feature service then say so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

import hllm
from hllm.errors import ConfigError, DataError
from hllm.features.export import ITEM, USER, Export, Vectors
from hllm.features.offline import write_offline
from hllm.features.publish import export_of, registered_service
from hllm.features.refresh import items_of, validated, writing
from hllm.features.refreshed import STEP, refreshed
from hllm.features.store import open_store, registry_lock, service_errors
from hllm.settings import Settings
from hllm.work.artifacts import WORK, Manifest, Store, clear, digest_of, file_digests, file_schemas
from hllm.work.ranks import device
from hllm.work.termination import say

if TYPE_CHECKING:
    from hllm.registry.versions import VersionInfo

LEAKS_TAG = "leaks_until"


def backfill(settings: Settings, first: str, last: str, *, inside_training: bool = False) -> None:
    """Write the serving version's user vectors of every day from `first` to `last` (both included, UTC).

    Raises:
        ConfigError: a day is none, lies inside the model's training window and was not asked for, or after
            the version's own publication.
    """
    from hllm.registry.versions import serving_version

    info = serving_version(settings)
    if info is None:
        raise ConfigError(
            "no version serves: there is nothing to back-fill", where=settings.mlflow.model_name
        )
    days = list(_days(first, last))
    export = export_of(settings, info)
    with service_errors(settings), writing(settings, info, export):
        trained_until = _trained_until(settings, info)
        leaking = [day for day in days if _end(day) <= trained_until]
        if leaking and not inside_training:
            raise ConfigError(
                f"version {info.version} has learned from events until {trained_until.isoformat()}",
                where="backfill",
                count=(len(leaking), len(days)),
                examples=leaking,
                remedy="Vectors of these days have seen the future of a ranking model's training rows. "
                f"Begin on {trained_until.date()}; or, if you know why you want them, add --inside-training.",
            )
        _BackFill(settings, info, export, days).run(leaking, trained_until)


@dataclass
class _BackFill:
    settings: Settings
    info: VersionInfo
    export: Export
    days: list[date]

    def run(self, leaking: list[date], trained_until: datetime) -> None:
        from hllm.data.engine import duck
        from hllm.embedding.package import Package
        from hllm.embedding.refresh import Log
        from hllm.models.load import load_user_model
        from hllm.work.tracking import version_run

        settings, outputs = self.settings, Store(self.settings.run.root)
        self._refuse_days_after_publication()
        if leaking:
            self._mark(trained_until)
        table = outputs.fetch("validate", validated(settings).key) / "interactions.parquet"
        ids, vectors_ID = items_of(self.export, refreshed(settings, self.info.version))
        package = self.export.folder / "package"
        model = load_user_model(package).to(device())
        span = {"from": self.days[0].isoformat(), "to": self.days[-1].isoformat()}
        scratch = outputs.folder(STEP, f"v{self.info.version}-backfill") / WORK
        with version_run(settings, self.info, "backfill", span), duck.connect(scratch) as db:
            until = int(_end(self.days[-1]).timestamp()) - 1
            log = Log(db, table, ids, vectors_ID, until, Package.open(package).max_history)
            for day in self.days:
                start = None if day == self.days[0] else int(_end(day).timestamp()) - 86_400
                key = f"v{self.info.version}-backfill-{day}{'-inside-training' if day in leaking else ''}"
                if outputs.manifest(STEP, key):
                    say(f"backfill: reused, {day} of version {self.info.version} is there")
                    continue
                began, folder = time.monotonic(), outputs.folder(STEP, key)
                clear(folder)
                folder.mkdir(parents=True)
                end = int(_end(day).timestamp())
                users = log.choose_active(start, end)
                if users:
                    log.write_users(settings, model, folder, end - 1)
                items = self._write_items(folder, ids, vectors_ID) if start is None else 0
                self._publish(outputs, key, day, {"users": users, "items": items}, day in leaking, began)
        clear(scratch.parent)

    def _write_items(self, folder: Path, ids: pa.Array, vectors_ID: Any) -> int:
        import pyarrow.parquet as parquet

        from hllm.embedding.export import ROW_GROUP, vector_column

        table = pa.table({"item_id": ids, "vector": vector_column(vectors_ID)})
        parquet.write_table(table, folder / "items.parquet", row_group_size=ROW_GROUP)
        return len(ids)

    def _publish(
        self, outputs: Store, key: str, day: date, rows: dict[str, int], leaks: bool, began: float
    ) -> None:
        folder, width = outputs.folder(STEP, key), self.export.width
        at = _end(day) + timedelta(minutes=self.settings.feast.publication_lag_minutes)
        vectors = Vectors(folder, width)
        for entity in (USER, ITEM):
            if rows[f"{entity.name}s"]:
                write_offline(
                    self.settings,
                    vectors,
                    entity,
                    version=self.info.version,
                    at=at,
                    scratch=folder,
                    part=key.partition("-")[2],
                )
        files = file_digests(folder)
        manifest = Manifest(
            step=STEP,
            key=key,
            settings_digest=digest_of(self.settings.feast.model_dump(mode="json")),
            code_version=hllm.__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 3),
            digest=digest_of(files),
            rows=rows,
            facts={
                "version": self.info.version,
                "kind": "backfill",
                "number": day.toordinal(),
                "width": width,
                "as_of": _end(day).isoformat(),
                "available_at": at.isoformat(),
                "started_at": at.isoformat(),
                "inside_training": leaks,
            },
            files=files,
            schema=file_schemas(folder, files),
        )
        outputs.finish(manifest)
        mark = ", INSIDE the model's training window" if leaks else ""
        say(
            f"backfill: {day}, {rows['users']:,} users of version {self.info.version}, readable from "
            f"{at.isoformat()}{mark}"
        )

    def _refuse_days_after_publication(self) -> None:
        service = registered_service(open_store(self.settings), self.info.version)
        published = datetime.fromisoformat(service.tags["available_at"]) if service else datetime.max
        lag = timedelta(minutes=self.settings.feast.publication_lag_minutes)
        late = [day for day in self.days if _end(day) + lag >= published]
        if late:
            raise ConfigError(
                f"version {self.info.version} could be read from {published.isoformat()} on",
                where="backfill",
                count=(len(late), len(self.days)),
                examples=late,
                remedy="From then on its real vectors are there: of the publication and of every refresh.",
            )

    def _mark(self, trained_until: datetime) -> None:
        """The service says until when training rows may read vectors that saw their future."""
        store = open_store(self.settings)
        service = registered_service(store, self.info.version)
        if service is None:
            raise DataError("has no feature service", where=f"version {self.info.version}")
        service.tags[LEAKS_TAG] = trained_until.isoformat()
        with registry_lock(self.settings):
            store.apply([service])


def _trained_until(settings: Settings, info: VersionInfo) -> datetime:
    from hllm.data.prepared import Prepared
    from hllm.registry.outputs import output_of

    prepared = Prepared.open(output_of(settings, info, "prepare"))
    return datetime.fromtimestamp(prepared.trained_until, UTC)


def _days(first: str, last: str) -> Iterator[date]:
    found = []
    for option, typed in (("--from", first), ("--to", last)):
        try:
            found.append(date.fromisoformat(typed))
        except ValueError:
            raise ConfigError("is not a day", where=f"{option} {typed}", remedy="Like 2026-03-01.") from None
    if found[0] > found[1]:
        raise ConfigError("lies after --to", where=f"--from {first}")
    return (found[0] + timedelta(days=n) for n in range((found[1] - found[0]).days + 1))


def _end(day: date) -> datetime:
    """The moment at which a day is over, UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)
