"""What is looked at of a serving version: each one number, its limit, and what to do beyond it.

All of it on samples of bounded size, drawn anew each day by the hash of the id, read as ranking models read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hllm.data.engine import duck
from hllm.features.export import ITEM, USER, Entity, Export
from hllm.features.publish import export_of, registered_service
from hllm.features.refresh import PLAN, UNCHANGED_TAG
from hllm.features.refreshed import STEP as REFRESH
from hllm.features.refreshed import refreshed
from hllm.features.store import open_store
from hllm.features.views import view_name
from hllm.foreign_errors import as_ours
from hllm.registry import versions
from hllm.registry.promote import REPLACED_TAG
from hllm.registry.versions import VersionInfo
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work.artifacts import MANIFEST, Store
from hllm.work.objects import head_object, list_objects

if TYPE_CHECKING:
    from feast import FeatureStore

READ_ROWS = 500
PAIRS_OF = 300
"""Items whose likenesses to each other are compared between versions."""


@dataclass(frozen=True)
class Look:
    """One number of a version."""

    name: str
    """As Prometheus calls it, behind `hllm_watch_`."""
    title: str
    value: float
    least: float | None = None
    most: float | None = None
    remedy: str = ""

    @property
    def alert(self) -> bool:
        too_little = self.least is not None and not self.value >= self.least
        too_much = self.most is not None and not self.value <= self.most
        return too_little or too_much

    @property
    def limit(self) -> str:
        if self.least is not None:
            return f"at least {self.least:g}"
        return f"at most {self.most:g}" if self.most is not None else ""

    @property
    def says(self) -> str:
        return f"{self.title} is {self.value:.4g} ({self.limit}): {self.remedy}"


def trouble(name: str, title: str, error: Exception) -> Look:
    """An alert, for an error that must not keep the others from being told."""
    said = " ".join(str(as_ours(error) or error).split())[:500]
    return Look(name, title, 1, most=0, remedy=said or type(error).__name__)


@dataclass
class Watched:
    """A version under the eye."""

    settings: Settings
    info: VersionInfo
    now: datetime

    @cached_property
    def store(self) -> FeatureStore:
        return open_store(self.settings)

    @cached_property
    def export(self) -> Export:
        return export_of(self.settings, self.info)

    def looks(self) -> Iterator[Look]:
        for name in ("freshness", "coverage", "soundness", "drift", "leftovers"):
            try:
                yield from getattr(self, name)()
            except Exception as error:  # whatever is broken, the others are looked at
                yield trouble(f"{name}_unknown", f"{name} could not be looked at", error)

    def freshness(self) -> Iterator[Look]:
        limits, service = self.settings.watch, registered_service(self.store, self.info.version)
        published = (
            datetime.fromisoformat(service.tags["available_at"])
            if service
            else datetime(1970, 1, 1, tzinfo=UTC)
        )
        for kind, most, why in (
            ("users", limits.max_user_hours, "does the log still grow, "),
            ("items", limits.max_item_hours, ""),
        ):
            last = [one.available_at for one in refreshed(self.settings, self.info.version, kind)]
            if kind == "items" and UNCHANGED_TAG in self.info.tags:  # a catalogue may be quiet for days
                last.append(datetime.fromisoformat(self.info.tags[UNCHANGED_TAG]))
            hours = (self.now - max([published, *last])) / timedelta(hours=1)
            yield Look(
                f"{kind}_age_hours",
                f"hours since {kind} were brought up to date",
                max(hours, 0.0),
                most=most,
                remedy=f"{why}does the DAG hllm_{kind} run, is it switched on? By hand: `hllm ingest`, "
                f"`hllm validate`, `hllm refresh {kind}`.",
            )

    def coverage(self) -> Iterator[Look]:
        """Of active users and of the catalogue, as the newest validated data know them: the source moves on,
        and the next refresh has not read it yet."""
        limits, outputs = self.settings.watch, Store(self.settings.run.root)
        name = self.settings.run.name
        read = [one for one in outputs.finished("validate") if one.facts.get("run") == name]
        if not read:
            yield Look(
                "data_missing",
                "data not read yet",
                1,
                most=0,
                remedy="coverage is unknown: run `hllm ingest` and `hllm validate` with these settings.",
            )
            return
        folder = outputs.fetch("validate", read[-1].key)
        log = duck.parquet(folder / "interactions.parquet")
        since = f"(SELECT max(timestamp) FROM {log}) - {int(limits.active_days * 86_400)}"
        users = self._sample(f"SELECT DISTINCT user_id AS id FROM {log} WHERE timestamp >= {since}")
        items = self._sample(f"SELECT item_id AS id FROM {duck.parquet(folder / 'items.parquet')}")
        for entity, names, least, what in (
            (USER, users, limits.min_user_coverage, "active users"),
            (ITEM, items, limits.min_item_coverage, "items of the catalogue"),
        ):
            vectors = self.online(entity, names, self.info.version)
            yield Look(
                f"{entity.name}_coverage",
                f"share of {what} with a vector",
                sum(vector is not None for vector in vectors) / max(len(vectors), 1),
                least=least,
                remedy=f"run `hllm refresh {entity.name}s`; if it finds nothing to do, ids of the log and of "
                "the store differ, or the model cannot read these items.",
            )

    def soundness(self) -> Iterator[Look]:
        """What was published reads back: not null, of unit length, the same online and offline."""
        limits, version = self.settings.watch, self.info.version
        nulls = differ = rows = 0
        norms: list[float] = [0.0]
        for entity in (USER, ITEM):
            names = self._published(entity)
            online = self.online(entity, names, version)
            offline = self.offline(entity, names, version)
            rows += len(names)
            nulls += sum(vector is None for vector in online)
            there = [vector for vector in online if vector is not None]
            norms += [abs(float(np.linalg.norm(vector.astype(np.float64))) - 1) for vector in there]
            differ += sum(
                one is not None and (other is None or one.tobytes() != other.tobytes())
                for one, other in zip(online, offline, strict=True)
            )
        remedy = (
            f"compare all of it: `hllm verify --version {version}`; until that is settled, `hllm rollback`."
        )
        yield Look(
            "null_rate",
            "share of published ids that read as null",
            nulls / rows,
            most=limits.max_null_rate,
            remedy=remedy,
        )
        yield Look(
            "norm_drift",
            "largest distance of a length from 1",
            max(norms),
            most=limits.max_norm_drift,
            remedy=remedy,
        )
        yield Look(
            "online_offline_mismatch", "rows that differ online and offline", differ, most=0, remedy=remedy
        )

    def drift(self) -> Iterator[Look]:
        """This version beside the one it replaced."""
        before = versions.version_named(self.settings, self.info.tags.get(REPLACED_TAG, ""))
        if before is None or not before.verified:
            return
        names = self._published(ITEM)[:PAIRS_OF]
        pairs = [
            (one, other)
            for one, other in zip(
                self.online(ITEM, names, self.info.version),
                self.online(ITEM, names, before.version),
                strict=True,
            )
            if one is not None and other is not None
        ]
        if len(pairs) < 3:
            return
        now_ID, then_ID = (np.stack(side).astype(np.float64) for side in zip(*pairs, strict=True))
        if now_ID.shape == then_ID.shape:
            yield Look(
                "cosine_to_previous",
                "mean cosine of items to the version before",
                float((now_ID * then_ID).sum(1).mean()),
            )
        upper = np.triu_indices(len(pairs), 1)
        alike = np.corrcoef((now_ID @ now_ID.T)[upper], (then_ID @ then_ID.T)[upper])[0, 1]
        yield Look(
            "agreement_with_previous",
            "correlation of how alike items are, with the version before",
            float(alike),
            least=self.settings.watch.min_agreement,
            remedy="this model sees the catalogue in another way: look at both reports, and `hllm rollback` "
            "if the ranking models' figures fell.",
        )

    def leftovers(self) -> Iterator[Look]:
        """Work that was begun and not finished."""
        hours = self.settings.watch.max_hours_unfinished
        old = self.now - timedelta(hours=hours)
        plans = [name for name, begun in begun_refreshes(Store(self.settings.run.root)) if begun < old]
        with server.mlflow_errors(self.settings):
            client = server.client(self.settings)
            experiment = client.get_experiment_by_name(self.settings.run.name)
            condition = (
                f"attributes.status = 'RUNNING' AND attributes.start_time < {int(old.timestamp() * 1000)}"
            )
            runs = client.search_runs([experiment.experiment_id], condition) if experiment else []
        steps = [run.data.tags.get("hllm.step", "") for run in runs]
        left = [*plans, *(step for step in steps if step)]
        yield Look(
            "unfinished",
            f"unfinished work older than {hours:g} h",
            len(left),
            most=0,
            remedy=f"run again what stopped ({', '.join(sorted(left)[:3])}): each continues where it was. "
            "What nobody will run again, `hllm prune --keep-days 1` ends.",
        )

    def online(self, entity: Entity, names: list[str], version: int) -> list[npt.NDArray[np.float32] | None]:
        feature = f"{view_name(entity, version)}:{entity.vector}"
        found: list[Any] = []
        for start in range(0, len(names), READ_ROWS):
            rows = [{entity.join_key: name} for name in names[start : start + READ_ROWS]]
            found += self.store.get_online_features(features=[feature], entity_rows=rows).to_dict()[
                entity.vector
            ]
        return [None if vector is None else np.asarray(vector, np.float32) for vector in found]

    def offline(self, entity: Entity, names: list[str], version: int) -> list[npt.NDArray[np.float32] | None]:
        """What a training row of now would read."""
        import pandas as pd

        soon = pd.Timestamp(self.now) + pd.Timedelta(seconds=2)  # event times are rounded up
        frame = pd.DataFrame({entity.join_key: names, "event_timestamp": soon})
        feature = f"{view_name(entity, version)}:{entity.vector}"
        read = self.store.get_historical_features(entity_df=frame, features=[feature]).to_arrow()
        found = dict(zip(read[entity.join_key].to_pylist(), read[entity.vector].to_pylist(), strict=True))
        vectors = [found.get(name) for name in names]
        return [None if vector is None else np.asarray(vector, np.float32) for vector in vectors]

    def _published(self, entity: Entity) -> list[str]:
        files = [str(path) for path in self.export.files(entity)]
        listed = ", ".join(duck.text(path) for path in files)
        return self._sample(f"SELECT {entity.join_key} AS id FROM read_parquet([{listed}])")

    def _sample(self, query: str) -> list[str]:
        """The same all day, others tomorrow."""
        import duckdb

        day = self.now.date().isoformat()
        most = self.settings.watch.sample
        chosen = f"SELECT id FROM ({query}) ORDER BY hash(id || {duck.text(day)}) LIMIT {most}"
        with duckdb.connect() as db:
            return [name for (name,) in db.execute(chosen).fetchall()]


def begun_refreshes(outputs: Store) -> Iterator[tuple[str, datetime]]:
    """Refreshes that are not finished, and when they were last worked at."""
    if not outputs.remote:
        for path in (outputs.local / REFRESH).glob(f"*/{PLAN}"):
            if not (path.parent / MANIFEST).exists():
                yield path.parent.name, datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return
    there = set(list_objects(f"{outputs.root}/{REFRESH}/"))
    for place in sorted(there):
        folder, _, name = place.rpartition("/")
        if name == PLAN and f"{folder}/{MANIFEST}" not in there:
            yield folder.rpartition("/")[2], head_object(place)["LastModified"]


def folder_of(settings: Settings) -> Path:
    return Store(settings.run.root).local / "watch"
