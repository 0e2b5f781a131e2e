"""`hllm verify`: what ranking models would read, compared with what the model exported.

Only a version that passes gets `publication = verified` and the tag `feast.feature_service`; nothing else
may become champion. A version that reads differently from its export goes back to `publishing`, and the next
`hllm publish` writes all of it again. Whatever keeps us from comparing (other settings, an export that was
cleaned up, a server that is away) is an error that changes nothing: the version may be serving.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hllm.errors import DataError
from hllm.features.export import ENTITIES, ITEM, USER, Entity, Export, Vectors, bad_vectors
from hllm.features.offline import count_offline
from hllm.features.online import missing_online
from hllm.features.publish import export_of, registered_service, require_published_here
from hllm.features.refreshed import refreshed
from hllm.features.store import open_store, service_errors
from hllm.features.views import service_name
from hllm.settings import Settings
from hllm.work.termination import say

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

READ_ROWS = 500
"""Rows of one online request."""
POINT_IN_TIME_ROWS = 20
"""Pairs read from the offline store at three moments."""


def verify(settings: Settings, version: str | None = None) -> None:
    """Compare a published version with its export; tag it `verified` if all of it agrees.

    Raises:
        ConfigError: the version was published to other stores than these settings name.
        DataError: something that was read differs from the export, or the version is not published.
        InfraError: a store did not answer.
    """
    from hllm.registry.versions import registered_version, set_tags
    from hllm.work.tracking import version_run

    info = registered_version(settings, version)
    if info.tags.get("publication") not in ("published", "verified"):
        raise DataError(
            f"is not published (publication = {info.tags.get('publication', 'absent')})",
            where=f"{settings.mlflow.model_name} version {info.version}",
            remedy=f"Run `hllm publish --version {info.version}` first.",
        )
    export = export_of(settings, info, again=True)
    require_published_here(settings, info, export)
    with (
        service_errors(settings),
        version_run(settings, info, "verify", settings.feast.model_dump(mode="json")) as tracker,
    ):
        verification = Verification(settings, export, info.version)
        try:
            checked = verification.run()
        except Differs:
            set_tags(settings, info.version, {"publication": "publishing"})
            raise
        tracker.note({"hllm.checked": "; ".join(checked)})
    set_tags(
        settings,
        info.version,
        {"publication": "verified", "feast.feature_service": service_name(info.version)},
    )
    say(f"verify: version {info.version} is what was exported: " + "; ".join(checked))


class Differs(DataError):
    """What was read is not what was exported."""


@dataclass(frozen=True)
class Sample:
    """Rows of the export, in the export's order."""

    entity: Entity
    ids: list[str]
    vectors_ND: npt.NDArray[np.float32]
    values: dict[str, list[int]]


