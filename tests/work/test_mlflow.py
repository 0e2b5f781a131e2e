"""What the S3 behind MLflow says, as our errors: a person can act on it after hours of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.store.artifact import s3_artifact_repo

from hllm.errors import ConfigError, InfraError
from hllm.serving.mlflow_model import log_package
from hllm.settings import Mlflow, Settings
from hllm.work import mlflow as server
from tests.conftest import S3
from tests.serving.test_mlflow_model import package_of

Keeps = Callable[[Settings, str], object]


def keep_a_file(settings: Settings, run: str) -> None:
    with server.mlflow_errors(settings):
        server.client(settings).log_artifact(run, __file__)


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow and boto3 keep a client and a session, with the address and the password of their first use."""
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    s3_artifact_repo._cached_get_s3_client.cache_clear()


@pytest.fixture(params=["file", "model"])
def keep(request: pytest.FixtureRequest, tmp_path: Path) -> Keeps:
    """The two ways in which MLflow's client sends files."""
    if request.param == "file":
        return keep_a_file
    package = package_of(tmp_path, "generative")
    return lambda settings, run: log_package(server.client(settings), settings, run, package)


def run_in(settings: Settings, bucket: str) -> tuple[Settings, str]:
    root = Mlflow(**settings.mlflow.model_dump() | {"artifact_root": f"{bucket}/mlflow"})
    settings = settings.model_copy(update={"mlflow": root})
    client = server.client(settings)
    experiment = client.create_experiment("shop", artifact_location=server.artifact_location(settings))
    return settings, str(client.create_run(experiment).info.run_id)


def test_a_missing_bucket_is_named_and_its_setting(s3: S3, settings: Settings, keep: Keeps) -> None:
    settings, run = run_in(settings, "s3://no-such-bucket")
    with pytest.raises(ConfigError) as error:
        keep(settings, run)
    assert error.value.first_line == (
        "mlflow.artifact_root = s3://no-such-bucket/mlflow: the bucket no-such-bucket does not exist"
    )


def test_the_wrong_password_is_no_bug(
    s3: S3,
    settings: Settings,
    keep: Keeps,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, run = run_in(settings, s3.bucket(f"mlflow-refused-{request.node.callspec.id}"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(InfraError, match=r"^mlflow\.artifact_root = s3://\S+: access denied"):
        keep(settings, run)


def test_a_store_that_is_away_is_tried_again_later(
    s3: S3, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = run_in(settings, s3.bucket("mlflow-away"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(InfraError, match=r"^mlflow\.artifact_root = s3://\S+: Could not connect"):
        keep_a_file(settings, run)
