"""Read one request straight from Redis, by Feast's layout and rules: the same vectors in less time.

    python feature_repo/read_redis.py --repo runs/demo/publish/v3 --user 196 --items 242 302 377

Feast turns every number of a vector into a Python object and back. Here the bytes become one matrix. Nulls,
model versions and the affinity are as Feast's: unknown ids are null, vectors of two versions have no product.
"""

import argparse
import json
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import mmh3
import numpy as np
import redis
from feast import FeatureStore
from feast.protos.feast.types.Value_pb2 import Value

STRING = 2


@dataclass(frozen=True)
class Request:
    """A user beside N candidates, vectors D wide."""

    user_vector: np.ndarray | None
    """(D,) float32; None for an unknown user."""
    item_vectors_ND: np.ndarray
    """float32; zeros where the item is unknown."""
    known_N: np.ndarray
    """Whether the item is known."""
    affinity_N: np.ndarray
    """float64; nan where Feast reads null."""

    @property
    def unknown(self) -> int:
        """How many of user and candidates have no vector: worth a counter in your service."""
        return int((~self.known_N).sum()) + (self.user_vector is None)


class Vectors:
    """The vectors of one service, `hllm_v7`. Keep one per process; a connection is taken for each request."""

    def __init__(self, store: FeatureStore, service: str) -> None:
        place, *options = store.config.online_store.connection_string.split(",")
        host, _, port = place.rpartition(":")
        found = dict(option.split("=", 1) for option in options)
        self.redis = redis.Redis(host, int(port), **{name: _plain(value) for name, value in found.items()})
        self.project = store.project.encode()
        version = service.rpartition("_")[2]
        self.user, self.item = (self._wanted(kind, f"hllm_{kind}_{version}") for kind in ("user", "item"))

    def read(self, user: str, items: list[str]) -> Request:
        """One round trip for all of it."""
        asked = [self._command(self.user, user), *(self._command(self.item, item) for item in items)]
        connection = self.redis.connection_pool.get_connection()
        try:
            connection.send_packed_command([b"".join(asked)])
            (of_user, user_version), *found = [connection.read_response() for _ in asked]
        except BaseException:
            connection.disconnect()  # with answers that nobody read
            raise
        finally:
            self.redis.connection_pool.release(connection)
        known_N = np.array([bool(vector) for vector, _ in found], bool)
        (user_1D,) = (_matrix([of_user]),) if of_user else (None,)
        rows_KD = _matrix([vector for vector, _ in found if vector]) if known_N.any() else None
        width = next((rows.shape[1] for rows in (user_1D, rows_KD) if rows is not None), 0)
        items_ND = np.zeros((len(items), width), np.float32)
        affinity_N = np.full(len(items), np.nan)
        if rows_KD is not None:
            items_ND[known_N] = rows_KD
        if user_1D is not None:
            same_N = known_N & np.array([version == user_version for _, version in found], bool)
            affinity_N[same_N] = items_ND[same_N] @ user_1D[0]
        return Request(None if user_1D is None else user_1D[0], items_ND, known_N, affinity_N)

    def _wanted(self, kind: str, view: str) -> tuple[bytes, bytes]:
        """What comes before a key's value, and the two fields that are read."""
        key, names = f"{kind}_id".encode(), (f"{kind}_vector", f"{kind}_model_version")
        head = struct.pack("<III", 1, STRING, len(key)) + key + struct.pack("<I", STRING)
        fields = (struct.pack("<I", mmh3.hash(f"{view}:{name}", signed=False)) for name in names)
        return head, b"".join(_bulk(field) for field in fields)

    def _command(self, wanted: tuple[bytes, bytes], name: str) -> bytes:
        head, fields = wanted
        value = name.encode()
        key = head + struct.pack("<I", len(value)) + value + self.project
        return b"*4\r\n$5\r\nHMGET\r\n" + _bulk(key) + fields


def _matrix(messages: list[bytes]) -> np.ndarray:
    """Feast's messages of vectors -> (N, D): all begin alike, and end in their floats."""
    width = len(Value.FromString(messages[0]).float_list_val.val)
    head, size = messages[0][: -4 * width], len(messages[0])
    if not all(len(message) == size and message.startswith(head) for message in messages):
        raise ValueError("these are not vectors of one width as `hllm publish` writes them")
    floats = b"".join([message[len(head) :] for message in messages])
    return np.frombuffer(floats, "<f4").reshape(len(messages), width)


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def _plain(value: str) -> object:
    """Values of a connection string are JSON where they can be, as Feast reads them."""
    try:
        return json.loads(value)
    except ValueError:
        return value


if __name__ == "__main__":
    from read_features import serving_service

    warnings.simplefilter("ignore")  # Feast and MLflow announce their own deprecations
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", required=True, help="folder with the feature_store.yaml of a Redis store")
    parser.add_argument("--model", default="hllm")
    parser.add_argument("--user", required=True)
    parser.add_argument("--items", required=True, nargs="+")
    args = parser.parse_args()
    here = Path(__file__).resolve().parent
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{here.parent / 'runs/mlflow.db'}")
    store = FeatureStore(args.repo)
    read = Vectors(store, serving_service(store, args.model)).read(args.user, args.items)
    for item, known, affinity in zip(args.items, read.known_N, read.affinity_N, strict=True):
        print(f"{args.user} {item} {affinity:.4f}" if known else f"{args.user} {item} unknown")
    print(f"{read.unknown} of {1 + len(args.items)} ids are unknown")
