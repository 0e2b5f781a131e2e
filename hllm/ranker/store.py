"""A Feast store with the history of every feature: what a ranking model is trained from and served from.

Beside the two views of the vectors, named and shaped as `hllm publish` does it, stand the views that a
ranking team would have anyway: counts, likes, recency and categories. Every row carries the moment from which
it could be read, so Feast's point-in-time join decides what a training row sees.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.data.prepared import Prepared
from hllm.embedding.histories import Histories
from hllm.embedding.users import vectors_of_histories
from hllm.errors import DataError
from hllm.features.export import ITEM, USER
from hllm.features.store import open_store, registry_lock, write_yaml
from hllm.features.views import CREATED, EVENT_TIME, Views, offline_file, views_of
from hllm.ranker.refreshes import Refreshes, refreshes
from hllm.report.item_map import CATEGORY_COLUMNS, WORD_COLUMNS
from hllm.settings import Settings
from hllm.work.progress import Progress

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
SERVICE = "ranking"
VERSION = 0
"""The vectors' model version here: the model is not registered yet."""
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Vectors:
    """A frozen model: what gives a user's vector at any moment."""

    user_model: Any
    items_ID: Floats
    max_history: int
    users_per_batch: int


def own_store(settings: Settings, folder: Path) -> Settings:
    """The same settings with a Feast store inside `folder`: nothing of the published one is touched."""
    feast = {
        "project": f"{settings.feast.project}_ranking",
        "registry": str(folder / "registry.db"),
        "online": "sqlite",
        "online_url": str(folder / "online.db"),
        "offline": "file",
        "offline_path": str(folder / "offline"),
    }
    return settings.model_copy(update={"feast": settings.feast.model_copy(update=feast)})


def write_history(
    settings: Settings, prepared: Prepared, vectors: Vectors, since: int
) -> tuple[FeatureStore, dict[str, int]]:
    """Fill the store of `settings` with every refresh from `since` on, offline, and online with the last.

    Returns the store and the rows of each offline table."""
    ranking = settings.ranking
    every, lag = int(ranking.refresh_hours * 3600), int(ranking.lag_minutes * 60)
    of_users = refreshes(
        np.asarray(prepared.user_offsets), np.asarray(prepared.event_times), since=since, every=every, lag=lag
    )
    by_item = ByItem.of(prepared)
    of_items = refreshes(by_item.offsets, by_item.times_E, since=since, every=every, lag=lag, everyone=True)
    tables = {
        offline_file(settings, USER, VERSION): _user_vectors(prepared, vectors, of_users),
        offline_file(settings, ITEM, VERSION): _item_vectors(prepared, vectors, since + lag),
        _counts_file(settings, "user"): _user_counts(prepared, of_users),
        _counts_file(settings, "item"): _item_counts(prepared, by_item, of_items),
    }
    Path(settings.feast.offline_path).mkdir(parents=True, exist_ok=True)
    rows = {Path(path).stem: _write(Path(path), parts) for path, parts in tables.items()}
    store = open_store(settings)
    views = views_of(settings, VERSION, {"since": _moment(since).isoformat()})
    counts = count_views(settings, views)
    with registry_lock(settings):
        store.apply([*views.entities, views.users, views.items, views.affinity, *counts])
        store.apply([service(views, counts)])
    last = _moment(int(max(of_users.available_S.max(initial=since), of_items.available_S.max())) + 1)
    with contextlib.redirect_stdout(io.StringIO()):  # Feast prints in colours, which logs are not
        store.materialize(_moment(since) - timedelta(days=1), last)
    write_yaml(settings, Path(settings.feast.registry).parent)
    return store, rows


def service(views: Views, counts: list[FeatureView]) -> Any:
    from feast import FeatureService

    return FeatureService(
        name=SERVICE,
        features=[*counts, views.users, views.items, views.affinity],
        description="What the reference ranker reads: counts and categories, vectors, affinity.",
    )


def count_views(settings: Settings, views: Views) -> list[FeatureView]:
    """What a ranking team knows without any model."""
    from feast import FeatureView, Field, FileSource
    from feast.types import Array, Int64, String

    keys = {entity.name: entity for entity in views.entities}
    found = []
    for kind in ("user", "item"):
        numbers = [Field(name=name, dtype=Int64) for name in count_names(kind)]
        others = [Field(name="item_categories", dtype=Array(String))] if kind == "item" else []
        found.append(
            FeatureView(
                name=f"ranking_{kind}",
                entities=[keys[kind]],
                schema=[Field(name=f"{kind}_id", dtype=String), *numbers, *others],
                source=FileSource(
                    name=f"ranking_{kind}",
                    path=_counts_file(settings, kind),
                    timestamp_field=EVENT_TIME,
                    created_timestamp_column=CREATED,
                ),
                ttl=timedelta(0),
                online=True,
                description=f"Counts of each {kind}'s events before the last refresh.",
            )
        )
    return found


def count_names(kind: str) -> tuple[str, str, str]:
    """Events, liked events, second of the last event."""
    return f"{kind}_actions", f"{kind}_likes", f"{kind}_last_action"


@dataclass(frozen=True)
class ByItem:
    """The log item by item, each in time order."""

    offsets: Ints
    times_E: Ints
    labels_E: npt.NDArray[np.int8]

    @classmethod
    def of(cls, prepared: Prepared) -> ByItem:
        items_E, times_E = np.asarray(prepared.event_items), np.asarray(prepared.event_times)
        order = np.lexsort((times_E, items_E))
        counts = np.bincount(items_E, minlength=prepared.items)
        return cls(
            np.concatenate([[0], np.cumsum(counts)]), times_E[order], np.asarray(prepared.event_labels)[order]
        )


