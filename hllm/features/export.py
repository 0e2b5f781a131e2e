"""A version's exported vectors, as publishing and verifying read them: in batches, every batch checked.

Files of an export:
    items.parquet        item_id string, vector fixed_size_list<float32>[D]
    users-00000.parquet  user_id string, vector, events int64, last_event_time int64 (seconds UTC); ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet

from hllm.errors import DataError
from hllm.work.artifacts import Manifest

UNIT = 1e-3
"""How far from 1 the length of a unit vector may be after float32 rounding."""


@dataclass(frozen=True)
class Entity:
    """One of the two kinds of vectors, and how its columns are called everywhere in Feast.

    Names carry the kind and not the version, so that the columns of a ranking model's training table
    stay the same from one model version to the next."""

    name: str
    join_key: str
    columns: dict[str, str]
    """Column of the export -> feature beside the vector and the model version."""

    @property
    def vector(self) -> str:
        return f"{self.name}_vector"

    @property
    def model_version(self) -> str:
        return f"{self.name}_model_version"


USER = Entity("user", "user_id", {"events": "user_events", "last_event_time": "user_last_event_time"})
ITEM = Entity("item", "item_id", {})
ENTITIES = (USER, ITEM)


@dataclass(frozen=True)
class Batch:
    """N rows of one kind, checked: ids are there, vectors are finite and of unit length."""

    entity: Entity
    first: int
    ids: list[str]
    vectors_ND: npt.NDArray[np.float32]
    values: dict[str, list[int]]
    """Feature name -> its N values, for the features beside the vector."""


@dataclass(frozen=True)
class Vectors:
    """A folder of vectors, D wide."""

    folder: Path
    width: int

    def files(self, entity: Entity) -> list[Path]:
        found = (
            [self.folder / "items.parquet"] if entity is ITEM else sorted(self.folder.glob("users-*.parquet"))
        )
        if not found or not found[0].exists():
            raise DataError(f"holds no {entity.name} vectors", where=self.folder)
        return found

    def rows(self, entity: Entity) -> int:
        return sum(_open(file).metadata.num_rows for file in self.files(entity))

    def batches(self, entity: Entity, rows: int, start: int = 0) -> Iterator[Batch]:
        """Every row from `start` on, at most `rows` at a time.

        Row group by row group: a reader of the whole file would keep all that it has read.

        Raises:
            DataError: an id is missing, or a vector has the wrong width, is not finite or not of unit length.
        """
        first = 0
        for file in self.files(entity):
            reader = _open(file)
            for group in range(reader.num_row_groups):
                held = reader.metadata.row_group(group).num_rows
                if first + held <= start:
                    first += held
                    continue
                for arrow in reader.iter_batches(batch_size=rows, row_groups=[group]):
                    skip = max(start - first, 0)
                    if skip < arrow.num_rows:
                        yield self._checked(entity, arrow.slice(skip), first + skip, file)
                    first += arrow.num_rows

    def _checked(self, entity: Entity, arrow: pa.RecordBatch, first: int, file: Path) -> Batch:
        ids, vectors = arrow.column(entity.join_key), arrow.column("vector")
        if ids.null_count or vectors.null_count:
            raise DataError(
                f"{entity.name}s without an id or a vector",
                where=file,
                count=(ids.null_count + vectors.null_count, arrow.num_rows),
            )
        if not pa.types.is_fixed_size_list(vectors.type) or vectors.type.list_size != self.width:
            raise DataError(f"vectors are {vectors.type}, not {self.width} floats each", where=file)
        # flatten() respects the offset of a sliced array; .values would not.
        vectors_ND = np.ascontiguousarray(
            vectors.flatten().to_numpy(zero_copy_only=False), np.float32
        ).reshape(-1, self.width)
        names: list[str] = ids.to_pylist()
        problem = bad_vectors(vectors_ND)
        if problem is not None:
            what, bad = problem
            raise DataError(
                f"{entity.name} vectors {what}",
                where=file,
                count=(len(bad), len(names)),
                examples=[names[row] for row in bad[:3]],
                remedy="The model or its export is broken: nothing of this version may be published.",
            )
        values: dict[str, Any] = {
            feature: arrow.column(column).to_pylist() for column, feature in entity.columns.items()
        }
        return Batch(entity, first, names, vectors_ND, values)


@dataclass(frozen=True)
class Export(Vectors):
    """What `hllm embed --stage 3` finished."""

    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Export:
        """The export of a folder, with every row that its manifest counts.

        Raises:
            DataError: it is not finished, or files of it have gone since.
        """
        manifest = Manifest.read(folder)
        if manifest is None:
            raise DataError("is not a finished export", where=folder)
        export = cls(folder, int(manifest.facts["width"]), manifest)
        for entity in ENTITIES:
            counted = manifest.rows.get(f"{entity.name}s")
            if counted is not None and (found := export.rows(entity)) != counted:
                raise DataError(
                    f"holds {found:,} {entity.name} vectors, its manifest counts {counted:,}",
                    where=folder,
                    remedy="Files of it were lost: delete the folder and run `hllm embed --stage 3` again.",
                )
        return export


def _open(file: Path) -> parquet.ParquetFile:
    """
    Raises:
        DataError: it was cut off, or overwritten.
    """
    try:
        return parquet.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"is damaged: {str(error).splitlines()[0]}",
            where=file,
            remedy="Delete its folder and run the command that wrote it again.",
        ) from None


def bad_vectors(vectors_ND: npt.NDArray[np.float32]) -> tuple[str, npt.NDArray[np.int64]] | None:
    """What is wrong with some of the rows, and which; None when every row is finite and of unit length."""
    finite = np.isfinite(vectors_ND).all(axis=1)
    if not finite.all():
        return "are not finite", np.flatnonzero(~finite)
    unit = np.abs(np.linalg.norm(vectors_ND.astype(np.float64), axis=1) - 1) <= UNIT
    if not unit.all():
        return "are not of unit length", np.flatnonzero(~unit)
    return None
