"""Airflow outside the cluster, its steps as pods inside; PostgreSQL, Redis, MLflow and S3 beside both."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hllm import settings as settings_module
from hllm.demo.api import Api
from hllm.demo.services import start_airflow
from hllm.pipeline import keys
from hllm.settings import Settings
from hllm.work.artifacts import Store
from hllm.work.objects import upload
from tests import services
from tests.cluster.faults import ANOTHERS, FAULTS
from tests.cluster.world import (
    CONFIG,
    NAMESPACE,
    REPOSITORY,
    Given,
    Namespace,
    Restartable,
    Run,
    airflows_kubeconfig,
    namespace,
)
from tests.conftest import free_port, serve_s3, serve_s3_as_another
from tests.world import TinySource, run_steps, tiny_settings, toml


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = [
        name for name in ("KUBECONFIG", "HLLM_CLUSTER_IMAGE", "HLLM_CLUSTER_HOST") if name not in os.environ
    ]
    for item in items:
        if absent and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"not set: {', '.join(absent)}; see tests/cluster/run"))


@dataclass
class Platform:
    """Everything that runs, and the settings that the pods have."""

    settings: Settings
    place: Namespace
    api: Api
    processes: Restartable
    folder: Path
    postgres: services.Postgres

    @property
    def store(self) -> Store:
        """The outputs of the pods' steps, as this machine sees them."""
        return Store(self.settings.run.root, cache=self.folder / "cache")

    def start(self, dag: str, task: str, **conf: Any) -> Run:
        return Run(self.api, dag, self.api.trigger(dag, conf), task)


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory, tiny_source: TinySource) -> Iterator[Platform]:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what the tests began ends with them
    given, folder = Given.read(), tmp_path_factory.mktemp("cluster")
    folder.chmod(0o755)
    with (
        serve_s3(folder / "s3", given.host, free_port()) as s3,
        services.postgres(folder / "postgres", given.host) as databases,
        services.redis(folder / "redis", given.host) as redis,
        serve_s3_as_another(folder, given.host) as (others, certificate),
        pytest.MonkeyPatch.context() as patch,
    ):
        access = {
            "AWS_ENDPOINT_URL_S3": s3.endpoint,
            "AWS_ACCESS_KEY_ID": "hllm-test",
            "AWS_SECRET_ACCESS_KEY": "hllm-test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in access.items():
            patch.setenv(name, value)
        patch.setenv("HLLM_FEAST_PASSWORD", services.PASSWORD)
        bucket = s3.bucket("hllm")
        upload(tiny_source.items, f"{bucket}/raw/items.parquet")
        upload(tiny_source.interactions, f"{bucket}/raw/interactions.csv")
        database = databases.url("postgresql+psycopg", "mlflow")
        with services.mlflow(folder / "mlflow", given.host, database, f"{bucket}/mlflow") as mlflow:
            settings = settings_for(folder, tiny_source, given, bucket, mlflow, databases, redis)
            faults = json.dumps(FAULTS).replace(ANOTHERS, others.endpoint)
            (folder / "faults.json").write_text(faults)
            with namespace(folder, toml(settings.model_dump(mode="json")), certificate) as place:
                place.secret("hllm-s3", access)
                place.secret("hllm-feast", {"HLLM_FEAST_PASSWORD": services.PASSWORD})
                (folder / "step.yaml").write_text(yaml.safe_dump(given.template()))
                patch.delenv("HLLM_FEAST_PASSWORD")
                yield from running(folder, place, databases)


def settings_for(
    folder: Path,
    source: TinySource,
    given: Given,
    bucket: str,
    mlflow: str,
    databases: services.Postgres,
    redis: str,
) -> Settings:
    pod = {"image": given.image, "cpu": "100m", "cpu_limit": "2", "memory": "2Gi", "disk": ""}
    pod["template"] = str(folder / "step.yaml")
    return tiny_settings(
        folder,
        source,
        **{
            "run.name": "cluster",
            "run.root": f"{bucket}/runs",
            "data.items": f"{bucket}/raw/items.parquet",
            "data.interactions": f"{bucket}/raw/interactions.csv",
            "model.baselines": [],
            "mlflow.tracking_uri": mlflow,
            "mlflow.artifact_root": f"{bucket}/mlflow",
            "feast.repo": str(REPOSITORY / "feature_repo"),
            "feast.registry": f"postgresql+psycopg://hllm@{databases.host}:{databases.port}/feast",
            "feast.online": "redis",
            "feast.online_url": redis,
            "feast.offline_path": f"{bucket}/feast",
            "release.approved_by": "a tester",
            "runner.kind": "kubernetes",
            "runner.namespace": NAMESPACE,
            "runner.pod": pod,
            "runner.grace_seconds": 20,
            "runner.log_seconds": 5,
            "runner.parallel_steps": 2,
        },
    )


def running(folder: Path, place: Namespace, databases: services.Postgres) -> Iterator[Platform]:
    """Airflow over it, with the rights of the service account that it would have inside."""
    settings = settings_module.load(folder / "hllm.toml", environ={})
    bundles = [
        {
            "name": name,
            "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
            "kwargs": {"path": str(path), "refresh_interval": 60},
        }
        for name, path in (
            ("hllm", REPOSITORY / "dags"),
            ("faults", REPOSITORY / "tests" / "cluster" / "dags"),
        )
    ]
    own = {
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": databases.url("postgresql+psycopg2", "airflow"),
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(bundles),
        "AIRFLOW__CORE__PARALLELISM": "3",  # every task begins by importing the Kubernetes provider
        "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "300",
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
        "KUBECONFIG": str(airflows_kubeconfig(place, folder / "airflow.kubeconfig")),
        "HLLM_CLUSTER_FAULTS": str(folder / "faults.json"),
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'dags'}",
    }
    processes = Restartable(folder / "logs")
    try:
        config = str(folder / "hllm.toml")
        airflow = start_airflow(processes, settings, config, folder / "airflow", wish=18080, own=own)
        yield Platform(settings, place, Api(airflow), processes, folder, databases)
    finally:
        processes.stop()


@pytest.fixture(scope="session")
def trained(platform: Platform) -> Run:
    """`hllm_train` from the raw log to a registered candidate, every step in a pod."""
    run = platform.start("hllm_train", "register", config=CONFIG)
    run.wait("success", seconds=1500)
    return run


@pytest.fixture(scope="session")
def prepared(platform: Platform) -> None:
    """What a training needs: by whoever did it already, else by this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(platform.folder / "home"))
        made = keys(platform.settings)
        for step in ("ingest", "validate", "prepare"):
            if platform.store.manifest(step, made[step]) is None:
                run_steps(platform.settings, step)
