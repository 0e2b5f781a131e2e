"""Feast's registry, a file or an object in S3, written whole or not at all and never taken for an empty one.

Feast's own store truncates the file and writes it again: whoever is killed in between erases the registry,
and whoever reads in between sees an empty one. It also makes an empty registry where it finds none, or where
S3 did not answer. These two are the registry stores of our own processes; what they write is read by plain
Feast.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feast.infra.registry.file import FileRegistryStore
from feast.infra.registry.registry_store import RegistryStore
from feast.protos.feast.core.Registry_pb2 import Registry
from google.protobuf.message import DecodeError

from hllm.errors import InfraError
from hllm.work.artifacts import write_atomically
from hllm.work.objects import read_object, write_object

REMEDY = (
    "`hllm publish --again vN` registers a published version anew from its record, the serving one first."
)


class WholeFileRegistryStore(FileRegistryStore):
    """A registry file that is replaced, not written over."""

    def __init__(self, registry_config: Any, repo_path: Path) -> None:
        super().__init__(registry_config, repo_path)
        self.path = self._filepath

    def get_registry_proto(self) -> Registry:
        try:
            return parsed(self.path.read_bytes(), str(self.path))
        except FileNotFoundError:
            raise InfraError("the Feast registry is gone", where=self.path, remedy=REMEDY) from None

    def _write_registry(self, registry_proto: Registry) -> None:
        write_atomically(self.path, stamped(registry_proto))


class WholeS3RegistryStore(RegistryStore):
    """A registry object in S3, by our own client: what it does not answer is no missing object."""

    def __init__(self, registry_config: Any, repo_path: Path) -> None:
        self.location = str(registry_config.path)

    def get_registry_proto(self) -> Registry:
        content = read_object(self.location)
        if content is None:
            raise InfraError("the Feast registry is gone", where=self.location, remedy=REMEDY)
        return parsed(content, self.location)

    def update_registry_proto(self, registry_proto: Registry) -> None:
        write_object(self.location, stamped(registry_proto))

    def teardown(self) -> None:
        """Nothing here removes a registry."""


def parsed(content: bytes, where: str) -> Registry:
    """
    Raises:
        InfraError: it is empty, or no registry.
    """
    registry = Registry()
    try:
        registry.ParseFromString(content)
    except DecodeError:
        content = b""
    if not content or not registry.version_id:  # every registry that Feast writes has one
        raise InfraError("the Feast registry is empty or damaged", where=where, remedy=REMEDY)
    return registry


def stamped(registry: Registry) -> bytes:
    """The bytes of a registry, with the version and the moment of this write, as Feast's own stores do."""
    registry.version_id = str(uuid.uuid4())
    registry.last_updated.FromDatetime(datetime.now(UTC).replace(tzinfo=None))
    return bytes(registry.SerializeToString())


def empty() -> bytes:
    """A registry in which nothing is registered yet."""
    from feast.infra.registry.registry import REGISTRY_SCHEMA_VERSION

    return stamped(Registry(registry_schema_version=REGISTRY_SCHEMA_VERSION))
