"""Stage 3: everything frozen, every item and every user written out for publishing, and the model packed for
serving."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.data.prepared import Prepared
from hllm.embedding.histories import Histories
from hllm.embedding.items import ItemVectors
from hllm.embedding.package import write_package
from hllm.embedding.users import vectors_of_histories
from hllm.errors import DataError, Terminated
from hllm.models.family import TrainedModel
from hllm.models.load import load_user_model
from hllm.pipeline import candidate
from hllm.work.progress import Progress
from hllm.work.ranks import any_of, device, place
from hllm.work.step import Context

ROW_GROUP = 50_000
"""Rows that a reader of an export holds at a time, whatever the file's length."""
# U users, I items, D vector width


def export(context: Context) -> None:
    """Step: items.parquet, users-00000.parquet ... and package/. A finished user shard is never computed
    again."""
    settings, main = context.settings, candidate(context.settings)
    prepared = Prepared.open(context.inputs["prepare"])
    train = context.inputs[main.train_step]
    item_vectors = ItemVectors.open(context.inputs[TrainedModel(main.family, 1).embed_step]).matrix()
    ids = prepared.item_table(["item_id"])["item_id"]
    if len(ids) != len(item_vectors):
        raise DataError(
            f"{len(item_vectors)} vectors for {len(ids)} items",
            where="embed",
            remedy="Run embed --stage 1 again.",
        )
    users = _export_users(context, prepared, train, item_vectors)
    if not place().first:
        return
    _write(
        context.output / "items.parquet",
        {"item_id": ids.combine_chunks(), "vector": vector_column(item_vectors)},
    )
    titles = prepared.item_table(["item_id", "title"])
    write_package(
        context.output / "package", train, np.asarray(item_vectors), titles, settings.embed.max_history
    )
    newest = int(prepared.event_times.max())
    context.rows = {"items": prepared.items, "users": users}
    context.facts = {
        "width": item_vectors.shape[1],
        "family": main.family.name,
        "objective": main.family.learns(settings),
        "as_of": datetime.fromtimestamp(newest, UTC).isoformat(),
    }


def _export_users(
    context: Context, prepared: Prepared, train: Path, item_vectors: npt.NDArray[np.float32]
) -> int:
    """Users with at least one event, from their whole history; returns how many."""
    settings = context.settings.embed
    model = load_user_model(train).to(device())
    offsets, ids = (
        np.asarray(prepared.user_offsets),
        prepared.user_table(["user_id"])["user_id"].combine_chunks(),
    )
    active, as_of = np.flatnonzero(np.diff(offsets)), int(prepared.event_times.max())
    with Progress("embed users", len(active), "user") as progress, context.graceful() as stopping:
        for number, begin in enumerate(range(0, len(active), settings.shard_users)):
            path = context.output / f"users-{number:05d}.parquet"
            users = active[begin : begin + settings.shard_users]
            if context.has(path):
                progress.advance(len(users))
                continue
            ends = offsets[users + 1]
            vectors = vectors_of_histories(
                model,
                item_vectors,
                Histories.before(prepared, users, ends, np.full(len(users), as_of), settings.max_history),
                settings.users_per_batch,
                progress.advance,
                published=True,
            )
            if not np.isfinite(vectors).all():
                raise DataError(
                    "user vectors are not finite",
                    where="embed --stage 3",
                    examples=ids.take(pa.array(users[~np.isfinite(vectors).all(1)][:3])).to_pylist(),
                )
            if place().first:
                _write(
                    path,
                    {
                        "user_id": ids.take(pa.array(users)),
                        "vector": vector_column(vectors),
                        "events": pa.array(ends - offsets[users], pa.int64()),
                        "last_event_time": pa.array(np.asarray(prepared.event_times[ends - 1]), pa.int64()),
                    },
                )
                context.keep(path)
            if any_of(stopping.is_set()) and begin + len(users) < len(active):
                raise Terminated
    return len(active)


def vector_column(vectors: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    """(R, D) as an Arrow column of fixed-size lists, without a copy per row."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(vectors, np.float32).ravel()), vectors.shape[1]
    )


def _write(path: Path, columns: dict[str, pa.Array]) -> None:
    partial = path.with_name(f".{path.name}")
    parquet.write_table(pa.table(columns), partial, row_group_size=ROW_GROUP)
    os.replace(partial, path)
