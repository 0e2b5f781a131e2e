"""What was written into a version's views since its publication: one record and one folder each, in order.

    ROOT/refresh/v7-users-0001/    manifest.json, users-00000.parquet ...   (items: items.parquet)
    ROOT/refresh/v7-backfill-2026-03-01/     offline only, event time in the past

A version's vectors of unchanged items and users stay what they were; a refresh adds rows beside them, each
with the version and the moment from which it could be read, and a manifest that says from what it was made.
"""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from pathlib import Path

from hllm.features.export import ITEM, USER, Entity, Vectors
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store

STEP = "refresh"


class Refreshed(Vectors):
    """One finished refresh or back-fill. Its folder is fetched when somebody asks for its vectors."""

    def __init__(self, outputs: Store, manifest: Manifest) -> None:
        self.__dict__ |= {"outputs": outputs, "manifest": manifest, "width": int(manifest.facts["width"])}

    outputs: Store
    manifest: Manifest

    @cached_property
    def folder(self) -> Path:  # type: ignore[override]
        return self.outputs.fetch(STEP, self.manifest.key)

    @property
    def entities(self) -> list[Entity]:
        return [entity for entity in (USER, ITEM) if self.manifest.rows.get(f"{entity.name}s")]

    @property
    def kind(self) -> str:
        """`users`, `items` or `backfill`."""
        return str(self.manifest.facts["kind"])

    @property
    def number(self) -> int:
        return int(self.manifest.facts["number"])

    @property
    def part(self) -> str:
        """What its offline file is called by, behind the view's name."""
        return self.manifest.key.partition("-")[2]

    @property
    def as_of(self) -> datetime:
        """How far the events, or the catalogue, reach that it has seen."""
        return datetime.fromisoformat(self.manifest.facts["as_of"])

    @property
    def available_at(self) -> datetime:
        """Event time of its rows."""
        return datetime.fromisoformat(self.manifest.facts["available_at"])


def refreshed(settings: Settings, version: int, *kinds: str) -> list[Refreshed]:
    """Finished refreshes of a version, the oldest first; all kinds when none is named."""
    outputs = Store(settings.run.root)
    found = [manifest for manifest in outputs.finished(STEP) if manifest.facts["version"] == version]
    chosen = [
        Refreshed(outputs, manifest) for manifest in found if not kinds or manifest.facts["kind"] in kinds
    ]
    return sorted(chosen, key=lambda one: (one.available_at, one.number))
