"""What a world holds, as a flat dictionary, and how two of them differ.

Nobody lists what may differ (times, run ids): it is what differs between two runs that nothing interrupted.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from hllm.work.artifacts import digest_file
from tests.chaos.world import World

View = dict[str, Any]
UNSEEN = ("home/", "source/", "hllm.toml", "mlflow.db")
"""Caches, inputs, and the database that is read by its meaning."""
UNTOLD = re.compile(r"(^|/)\.(used|digests\.jsonl)$|(^|/)\.[^/]*\.lock($|/)|\.lock$|-(journal|wal|shm)$")
"""Locks, marks of use, and what is remembered of digests: none of it is a result."""
MEASURED = re.compile(r"seconds|usage/|/written$|_bytes$|_mb$|dataSourceClassType$|view_version_history$")
"""What is never compared: two undisturbed runs may agree by chance. (The last two are Feast's own notes: it
drops and numbers them each time it writes a registry.)"""
OF_VERSIONS = {
    "model_version_tags": "name, version, key, value",
    "registered_model_tags": "name, key, value",
    "registered_model_aliases": "name, alias, version",
}
"""Table -> what names a row, and its value."""
RANDOM = (
    (re.compile(r"\b[0-9a-f]{40}\b"), "<commit>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<id>"),
    (re.compile(r"\bm-<id>|\bm-[0-9a-f]{32}\b"), "<model>"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\b20\d\d-?\d\d-?\d\dT?[\d:.+Z-]*"), "<time>"),
)


def view(world: World) -> View:
    """Reads everything; call it in a child."""
    here, found = world.here, View()
    runs = _mlflow(here / "mlflow.db", found)
    for path in sorted(here.rglob("*")):
        name = str(path.relative_to(here))
        if path.is_dir() or name.startswith(UNSEEN) or UNTOLD.search(name):
            continue
        _file(found, _plain(name, runs), path, runs)
    if world.redis:
        found |= {f"redis/{name}": value for name, value in world.redis.rows().items()}
    if world.postgres:
        found |= world.postgres.tables()
    return found


def _file(found: View, name: str, path: Path, runs: dict[str, str]) -> None:
    if path.name == "online.db":
        with contextlib.closing(sqlite3.connect(path)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
                cursor = database.execute(f'SELECT * FROM "{table}"')
                columns = [column[0] for column in cursor.description]
                found[f"{name}/{table}"] = {
                    "columns": columns,
                    "rows": [[repr(value) for value in row] for row in cursor],
                }
    elif path.name == "registry.db":
        _registry(found, name, path.read_bytes())
    elif path.suffix == ".json":
        try:
            leaves(found, name, json.loads(_plain(path.read_text("utf-8"), runs)))
        except ValueError:
            found[name] = "not JSON"
    else:
        found[name] = digest_file(path)


def _registry(found: View, name: str, content: bytes) -> None:
    """Feast's own, by the names in it."""
    from feast.protos.feast.core.Registry_pb2 import Registry
    from google.protobuf.json_format import MessageToDict

    for kind, entries in MessageToDict(Registry.FromString(content)).items():
        for entry in entries if isinstance(entries, list) else ():
            own = entry.get("spec", entry).get("name", "") if isinstance(entry, dict) else ""
            leaves(found, f"{name}/{kind}/{own}", entry)


def _mlflow(path: Path, found: View) -> dict[str, str]:
    """Runs by name, not by id: of tries that a kill ended only that none is left RUNNING. Id -> name."""
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as database:
        ask = lambda text, *values: database.execute(text, values).fetchall()  # noqa: E731
        runs = ask("SELECT run_uuid, name, status, lifecycle_stage FROM runs ORDER BY start_time")
        names: dict[str, str] = {}
        for run, name, status, stage in runs:
            parent = ask("SELECT value FROM tags WHERE run_uuid = ? AND key = 'mlflow.parentRunId'", run)
            own = f"{names.get(parent[0][0], '?')}/{name}" if parent else str(name)
            names[run] = own
            if stage != "active":
                continue
            if status == "RUNNING":
                found[f"mlflow/{own}/RUNNING"] = 1
            if status == "FINISHED" or not parent:
                found[f"mlflow/{own}/status"] = status
                for table in ("tags", "params", "latest_metrics"):
                    for key, value in ask(f"SELECT key, value FROM {table} WHERE run_uuid = ?", run):
                        found[f"mlflow/{own}/{table}/{key}"] = _plain(str(value), names)
        for model, version, status, run in ask("SELECT name, version, status, run_id FROM model_versions"):
            found[f"mlflow/{model} v{version}"] = f"{status} of {names.get(run, run)}"
        for table, columns in OF_VERSIONS.items():
            for *place, value in ask(f"SELECT {columns} FROM {table}"):
                found[f"mlflow/{table}/{'/'.join(map(str, place))}"] = _plain(str(value), names)
    return names


def leaves(found: View, name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            leaves(found, f"{name}/{key}", inner)
    else:
        found[name] = json.dumps(value, sort_keys=True)


def _plain(text: str, runs: dict[str, str]) -> str:
    for pattern, instead in RANDOM:
        text = pattern.sub(lambda at, instead=instead: f"<{runs[at[0]]}>" if at[0] in runs else instead, text)
    return text


def differences(first: View, second: View, got: View) -> list[str]:
    """How `got` differs from what both uninterrupted runs have in common."""
    found = []
    for name in sorted(first.keys() & second.keys()):
        if MEASURED.search(name):
            continue
        if name not in got:
            found.append(f"missing: {name}")
        elif isinstance(first[name], dict):
            stable = _stable(first[name], second[name])
            if _rows(first[name], stable) != _rows(got[name], stable):
                ours, theirs = len(got[name]["rows"]), len(first[name]["rows"])
                found.append(f"rows differ: {name} ({ours} rows, uninterrupted {theirs})")
        elif first[name] == second[name] != got[name]:
            found.append(f"differs: {name}: {str(got[name])[:90]}, uninterrupted {str(first[name])[:90]}")
    found += [f"left over: {name}" for name in sorted(got.keys() - first.keys() - second.keys())]
    return found


def _stable(first: Any, second: Any) -> list[str]:
    """Columns that hold the same in both."""
    return [
        column
        for column in first["columns"]
        if column in second["columns"] and _rows(first, [column]) == _rows(second, [column])
    ]


def _rows(table: Any, columns: list[str]) -> Counter[tuple[str, ...]]:
    at = [table["columns"].index(column) for column in columns]
    return Counter(tuple(row[place] for place in at) for row in table["rows"])