def _user_vectors(prepared: Prepared, vectors: Vectors, of_users: Refreshes) -> Iterator[pa.Table]:
    """A vector at every refresh, by the same code as the export's, from the history known by then."""
    ids = prepared.user_table(["user_id"])["user_id"].combine_chunks()
    with Progress("user vectors of past refreshes", len(of_users), "vector") as progress:
        for begin in range(0, len(of_users), ROWS_AT_ONCE):
            part = slice(begin, begin + ROWS_AT_ONCE)
            ends = of_users.ends_S[part]
            starts = np.maximum(of_users.starts_S[part], ends - vectors.max_history)
            found_RD = vectors_of_histories(
                vectors.user_model,
                vectors.items_ID,
                Histories(
                    prepared.event_items, prepared.event_times, starts, ends - starts, of_users.as_of_S[part]
                ),
                vectors.users_per_batch,
                progress.advance,
                published=True,
            )
            yield _vector_table(
                "user",
                ids.take(pa.array(of_users.entities_S[part])),
                found_RD,
                of_users.available_S[part],
                user_events=ends - of_users.starts_S[part],
                user_last_event_time=np.asarray(prepared.event_times)[ends - 1],
            )


def _item_vectors(prepared: Prepared, vectors: Vectors, available: int) -> Iterator[pa.Table]:
    """Every item's vector once: it depends on the text alone."""
    ids = prepared.item_table(["item_id"])["item_id"].combine_chunks()
    for begin in range(0, prepared.items, ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        found_RD = np.asarray(vectors.items_ID[part])
        yield _vector_table("item", ids[part], found_RD, np.full(len(found_RD), available))


def _vector_table(
    kind: str, ids: pa.Array, vectors_RD: Floats, available_R: Ints, **columns: Ints
) -> pa.Table:
    width = vectors_RD.shape[1]
    offsets = pa.array(range(0, (len(ids) + 1) * width, width), pa.int32())
    flat = pa.array(np.ascontiguousarray(vectors_RD, np.float32).reshape(-1))
    return pa.table(
        {
            f"{kind}_id": ids,
            f"{kind}_vector": pa.ListArray.from_arrays(offsets, flat),
            f"{kind}_model_version": pa.array([str(VERSION)] * len(ids), pa.string()),
            **columns,
            **_times(available_R),
        }
    )


def _user_counts(prepared: Prepared, of_users: Refreshes) -> Iterator[pa.Table]:
    ids = prepared.user_table(["user_id"])["user_id"].combine_chunks()
    times_E, labels_E = np.asarray(prepared.event_times), np.asarray(prepared.event_labels)
    yield _count_table("user", ids, of_users, times_E, labels_E)


def _item_counts(prepared: Prepared, by_item: ByItem, of_items: Refreshes) -> Iterator[pa.Table]:
    ids = prepared.item_table(["item_id"])["item_id"].combine_chunks()
    table = _count_table("item", ids, of_items, by_item.times_E, by_item.labels_E)
    categories = item_categories(prepared)
    column = pa.array([categories[item] for item in of_items.entities_S], pa.list_(pa.string()))
    yield table.append_column("item_categories", column)


def _count_table(
    kind: str, ids: pa.Array, known: Refreshes, times_E: Ints, labels_E: npt.NDArray[np.int8]
) -> pa.Table:
    actions, likes, last = count_names(kind)
    liked_E = np.concatenate([[0], np.cumsum(labels_E == 1)])
    some = known.ends_S > known.starts_S
    last_S = np.where(some, times_E[np.maximum(known.ends_S - 1, 0)], 0) if len(times_E) else known.ends_S
    return pa.table(
        {
            f"{kind}_id": ids.take(pa.array(known.entities_S)),
            actions: known.ends_S - known.starts_S,
            likes: liked_E[known.ends_S] - liked_E[known.starts_S],
            last: pa.array(last_S, pa.int64(), mask=~some),
            **_times(known.available_S),
        }
    )


def item_categories(prepared: Prepared) -> list[list[str]]:
    """Of every item, from the catalogue's first column that looks like categories; none: empty lists."""
    names = parquet.read_schema(prepared.folder / "items.parquet").names
    column = next((name for name in CATEGORY_COLUMNS if name in names), None)
    if column is None:
        return [[] for _ in range(prepared.items)]
    separator = r"[|,;>/\s]+" if column in WORD_COLUMNS else r"\s*[|,;>/]\s*"
    values = prepared.item_table([column])[column].to_pylist()
    return [[word for word in re.split(separator, str(value or "").strip()) if word] for value in values]


def _counts_file(settings: Settings, kind: str) -> str:
    return str(Path(settings.feast.offline_path).absolute() / f"ranking_{kind}.parquet")


def _times(available_R: Ints) -> dict[str, pa.Array]:
    moments = pa.array(np.asarray(available_R, np.int64) * 1_000_000, pa.int64()).cast(
        pa.timestamp("us", "UTC")
    )
    return {EVENT_TIME: moments, CREATED: moments}


def _write(path: Path, tables: Iterator[pa.Table]) -> int:
    rows, writer = 0, None
    for table in tables:
        writer = writer or parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        rows += table.num_rows
    if writer is None:
        raise DataError("there is nothing to write", where=path)
    writer.close()
    return rows


def _moment(second: int) -> datetime:
    return datetime.fromtimestamp(second, UTC)
