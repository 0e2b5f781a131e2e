"""One ranking request, a user and 500 candidates, from Redis: through Feast, straight, and the bare bytes.

    python benchmarks/latency.py [--candidates 500] [--requests 200] [--clients 2]

Every way reads the same requests from the same Redis on loopback, one after another in turns, then from
`--clients` processes at once. What the ways read is compared first, bit by bit. At the end, where Feast's
time goes, from Python's own profiler (which slows Python down: read the shares, not the milliseconds).
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import Figures, Redis, arguments, print_table
from publish import write_export

from hllm.features.export import ITEM, USER, Export
from hllm.settings import Settings

AT = datetime(2026, 1, 1, tzinfo=UTC)
WAYS = {
    "feast": "Feast: get_online_features(service)",
    "feast-vectors": "Feast: only the two vectors",
    "straight": "feature_repo/read_redis.py",
    "bytes": "redis-py: the same fields, not decoded",
}
PARTS = {
    "reading from Redis": "_read_hash_fields",
    "bytes to messages": "_convert_redis_values_to_protobuf",
    "one row per pair": "_populate_response_from_feature_data",
    "affinity": "_augment_response_with_on_demand_transforms",
    "messages to Python lists": "to_dict",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--entities", type=int, default=20_000, help="users, and as many items, in Redis")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.candidates, args.requests, args.entities = 20, 3, 100
    if args.only:
        ways = ways_of(settings_for(args.folder, args.place))
        print(json.dumps(measured(ways[args.only], requests_of(args), args.requests)))
        return
    figures = Figures("latency")
    with tempfile.TemporaryDirectory() as name, Redis(Path(name)) as redis:
        folder = Path(name)
        settings = settings_for(folder, redis.place)
        fill(folder, settings, args)
        ways, asked = ways_of(settings), requests_of(args)
        compare(ways, *asked[0])
        alone: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(4):
            for way, read in ways.items():
                alone[way] += measured(read, asked, max(args.requests // 4, 1))
        crowd = {way: at_once(way, folder, redis.place, args) for way in WAYS}
        print(f"\none user and {args.candidates} candidates, vectors of {args.width} float32")
        print_table(
            [
                (
                    WAYS[way],
                    f"{processor(alone[way]):.1f}",
                    *percentiles(alone[way]),
                    *percentiles(crowd[way]),
                )
                for way in WAYS
            ],
            (
                "way",
                "CPU ms",
                "p50 ms",
                "p99 ms",
                f"p50 ms, {args.clients} at once",
                f"p99 ms, {args.clients} at once",
            ),
        )
        shares = profile(ways["feast"], asked)
        print(
            "\nwhere Feast's time goes: " + "; ".join(f"{what} {share:.0%}" for what, share in shares.items())
        )
    for way in WAYS:
        p50, p99 = percentiles(alone[way])
        figures.add(
            WAYS[way], f"p50 {p50} ms, p99 {p99} ms; {args.clients} at once p99 {percentiles(crowd[way])[1]}"
        )
    ratio = processor(alone["feast"]) / processor(alone["straight"])
    found = f"{ratio:.1f} times less of the reader's processor"
    figures.claim("straight reading against Feast", found, "at least 3", ratio >= 3)
    figures.finish(args.figures)


def settings_for(folder: Path, place: str) -> Settings:
    feast = {"registry": f"{folder}/registry.db", "online": "redis", "online_url": place}
    return Settings.model_validate({"feast": {**feast, "offline_path": str(folder)}})


def fill(folder: Path, settings: Settings, args: argparse.Namespace) -> None:
    from hllm.features.online import write_online
    from hllm.features.store import open_store
    from hllm.features.views import views_of

    store, views = open_store(settings), views_of(settings, 1, {})
    store.apply([*views.entities, views.users, views.items, views.affinity, views.service(1, {})])
    for entity in (USER, ITEM):
        write_export(folder / entity.name, entity.name, args.entities, args.width)
        write_online(
            settings,
            store,
            views.of(entity),
            Export.open(folder / entity.name),
            entity,
            version=1,
            at=AT,
            start=0,
            written=lambda rows: None,
        )


def requests_of(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """The same for every way and every process."""
    random = np.random.default_rng(1)
    return [
        (
            f"user-{random.integers(args.entities)}",
            [f"item-{row}" for row in random.choice(args.entities, args.candidates, replace=False)],
        )
        for _ in range(min(args.requests, 50))
    ]


def ways_of(settings: Settings) -> dict[str, Callable[[str, list[str]], Any]]:
    from hllm.features.online import rows_of
    from hllm.features.store import open_store

    store = open_store(settings)
    service = store.get_feature_service("hllm_v1")
    straight = reader().Vectors(store, "hllm_v1")
    users, items = (rows_of(settings, entity, 1) for entity in (USER, ITEM))
    vectors = ["hllm_user_v1:user_vector", "hllm_item_v1:item_vector"]

    def through_feast(features: Any) -> Callable[[str, list[str]], Any]:
        def read(user: str, names: list[str]) -> Any:
            rows = [{"user_id": user, "item_id": name} for name in names]
            return store.get_online_features(features=features, entity_rows=rows).to_dict()

        return read

    def bare(user: str, names: list[str]) -> Any:
        with straight.redis.pipeline(transaction=False) as pipe:
            pipe.hmget(users.key(user), list(users.fields.values())[:2])
            for name in names:
                pipe.hmget(items.key(name), list(items.fields.values()))
            return pipe.execute()

    return {
        "feast": through_feast(service),
        "feast-vectors": through_feast(vectors),
        "straight": straight.read,
        "bytes": bare,
    }


def reader() -> Any:
    path = Path(__file__).parents[1] / "feature_repo" / "read_redis.py"
    spec = importlib.util.spec_from_file_location("read_redis", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["read_redis"] = module
    spec.loader.exec_module(module)
    return module


def compare(ways: dict[str, Callable[[str, list[str]], Any]], user: str, names: list[str]) -> None:
    """The ends of a request are unknown, so that nulls are compared too."""
    asked = ["nobody knows it", *names, "nor this"]
    feast, straight = (ways[way](user, asked) for way in ("feast", "straight"))
    known = [vector is not None for vector in feast["item_vector"]]
    there = np.asarray([vector for vector in feast["item_vector"] if vector is not None], np.float32)
    same = (
        known == straight.known_N.tolist()
        and straight.unknown == 2
        and np.array_equal(there.view(np.uint32), straight.item_vectors_ND[straight.known_N].view(np.uint32))
        and np.allclose(np.array(feast["affinity"], float), straight.affinity_N, atol=1e-6, equal_nan=True)
    )
    if not same:
        sys.exit("the two ways read different vectors")


def measured(
    read: Callable[[str, list[str]], Any], asked: list[tuple[str, list[str]]], count: int
) -> list[tuple[float, float]]:
    """Milliseconds of each request, by the clock and of the reader's processor; the first is not counted."""
    read(*asked[0])
    found = []
    for number in range(count):
        began, worked = time.perf_counter(), time.process_time()
        read(*asked[number % len(asked)])
        found.append((1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - worked)))
    return found


def at_once(way: str, folder: Path, place: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    command = [sys.executable, __file__, "--only", way, "--folder", str(folder), "--place", place]
    for name in ("candidates", "requests", "entities", "width"):
        command += [f"--{name}", str(getattr(args, name))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.clients)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"a client of {way} failed")
    return [value for output in outputs for value in json.loads(output.splitlines()[-1])]


def percentiles(times: list[tuple[float, float]]) -> tuple[str, str]:
    return tuple(f"{np.percentile([clock for clock, _ in times], q):.1f}" for q in (50, 99))


def processor(times: list[tuple[float, float]]) -> float:
    return float(np.median([worked for _, worked in times]))


def profile(read: Callable[[str, list[str]], Any], asked: list[tuple[str, list[str]]]) -> dict[str, float]:
    profiler = cProfile.Profile()
    profiler.enable()
    for one in asked[:20]:
        read(*one)
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    total = stats.total_tt
    found = {
        what: sum(row[3] for (_, _, name), row in stats.stats.items() if name == function) / total
        for what, function in PARTS.items()
    }
    return {**found, "the rest": max(1 - sum(found.values()), 0.0)}


if __name__ == "__main__":
    main()
