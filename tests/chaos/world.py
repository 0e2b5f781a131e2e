"""A small world at one fixed path, put back to any of its states before each try.

It never moves: outputs, runs and versions name each other by absolute paths.
"""

from __future__ import annotations

import csv
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.forkserver import ForkServer, Job
from tests.chaos.servers import PostgresState, RedisState
from tests.services import PASSWORD
from tests.world import TinySource, tiny_settings, toml, write_csv, write_tiny_source

TODAY = 1_600_000_000 + 3_600 * 200
KINDS = ("local", "s3", "redis", "postgres")
"""Where outputs and rows live: in files; files in S3; online rows in Redis; all of Feast in PostgreSQL."""


@dataclass
class World:
    """`here` is the world; `states` are copies of it."""

    kind: str
    folder: Path
    forks: ForkServer
    stack: ExitStack
    environment: dict[str, str] = field(default_factory=dict)
    redis: RedisState | None = None
    postgres: PostgresState | None = None

    def __post_init__(self) -> None:
        self.here, self.states = self.folder / "world", self.folder / "states"
        self.here.mkdir(parents=True)
        self.states.mkdir()
        self.environment |= {"HOME": str(self.here / "home"), "HLLM_CONFIG": str(self.here / "hllm.toml")}
        self._start()

    def _start(self) -> None:
        self.forks.call(lambda: bool(write_tiny_source(self.here / "source", users=24, items=36)))
        self.catalogue = self.here / "source" / "items.parquet"
        self.log = self.here / "source" / "interactions.csv"
        source = TinySource(self.catalogue, self.log, [], [])
        sets: dict[str, Any] = {"embed.shard_items": 20, "embed.shard_users": 12, "run.processes": 1}
        sets |= {"model.family": "hllm", "model.baselines": ["sasrec", "hstu"]}
        sets |= {"feast.write_batch_rows": 16, "data.batch_rows": 100, "watch.min_agreement": -1.0}
        sets |= {"gate.min_vs_champion": 0.0}
        if self.kind == "s3":
            from tests.conftest import free_port, serve_s3

            server = self.stack.enter_context(serve_s3(self.here / "s3", "127.0.0.1", free_port()))
            (self.here / "s3" / "bucket").mkdir()
            self.environment |= {
                "AWS_ENDPOINT_URL_S3": server.endpoint,
                "AWS_ACCESS_KEY_ID": "hllm-test",
                "AWS_SECRET_ACCESS_KEY": "hllm-test-secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            sets |= {"run.root": "s3://bucket/runs", "feast.registry": "s3://bucket/feast/registry.db"}
            sets |= {"feast.offline_path": "s3://bucket/feast/offline"}
        if self.kind == "redis":
            self.redis = RedisState.start(self.folder, self.stack)
            sets |= {"feast.online": "redis", "feast.online_url": self.redis.place}
        if self.kind == "postgres":
            self.postgres = PostgresState.start(self.folder, self.stack)
            place = self.postgres
            self.environment["HLLM_FEAST_PASSWORD"] = PASSWORD
            sets |= {"feast.online": "postgres", "feast.online_url": place.url}
            sets |= {"feast.offline": "postgres", "feast.offline_path": place.url}
            sets |= {"feast.registry": place.registry}
        settings = tiny_settings(self.here, source, **sets)
        (self.here / "hllm.toml").write_text(toml(settings.model_dump(mode="json", exclude_none=True)))

    def grow(self, more: int) -> None:
        """The log goes on: `more` new events of known users, and one new user."""
        with self.log.open(newline="", encoding="utf-8") as file:
            _, *events = csv.reader(file)
        names = sorted({event[0] for event in events})[:6]
        for at, user in enumerate([*names, f"fresh{more}"] * more):
            events.append([user, f"item{10 + at % 20}", str(TODAY + 60 * at)])
        write_csv(self.log, ["user_id", "item_id", "timestamp"], events)

    def run(self, argv: tuple[str, ...], **how: Any) -> Any:
        prepare = how.pop("prepare", None)
        return self.forks.run(Job(argv, environment=tuple(self.environment.items()), prepare=prepare), **how)

    def save(self, name: str) -> None:
        shutil.copytree(self.here, self.states / name, symlinks=True)
        if self.redis:
            self.redis.save(name)
        if self.postgres:
            self.postgres.save(name)

    def restore(self, name: str) -> None:
        """The folder itself stays: the S3 server has it open."""
        for entry in self.here.iterdir():
            if entry.name == "s3":
                for bucket in entry.iterdir():
                    shutil.rmtree(bucket)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        shutil.copytree(self.states / name, self.here, symlinks=True, dirs_exist_ok=True)
        if self.redis:
            self.redis.restore(name)
        if self.postgres:
            self.postgres.restore(name)
