"""Feast's rows in Redis, without Feast between: where they lie, how they are written, counted and removed.

One hash per entity and project, shared by the views of all model versions (Feast 0.67, serialization 3):
    key     number of join keys, join key, value, each with type and length, little-endian; then the project
    fields  `_ts:VIEW`: the row's time; murmur3 of `VIEW:FEATURE`: a feature, both as protobuf messages
Feast's own writer makes five Python objects per value. Of a row only the id, the floats and small integers
change: everything else is one constant piece of the command, and the floats are sent from Arrow's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from hllm.errors import ConfigError, InfraError
from hllm.features.export import Batch, Entity
from hllm.features.stores.messages import vector_header
from hllm.work.artifacts import user_name

if TYPE_CHECKING:
    from redis import Redis

    from hllm.settings import Settings

STRING, SCAN_KEYS = 2, 2_000
CLAIM_SECONDS, SIGN_SECONDS = 30, 3
"""After so long without a sign of life a publisher counts as dead and another takes over; and how often a
living one gives a sign."""


def connect(settings: Settings) -> Redis:
    """The Redis of the settings, by the same connection string that Feast is given."""
    from hllm.features.store import PASSWORD, describe

    return client(describe(settings, os.environ.get(PASSWORD, ""))["online_store"]["connection_string"])


def client(connection_string: str) -> Redis:
    """`host:port,name=value,...`, values in JSON where they are JSON: how Feast reads it."""
    from redis import Redis

    place, *options = connection_string.split(",")
    host, _, port = place.rpartition(":")
    found: dict[str, Any] = {}
    for name, value in (option.split("=", 1) for option in options):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        found[name] = value
    return Redis(host=host, port=int(port), **found)


@dataclass(frozen=True)
class Rows:
    """The rows of one view."""

    project: str
    entity: Entity
    view: str

    @cached_property
    def prefix(self) -> bytes:
        """What every key of this entity begins with, up to the length of the value."""
        name = self.entity.join_key.encode()
        return struct.pack("<III", 1, STRING, len(name)) + name + struct.pack("<I", STRING)

    @cached_property
    def time_field(self) -> bytes:
        return f"_ts:{self.view}".encode()

    @cached_property
    def fields(self) -> dict[str, bytes]:
        """Feature -> its field, in the order in which rows are written."""
        names = (self.entity.vector, self.entity.model_version, *self.entity.columns.values())
        return {name: self.field(name) for name in names}

    def field(self, feature: str) -> bytes:
        import mmh3

        return struct.pack("<I", mmh3.hash(f"{self.view}:{feature}", signed=False))

    def key(self, name: str) -> bytes:
        value = name.encode()
        return self.prefix + struct.pack("<I", len(value)) + value + self.project.encode()

    def name(self, key: bytes) -> str | None:
        """The id of a key; None when the key belongs to another entity or project."""
        start = len(self.prefix) + 4
        if not key.startswith(self.prefix) or len(key) < start:
            return None
        (length,) = struct.unpack_from("<I", key, start - 4)
        if key[start + length :] != self.project.encode():
            return None
        return key[start : start + length].decode()

    def commands(self, batch: Batch, version: int, at: datetime) -> bytes:
        """One HSET per row, as they go over the wire."""
        from feast.protos.feast.types.Value_pb2 import Value
        from google.protobuf.timestamp_pb2 import Timestamp

        width = batch.vectors_ND.shape[1]
        moment = Timestamp()
        moment.FromDatetime(at)
        features = self.fields
        integers = [(_bulk(features[name]), column) for name, column in batch.values.items()]
        vector = vector_header(width)
        head = b"*%d\r\n" % (2 + 2 * (3 + len(integers))) + _bulk(b"HSET")
        before = (
            _bulk(self.time_field)
            + _bulk(moment.SerializeToString())
            + _bulk(features[self.entity.vector])
            + b"$%d\r\n" % (len(vector) + 4 * width)
            + vector
        )
        spoken = Value(string_val=str(version)).SerializeToString()
        after = b"\r\n" + _bulk(features[self.entity.model_version]) + _bulk(spoken)
        floats, size = batch.vectors_ND.astype("<f4", copy=False).data.cast("B"), 4 * width
        parts: list[bytes | memoryview] = []
        for row, name in enumerate(batch.ids):
            parts += (head, _bulk(self.key(name)), before, floats[row * size : (row + 1) * size], after)
            for field, column in integers:
                parts += (field, _integer(column[row]))
        return b"".join(parts)

    def write(self, redis: Redis, batches: Iterable[Batch], version: int, at: datetime) -> Iterator[Batch]:
        """Write batch after batch; each is handed back when Redis has answered for all of its rows.

        The next batch is made while Redis works on the one before.

        Raises:
            redis.exceptions.RedisError: it refused a row (it is full, for instance), or went away.
        """
        with _connection(redis) as connection:
            waiting: Batch | None = None
            for batch in batches:
                commands = self.commands(batch, version, at)
                if waiting:
                    _answers(connection, len(waiting.ids))
                    yield waiting
                connection.send_packed_command([commands])
                waiting = batch
            if waiting:
                _answers(connection, len(waiting.ids))
                yield waiting

    def vector_lengths(self, redis: Redis, names: list[str]) -> list[int]:
        """Bytes of every row's stored vector, 0 where there is none: all of them, without reading one."""
        field = _bulk(self.fields[self.entity.vector])
        ask = b"*3\r\n" + _bulk(b"HSTRLEN")
        with _connection(redis) as connection:
            connection.send_packed_command([b"".join(ask + _bulk(self.key(name)) + field for name in names)])
            return _answers(connection, len(names))

    def remove(self, redis: Redis, removed: Callable[[int], None]) -> int:
        """Delete every row of this view, whatever wrote it; other views of the same ids stay. Returns how
        many there were."""
        fields = [self.time_field, *self.fields.values()]
        total = 0
        for keys in self._scan(redis):
            with redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.hdel(key, *fields)
                gone = sum(bool(count) for count in pipe.execute())
            total += gone
            removed(gone)
        return total

    def _scan(self, redis: Redis) -> Iterator[list[bytes]]:
        cursor = 0
        while True:  # the prefix has no sign with a meaning in a pattern
            cursor, keys = redis.scan(cursor, match=self.prefix + b"*", count=SCAN_KEYS)
            yield [key for key in keys if isinstance(key, bytes) and self.name(key) is not None]
            if not cursor:
                return


