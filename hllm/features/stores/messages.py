"""Feast's protobuf messages of our rows, made straight from Arrow's memory."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from hllm.features.export import Batch

LENGTH_DELIMITED = 2
"""Protocol Buffers' wire type of strings, messages and packed arrays."""


def messages(batch: Batch, version: int, at: datetime) -> list[Any]:
    """What an online store writes: (entity key, feature -> value, event time, creation time) of every row."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    entity, width = batch.entity, batch.vectors_ND.shape[1]
    head, floats = vector_header(width), batch.vectors_ND.astype("<f4", copy=False).tobytes()
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


@lru_cache
def vector_header(width: int) -> bytes:
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


def stored_bytes(width: int) -> int:
    """Bytes of a whole vector as Feast stores it."""
    return len(vector_header(width)) + 4 * width


def _tag(number: int) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
