"""Vectors into Feast's online store: messages made straight from Arrow's memory, in batches, resumable."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from hllm.features.export import Batch, Entity, Export
from hllm.progress import Progress

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

LENGTH_DELIMITED = 2
"""Protocol Buffers' wire type of strings, messages and packed arrays."""


def write_online(
    store: FeatureStore,
    view: FeatureView,
    export: Export,
    entity: Entity,
    *,
    version: int,
    at: datetime,
    batch_rows: int,
    start: int,
    written: Callable[[int], None],
) -> None:
    """Write every row from `start` on through the online store's writer; `written(rows)` after each batch.

    Feast's `write_to_online_store` takes a pandas frame with one Python list per vector and infers every
    value's type. The store below it takes messages; the vectors are already in a message's own layout."""
    with _no_cycle_search(), Progress(f"publish {view.name}", export.rows(entity), start=start) as progress:
        for batch in export.batches(entity, batch_rows, start):
            store.provider.online_write_batch(store.config, view, messages(batch, version, at), None)
            written(batch.first + len(batch.ids))
            progress.advance(len(batch.ids))


@contextlib.contextmanager
def _no_cycle_search() -> Iterator[None]:
    """Millions of small messages set off Python's search for reference cycles again and again, over all that
    is loaded. Messages have no cycles: their memory is freed without it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def messages(batch: Batch, version: int, at: datetime) -> list[Any]:
    """What an online store writes: (entity key, feature -> value, event time, creation time) of every row."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    entity, width = batch.entity, batch.vectors_ND.shape[1]
    head, floats = _vector_header(width), batch.vectors_ND.astype("<f4", copy=False).tobytes()
    size, keys, model_version = 4 * width, [entity.join_key], Value(string_val=str(version))
    found = []
    for row, name in enumerate(batch.ids):
        values = {
            entity.vector: Value.FromString(head + floats[row * size : (row + 1) * size]),
            entity.model_version: model_version,
        }
        for feature, column in batch.values.items():
            values[feature] = Value(int64_val=column[row])
        found.append((EntityKey(join_keys=keys, entity_values=[Value(string_val=name)]), values, at, at))
    return found


def _vector_header(width: int) -> bytes:
    """The bytes before a vector's floats in `Value(float_list_val=FloatList(val=...))`.

    A packed array of floats is stored as the floats themselves, little-endian: putting these bytes before
    a row of the matrix is the whole conversion, and the floats that come back are the same bits."""
    from feast.protos.feast.types.Value_pb2 import FloatList, Value

    inner = _tag(FloatList.DESCRIPTOR.fields_by_name["val"].number) + _varint(4 * width)
    outer = _tag(Value.DESCRIPTOR.fields_by_name["float_list_val"].number)
    head = outer + _varint(len(inner) + 4 * width) + inner
    probe = np.arange(width, dtype="<f4")
    if Value.FromString(head + probe.tobytes()) != Value(float_list_val=FloatList(val=probe.tolist())):
        raise AssertionError("Feast's message layout is not the one this code was written for")
    return head


def _tag(number: int) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