def refuse_eviction(redis: Redis, where: str) -> None:
    """
    Raises:
        ConfigError: Redis evicts any key when it is full: it would throw champions away.
    """
    memory = redis.info("memory")
    policy = memory.get("maxmemory_policy", "noeviction")
    if int(memory.get("maxmemory", 0)) and policy.startswith("allkeys"):
        raise ConfigError(
            f"maxmemory-policy is {policy}: when it is full, Redis would drop vectors that are being served",
            where=where,
            remedy="Set maxmemory-policy to noeviction (or volatile-*: published rows never expire).",
        )


def require_room(redis: Redis, rows: int, bytes_per_row: int, where: str) -> None:
    """Before the first row: room for all of them, and no policy that would throw champions away.

    Raises:
        ConfigError: Redis evicts any key when it is full.
        InfraError: what is to be written does not fit.
    """
    refuse_eviction(redis, where)
    memory = redis.info("memory")
    limit, used = int(memory.get("maxmemory", 0)), int(memory.get("used_memory", 0))
    needed = rows * bytes_per_row
    if limit and needed > limit - used:
        raise InfraError(
            f"is too full: {rows:,} rows need about {needed / 2**20:,.0f} MiB, "
            f"{max(limit - used, 0) / 2**20:,.0f} of {limit / 2**20:,.0f} MiB are free",
            where=where,
            remedy="Nothing was written, and what is published stays. Raise maxmemory, or remove versions "
            "that nobody needs: `hllm retire`.",
        )


@dataclass
class Claim:
    """One publisher at a time per version, also when publishers run on different machines.

    Redis holds the publisher's name for half a minute; while it lives, a thread renews it. Whoever finds the
    name of a living one ends; of one that was killed, waits until its time is over.
    """

    redis: Redis
    key: str
    owner: str
    where: str

    def take(self) -> None:
        """Take the claim.

        Raises:
            InfraError: another publisher holds it, and lives; says which.
        """
        before: int | None = None
        while True:
            try:
                return self.hold()
            except InfraError:
                left = self.redis.pttl(self.key)  # milliseconds; -2 when it has just gone
                if left == -1 or (before is not None and left > before):
                    raise
                if before is None:
                    print(f"{self.where}: claimed by {self._holder()}; does it live?", file=sys.stderr)
                before = left
                time.sleep(0.5)

    def hold(self) -> None:
        """Take the claim if it is free, or renew it.

        Raises:
            InfraError: another publisher holds it; says which.
        """
        if self.redis.set(self.key, self.owner, nx=True, ex=CLAIM_SECONDS):
            return
        holder = self._holder()
        if holder != self.owner:
            raise InfraError(
                f"another publisher is at work: {holder}",
                where=self.where,
                remedy="Wait for it, then run again.",
            )
        self.redis.expire(self.key, CLAIM_SECONDS)

    def live(self, ended: threading.Event) -> None:
        """Renew the claim until the end. That it was lost, or Redis went away, `hold` tells the writer."""
        while not ended.wait(SIGN_SECONDS):
            with contextlib.suppress(Exception):
                if self._holder() == self.owner:
                    self.redis.expire(self.key, CLAIM_SECONDS)

    def release(self) -> None:
        if self._holder() == self.owner:
            self.redis.delete(self.key)

    def _holder(self) -> str:
        found = self.redis.get(self.key)
        return found.decode() if isinstance(found, bytes) else str(found or "nobody")


@contextlib.contextmanager
def claim(redis: Redis, project: str, version: int) -> Iterator[Claim]:
    """Hold the claim on a version's rows for as long as the block runs."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = f"{user_name()} on {socket.gethostname()}, process {os.getpid()}, since {since}"
    owner += f", claim {secrets.token_hex(3)}"
    found = Claim(redis, f"hllm:publishing:{project}:v{version}", owner, f"version {version}")
    found.take()
    ended = threading.Event()
    sign = threading.Thread(target=found.live, args=(ended,), daemon=True)
    sign.start()
    try:
        yield found
    finally:
        ended.set()
        sign.join()
        with contextlib.suppress(Exception):  # it ends by itself; what went wrong before matters more
            found.release()


@contextlib.contextmanager
def _connection(redis: Redis) -> Iterator[Any]:
    """A connection of the pool; one with unread answers is closed, never given back."""
    connection = redis.connection_pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        redis.connection_pool.release(connection)


def _answers(connection: Any, count: int) -> list[Any]:
    return [connection.read_response() for _ in range(count)]


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


@lru_cache(maxsize=1 << 16)
def _integer(value: int) -> bytes:
    """`Value(int64_val=value)`, as it goes over the wire."""
    from feast.protos.feast.types.Value_pb2 import Value

    return _bulk(Value(int64_val=value).SerializeToString())
