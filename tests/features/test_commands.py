"""What a person types, day after day: each command in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import world
from tests.features.refreshing import catalogue, read_users, serve

TODAY = 1_600_000_000 + 3_600 * 200


def as_toml(tree: dict[str, Any], prefix: str = "") -> str:
    plain = {name: value for name, value in tree.items() if not isinstance(value, dict)}
    lines = [f"[{prefix}]"] if prefix else []
    lines += [f"{name} = {json.dumps(value)}" for name, value in plain.items() if value is not None]
    for name, value in tree.items():
        if isinstance(value, dict):
            lines.append(as_toml(value, f"{prefix}.{name}" if prefix else name))
    return "\n".join(lines)


@pytest.mark.slow
def test_a_day_with_a_version_that_serves(trained, tiny_source, tmp_path):
    served = serve(trained, tmp_path)
    events = [*tiny_source.events, ("fresh", "item22", TODAY + 5)]
    items = world.write_items(tmp_path / "items.parquet", **catalogue(tiny_source))
    log = world.write_csv(tmp_path / "interactions.csv", ["user_id", "item_id", "timestamp"], events)
    data = {**served.data.model_dump(), "items": str(items), "interactions": str(log)}
    config = tmp_path / "today.toml"
    config.write_text(as_toml({**served.model_dump(mode="json"), "data": data}))

    def hllm(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("hllm")), *argv, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for argv, says in (
        (("ingest",), "ingest: done"),
        (("validate",), "validate: done"),
        (("refresh", "items"), "refresh: 0 items of version 1"),
        (("refresh", "users"), "refresh: 1 users of version 1 as of 2020-09-21"),
        (("refresh", "users"), "refresh: reused"),
        (("backfill", "--from", "2020-09-22", "--to", "2020-09-22"), "backfill: 2020-09-22, 41 users"),
        (("verify", "--version", "1"), "3 refreshes and back-fills since"),
        (("watch",), "version 1 is fresh, complete and sound"),
        (("retire",), "retire: nothing to remove"),
    ):
        done = hllm(*argv)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
    assert read_users(served, ["fresh"])["user_events"] == [1]
    refused = hllm("backfill", "--from", "2020-09-14", "--to", "2020-09-15")
    assert refused.returncode == 64
    assert "has learned from events until" in refused.stderr
