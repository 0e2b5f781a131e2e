"""The services outside: MLflow and Feast, who releases a model, and when to raise an alarm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hllm.settings.location import Folder
from hllm.settings.section import Section


class Mlflow(Section):
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    """MLflow's store or server; the variable MLFLOW_TRACKING_URI wins when set."""
    artifact_root: Folder = "runs/mlflow-artifacts"
    """Where a new experiment keeps its files: a folder or s3:// (a server may decide for itself)."""
    model_name: str = "hllm"
    """The registered model's name."""
    keep_system_metrics: bool = True
    """Sample CPU, memory and GPU of every step."""


class Feast(Section):
    repo: str = "feature_repo"
    """Folder of the Feast repository."""
    project: str = "hllm"
    """Feast project."""
    registry: str = "runs/feast/registry.db"
    """Registry: a file, s3:// or a SQL URL (postgresql+psycopg://...)."""
    online: Literal["sqlite", "redis", "postgres"] = "sqlite"
    """Online store."""
    online_url: str = "runs/feast/online.db"
    """SQLite file, `host:port` of Redis, or `host:port/database` of Postgres; the password comes from
    HLLM_FEAST_PASSWORD."""
    offline: Literal["file", "postgres"] = "file"
    """Offline store."""
    offline_path: str = "runs/feast/offline"
    """Folder (or s3://) of the published Parquet files; `host:port/database` for Postgres."""
    write_batch_rows: int = Field(5_000, ge=1)
    """Rows per write to the online store."""
    publication_lag_minutes: float = Field(60.0, ge=0)
    """How long after the end of a day its vectors count as readable in a back-fill: what your daily refresh
    takes."""
    verify_sample: int = Field(5_000, ge=1)
    """Users and items whose online vectors are compared bit by bit before promotion: all up to so many,
    random ones of more. 5,000 take about five seconds."""


class Watch(Section):
    sample: int = Field(1_000, ge=10)
    """Users and items that are read, each at random."""
    active_days: float = Field(28.0, gt=0)
    """Users with an event in so many days before the newest one count as active."""
    max_user_hours: float = Field(36.0, gt=0)
    """Hours since the user vectors were brought up to date."""
    max_item_hours: float = Field(48.0, gt=0)
    """Hours since the item vectors were."""
    min_user_coverage: float = Field(0.99, ge=0, le=1)
    """The least share of active users with a vector."""
    min_item_coverage: float = Field(0.99, ge=0, le=1)
    """The least share of the catalogue's items with a vector."""
    max_null_rate: float = Field(0.0, ge=0, le=1)
    """The largest share of published ids that read as null."""
    max_norm_drift: float = Field(0.001, ge=0)
    """How far from 1 the length of any vector may be."""
    min_agreement: float = Field(0.3, ge=-1, le=1)
    """The least correlation between this and the previous version of how alike items are to each other.
    (The cosine of an item's two vectors is shown, but has no limit: two versions are two spaces.)"""
    max_hours_unfinished: float = Field(6.0, gt=0)
    """Hours after which work that was begun and not finished counts as left over."""


class Release(Section):
    approve_automatically: bool = False
    """Answer Airflow's approval request at once, in the name `approved_by`. For demonstrations: a person
    should decide."""
    approved_by: str = "automatic"
    """The name an automatic approval is recorded under."""
    timeout_hours: float = Field(72.0, gt=0)
    """How long a candidate waits for its decision."""