class Verification:
    """One comparison under way.

    Raises:
        DataError: the registry has no service of this version, or one that was made from another export.
    """

    def __init__(self, settings: Settings, export: Export, version: int) -> None:
        self.settings, self.export, self.version = settings, export, version
        self.store: FeatureStore = open_store(settings)
        service = registered_service(self.store, version)
        if service is None:
            raise DataError(
                f"has no service {service_name(version)}",
                where=f"Feast registry {settings.feast.registry}",
                remedy=f"Is feast.registry right? If it was lost: `hllm publish --again v{version}`.",
            )
        if service.tags.get("export") != export.manifest.digest:
            raise DataError(
                f"the service {service.name} was made from another export",
                where=f"Feast registry {settings.feast.registry}",
                examples=[service.tags.get("export")],
            )
        self.service: FeatureService = service
        self.available_at = datetime.fromisoformat(service.tags["available_at"])
        self.later = refreshed(settings, version)

    def run(self) -> list[str]:
        """What was checked, one phrase each."""
        offline = [self._compare_counts(entity) for entity in ENTITIES]
        users, items = (self._sample(entity) for entity in ENTITIES)
        pairs = self._compare_point_in_time(users, items)
        users, items = (self._as_refreshed(sample) for sample in (users, items))
        for entity in ENTITIES:
            self._all_online(entity)
        self._compare_online(users, items)
        refreshes = [f"{len(self.later)} refreshes and back-fills since"] if self.later else []
        return [
            f"{self._how_many(users)} and {self._how_many(items)} bit for bit online",
            f"{offline[0]:,} users and {offline[1]:,} items offline",
            f"{pairs} pairs at three moments",
            *refreshes,
        ]

    def _sample(self, entity: Entity) -> Sample:
        """All rows, or random ones and always the first and the last. Every row of the export is looked at
        on the way."""
        rows = self.export.rows(entity)
        random = np.random.default_rng([self.settings.run.seed, self.version])
        chosen = random.choice(rows, size=min(rows, self.settings.feast.verify_sample), replace=False)
        wanted = np.union1d(chosen, [0, rows - 1])
        ids: list[str] = []
        vectors: list[npt.NDArray[np.float32]] = []
        values: dict[str, list[int]] = {feature: [] for feature in entity.columns.values()}
        for batch in self.export.batches(entity, 50_000):
            here = wanted[(wanted >= batch.first) & (wanted < batch.first + len(batch.ids))] - batch.first
            ids += [batch.ids[row] for row in here]
            vectors.append(batch.vectors_ND[here])
            for feature, column in values.items():
                column += [batch.values[feature][row] for row in here]
        return Sample(entity, ids, np.concatenate(vectors), values)

    def _as_refreshed(self, sample: Sample) -> Sample:
        """The sample with what was refreshed of it since the publication: that is what is read online now."""
        rows = {name: row for row, name in enumerate(sample.ids)}
        vectors_ND = sample.vectors_ND.copy()
        values = {feature: list(column) for feature, column in sample.values.items()}
        for later in self.later:
            if later.kind == "backfill" or sample.entity not in later.entities:
                continue
            for batch in later.batches(sample.entity, 50_000):
                for at, name in enumerate(batch.ids):
                    if name in rows:
                        vectors_ND[rows[name]] = batch.vectors_ND[at]
                        for feature, column in values.items():
                            column[rows[name]] = batch.values[feature][at]
        return Sample(sample.entity, sample.ids, vectors_ND, values)

    def _how_many(self, sample: Sample) -> str:
        read, rows = len(sample.ids), self.export.rows(sample.entity)
        return f"{'' if read == rows else f'a sample of {read:,} of '}{rows:,} {sample.entity.name}s"

    def _all_online(self, entity: Entity) -> None:
        count, examples = missing_online(self.settings, self.export, entity, self.version)
        if count:
            what = f"online {entity.name} vectors are missing or not {self.export.width} wide"
            raise self._differs(what, count, self.export.rows(entity), examples)

    def _compare_online(self, users: Sample, items: Sample) -> None:
        """Through the service, as a ranking model reads: every sampled user beside some item and back."""
        rows = max(len(users.ids), len(items.ids))
        for start in range(0, rows, READ_ROWS):
            block = range(start, min(start + READ_ROWS, rows))
            of_user = [row % len(users.ids) for row in block]
            of_item = [row % len(items.ids) for row in block]
            request = [
                {USER.join_key: users.ids[user], ITEM.join_key: items.ids[item]}
                for user, item in zip(of_user, of_item, strict=True)
            ]
            answer = self._read_online(request)
            self._compare(users, of_user, answer, "online")
            self._compare(items, of_item, answer, "online")
            scores = np.einsum("nd,nd->n", users.vectors_ND[of_user], items.vectors_ND[of_item])
            self._compare_affinity(answer["affinity"], scores, request)

    def _read_online(self, request: list[dict[str, str]]) -> dict[str, list[Any]]:
        from google.protobuf.message import DecodeError

        try:
            return self.store.get_online_features(features=self.service, entity_rows=request).to_dict()
        except DecodeError as error:
            raise self._differs(f"online rows cannot be decoded: {error}") from None

    def _compare(self, sample: Sample, rows: list[int], answer: dict[str, list[Any]], where: str) -> None:
        """One block of an answer: there, finite, of unit length, the exported bits, this version."""
        entity, names = sample.entity, [sample.ids[row] for row in rows]
        read = answer[entity.vector]
        self._none(entity, "are missing", where, names, [vector is None for vector in read])
        width = self.export.width
        self._none(entity, f"are not {width} wide", where, names, [len(vector) != width for vector in read])
        read_ND = np.asarray(read, np.float32)
        problem = bad_vectors(read_ND)
        if problem is not None:
            raise self._differs(
                f"{where} {entity.name} vectors {problem[0]}",
                len(problem[1]),
                len(rows),
                [names[row] for row in problem[1][:3]],
            )
        differs = (read_ND.view(np.uint32) != sample.vectors_ND[rows].view(np.uint32)).any(axis=1)
        self._none(entity, "differ from the export", where, names, differs)
        versions = [value != str(self.version) for value in answer[entity.model_version]]
        self._none(entity, f"do not say model version {self.version}", where, names, versions)
        for feature, values in sample.values.items():
            wrong = [value != values[row] for value, row in zip(answer[feature], rows, strict=True)]
            self._none(entity, f"have another {feature}", where, names, wrong)

    def _compare_affinity(
        self, read: list[float | None], expected: npt.NDArray[np.float32], request: list[dict[str, str]]
    ) -> None:
        wrong = [
            value is None or abs(value - score) > 1e-5 for value, score in zip(read, expected, strict=True)
        ]
        if any(wrong):
            pairs = [" and ".join(pair.values()) for pair, bad in zip(request, wrong, strict=True) if bad]
            raise self._differs(
                "affinities are not the product of the two vectors", len(pairs), len(read), pairs[:3]
            )

    def _compare_counts(self, entity: Entity) -> int:
        """Rows of the publication, and of everything that was written since."""
        total = self._count_part(entity, self.export, self.available_at, "")
        for later in self.later:
            if entity in later.entities:
                total += self._count_part(entity, later, later.available_at, later.part)
        return total

    def _count_part(self, entity: Entity, written: Vectors, at: datetime, part: str) -> int:
        found = count_offline(self.settings, entity, self.version, at, part)
        if found != written.rows(entity):
            raise self._differs(
                f"the offline table of {entity.name}s{f' ({part})' if part else ''} has {found:,} rows, "
                f"the {'refresh' if part else 'export'} {written.rows(entity):,}"
            )
        return found

    def _compare_point_in_time(self, users: Sample, items: Sample) -> int:
        """A training row from before the publication sees nothing, one from then on sees the vectors."""
        import pandas as pd

        rows = self._rows_before_refreshes(users, items)
        if not rows:
            return 0
        first = min([self.available_at, *(one.available_at for one in self.later if one.kind == "backfill")])
        moments = [
            first - timedelta(seconds=1),
            self.available_at,
            self.available_at + timedelta(days=1),
        ]
        frame = pd.DataFrame(
            [(users.ids[row], items.ids[row], moment) for moment in moments for row in rows],
            columns=[USER.join_key, ITEM.join_key, "event_timestamp"],
        )
        read = (
            self.store.get_historical_features(entity_df=frame, features=self.service).to_arrow().to_pydict()
        )
        at: dict[tuple[Any, ...], int] = {
            (user, item, _utc(moment)): position
            for position, (user, item, moment) in enumerate(
                zip(read[USER.join_key], read[ITEM.join_key], read["event_timestamp"], strict=True)
            )
        }
        for moment in moments:
            keys = [(users.ids[row], items.ids[row], _utc(moment)) for row in rows]
            if any(key not in at for key in keys):
                raise self._differs("a point-in-time read lost rows of the request")
            part = {feature: [values[at[key]] for key in keys] for feature, values in read.items()}
            if moment < self.available_at:
                early = [
                    user is not None or item is not None
                    for user, item in zip(part[USER.vector], part[ITEM.vector], strict=True)
                ]
                self._none(USER, "can be read before they were published", "offline", users.ids, early)
            else:
                self._compare(users, rows, part, "offline")
                self._compare(items, rows, part, "offline")
        return len(rows)

    def _rows_before_refreshes(self, users: Sample, items: Sample) -> list[int]:
        """Rows of both samples whose later vectors, if any, are not readable a day after the publication."""
        day = self.available_at + timedelta(days=1)
        soon = [one for one in self.later if one.kind != "backfill" and one.available_at <= day]
        sampled, changed = {*users.ids, *items.ids}, set()
        for one in soon:
            for entity in one.entities:
                for batch in one.batches(entity, 50_000):
                    changed |= sampled.intersection(batch.ids)
        rows = range(min(len(users.ids), len(items.ids)))
        unchanged = (row for row in rows if users.ids[row] not in changed and items.ids[row] not in changed)
        return list(islice(unchanged, POINT_IN_TIME_ROWS))

    def _none(self, entity: Entity, what: str, where: str, names: list[str], wrong: Iterable[Any]) -> None:
        bad = [name for name, is_wrong in zip(names, wrong, strict=False) if is_wrong]
        if bad:
            raise self._differs(f"{where} {entity.name} vectors {what}", len(bad), len(names), bad[:3])

    def _differs(self, what: str, count: int = 0, total: int = 0, examples: Iterable[Any] = ()) -> Differs:
        feast = self.settings.feast
        return Differs(
            what,
            where=f"{service_name(self.version)} in {feast.online} {feast.online_url}",
            count=(count, total) if total else None,
            examples=examples,
            remedy=f"The version stays unverified and cannot become champion. "
            f"Run `hllm publish --version {self.version}`, which writes all of it again, then verify.",
        )


def _utc(moment: datetime) -> datetime:
    """Feast's stores hand times back in UTC, some of them without saying so."""
    moment = datetime.fromisoformat(moment.isoformat())
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
