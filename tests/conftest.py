"""Fixtures that every part of the tests uses."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hllm.pipeline import steps
from hllm.settings import Mlflow, Settings
from tests import world


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> world.TinySource:
    """A catalogue (Parquet) and a log (CSV) on disk; see `tests.world`."""
    return world.write_tiny_source(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_settings(tmp_path: Path, tiny_source: world.TinySource) -> Callable[..., Settings]:
    """`tiny_settings(**{"run.seed": 3})`, or `tiny_settings(folder, **sets)`: everything under `tmp_path`."""

    def build(folder: Path = tmp_path, **sets: Any) -> Settings:
        return world.tiny_settings(folder, tiny_source, **sets)

    return build


@dataclass(frozen=True)
class Trained:
    """Settings, and the outputs of their steps by name."""

    settings: Settings
    outputs: dict[str, Path]

    def __getitem__(self, step: str) -> Path:
        return self.outputs[step]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_source: world.TinySource) -> Trained:
    """Every step of both families up to the export, in small shards. Read it, do not write into it."""
    sets = {"embed.shard_items": 25, "embed.shard_users": 15, "embed.max_history": 12}
    settings = world.tiny_settings(tmp_path_factory.mktemp("trained"), tiny_source, **sets)
    names = [name for name in steps(settings) if name != "evaluate"]
    return Trained(settings, {name: world.run_steps(settings, name) for name in names})


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: creating its tables takes a second, copying it none."""
    from hllm.work import mlflow as server

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    server.client(Settings(mlflow=Mlflow(tracking_uri=f"sqlite:///{path}"))).search_experiments()
    return path


@dataclass(frozen=True)
class S3:
    """A running S3 server; its buckets are the folders in `folder`."""

    endpoint: str
    folder: Path

    def bucket(self, name: str) -> str:
        """Create a bucket; returns `s3://name`."""
        from hllm.work.objects import s3_client

        s3_client().create_bucket(Bucket=name)
        return f"s3://{name}"


@contextmanager
def serve_s3(
    folder: Path, host: str, port: int, key: Path | None = None, certificate: Path | None = None
) -> Iterator[S3]:
    """rclone serves a folder as S3, with TLS where it has a certificate."""
    rclone = shutil.which("rclone") or str(Path(sys.executable).parent / "rclone")
    folder.mkdir(parents=True, exist_ok=True)
    command = [rclone, "serve", "s3", str(folder), "--addr", f"{host}:{port}"]
    command += ["--auth-key", "hllm-test,hllm-test-secret"]
    command += ["--vfs-cache-mode", "off", "--config", "/dev/null"]
    if key and certificate:
        command += ["--key", str(key), "--cert", str(certificate)]
    log_path = folder.with_name(f"{folder.name}-rclone.log")
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(host, port, process, log_path)
        yield S3(f"{'https' if certificate else 'http'}://{host}:{port}", folder)
    finally:
        process.kill()  # it keeps nothing in memory, and would wait for clients that stay connected
        process.wait(10)


@contextmanager
def serve_s3_as_another(folder: Path, host: str) -> Iterator[tuple[S3, Path]]:
    """S3 by TLS, whose certificate (the path beside it) is for `storage.example`."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    argv += ["-days", "2", "-subj", "/CN=storage", "-addext", "subjectAltName=DNS:storage.example"]
    subprocess.run([*argv, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    with serve_s3(folder / "tls", host, free_port(), key=key, certificate=certificate) as server:
        yield server, certificate


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """rclone serves a folder as S3 on loopback."""
    with serve_s3(tmp_path_factory.mktemp("s3"), "127.0.0.1", free_port()) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """The S3 server, with this process's (and its children's) AWS settings pointing at it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hllm-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hllm-test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # a fresh local cache: what is read has come from S3
    return s3_server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(host: str, port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-500:]}")
