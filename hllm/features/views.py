"""What one model version looks like in Feast: two views, the affinity between them, one service.

Version 7 is `hllm_user_v7`, `hllm_item_v7`, `hllm_affinity_v7` and the service `hllm_v7`. Nothing of another
version is touched. Column names carry no version: a ranking model keeps its columns when the model changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from hllm.features.export import ITEM, USER, Entity
from hllm.features.stores.s3_files import as_feast_reads
from hllm.settings import Settings
from hllm.work.objects import is_s3

if TYPE_CHECKING:
    from feast import FeatureService, FeatureView, OnDemandFeatureView

EVENT_TIME, CREATED = "event_timestamp", "created"


def service_name(version: int) -> str:
    return f"hllm_v{version}"


def view_name(entity: Entity, version: int) -> str:
    return f"hllm_{entity.name}_v{version}"


def offline_source(settings: Settings, entity: Entity, version: int) -> str:
    """Every Parquet file behind a view, as a pattern: of its publication, and one more for each refresh."""
    return offline_file(settings, entity, version).removesuffix("parquet") + "*parquet"


def offline_file(settings: Settings, entity: Entity, version: int, part: str = "") -> str:
    """One Parquet file (local or S3) behind a view: of its publication, or the named part of a refresh.
    Projects may share the folder: each has its own names."""
    root = settings.feast.offline_path
    folder = root.rstrip("/") if is_s3(root) else str(Path(root).absolute())
    name = f"{settings.feast.project}_{view_name(entity, version)}"
    return f"{folder}/{name}.{part}.parquet" if part else f"{folder}/{name}.parquet"


def offline_relation(settings: Settings, entity: Entity, version: int) -> str:
    """The view's PostgreSQL table. Feast's online table, PROJECT_VIEW, may be in the same database."""
    return f"{settings.feast.project}_{view_name(entity, version)}_offline"


@dataclass(frozen=True)
class Views:
    """Everything Feast knows about a version. The service is registered last, when the rows are there."""

    entities: list[Any]
    users: FeatureView
    items: FeatureView
    affinity: OnDemandFeatureView

    def of(self, entity: Entity) -> FeatureView:
        return self.users if entity is USER else self.items

    def service(self, version: int, tags: Mapping[str, str]) -> FeatureService:
        from feast import FeatureService

        return FeatureService(
            name=service_name(version),
            features=[self.users, self.items, self.affinity],
            description=f"User and item vectors of HLLM model version {version}, and their affinity.",
            tags=dict(tags),
        )


def views_of(settings: Settings, version: int, tags: Mapping[str, str]) -> Views:
    from feast import Entity as FeastEntity
    from feast import ValueType

    keys = {
        entity.name: FeastEntity(name=entity.name, join_keys=[entity.join_key], value_type=ValueType.STRING)
        for entity in (USER, ITEM)
    }
    users = _view(settings, USER, keys["user"], version, tags)
    items = _view(settings, ITEM, keys["item"], version, tags)
    return Views(
        list(keys.values()), users, items, affinity_view(f"hllm_affinity_v{version}", users, items, tags)
    )


def _view(settings: Settings, entity: Entity, key: Any, version: int, tags: Mapping[str, str]) -> FeatureView:
    from feast import FeatureView, Field
    from feast.types import Array, Float32, Int64, String

    return FeatureView(
        name=view_name(entity, version),
        entities=[key],
        schema=[
            Field(name=entity.join_key, dtype=String),
            Field(name=entity.vector, dtype=Array(Float32)),
            Field(name=entity.model_version, dtype=String),
            *(Field(name=feature, dtype=Int64) for feature in entity.columns.values()),
        ],
        source=_source(settings, entity, version),
        ttl=timedelta(0),  # a version's vectors do not expire: the next version replaces them
        online=True,
        description=f"{entity.name.capitalize()} vectors of HLLM model version {version}.",
        tags=dict(tags),
    )


def _source(settings: Settings, entity: Entity, version: int) -> Any:
    name = view_name(entity, version)
    if settings.feast.offline == "postgres":
        table = offline_relation(settings, entity, version)
        from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource

        return PostgreSQLSource(
            name=name, table=table, timestamp_field=EVENT_TIME, created_timestamp_column=CREATED
        )
    from feast import FileSource
    from feast.data_format import ParquetFormat

    return FileSource(
        name=name,
        path=as_feast_reads(offline_source(settings, entity, version)),
        file_format=ParquetFormat(),
        timestamp_field=EVENT_TIME,
        created_timestamp_column=CREATED,
    )


def affinity(inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """How well an item fits a user: the inner product of their vectors, one number for every row.

    Null where a vector is missing or where the two come from different model versions: such vectors
    live in different spaces, and their product would be a number without meaning."""
    import numpy as np

    scores: list[Any] = []
    for user, item, of_user, of_item in zip(
        inputs["user_vector"],
        inputs["item_vector"],
        inputs["user_model_version"],
        inputs["item_model_version"],
        strict=True,
    ):
        same = user is not None and item is not None and of_user is not None and of_user == of_item
        scores.append(
            float(np.dot(np.asarray(user, np.float32), np.asarray(item, np.float32))) if same else None
        )
    return {"affinity": scores}


def affinity_view(
    name: str, users: FeatureView, items: FeatureView, tags: Mapping[str, str]
) -> OnDemandFeatureView:
    """Feast computes the affinity when somebody reads it; only the function's source text is registered.

    Feast would also store the function as a pickle beside the text. Its readers take the text first and the
    pickle only if there is none, so the pickle is left out and the registry stays free of them."""
    from feast import Field, OnDemandFeatureView
    from feast.protos.feast.core.Transformation_pb2 import UserDefinedFunctionV2
    from feast.transformation.python_transformation import PythonTransformation
    from feast.types import Float64

    class SourceText(PythonTransformation):
        def to_proto(self) -> UserDefinedFunctionV2:
            return UserDefinedFunctionV2(name=self.udf.__name__, body_text=self.udf_string, mode="python")

    return OnDemandFeatureView(
        name=name,
        sources=[users, items],
        schema=[Field(name="affinity", dtype=Float64)],
        feature_transformation=SourceText(
            udf=cast(FunctionType, affinity), udf_string=inspect.getsource(affinity)
        ),
        mode="python",
        description="Inner product of user and item vector; null if one is missing or model versions differ.",
        tags=dict(tags),
    )
