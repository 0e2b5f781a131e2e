"""`hllm doctor`: is everything here that these settings need? And for everything missing, what to do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import typer
from tabulate import tabulate

from hllm.errors import ConfigError, HLLMError, InfraError
from hllm.models.family import family
from hllm.settings import Settings
from hllm.work.objects import is_s3, list_objects, split_s3

GIB = 2**30
PYTHON = (3, 11)
MEMORY_GIB, DISK_GIB = 3.0, 2.0
"""Less than this is called missing; less than twice as much gets a note."""
OK, NOTE, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    what: str
    state: str
    found: str
    remedy: str = ""
    service: bool = False
    """A service that may come back by itself: a retry helps."""


def doctor(settings: Settings) -> None:
    """Print what was found.

    Raises:
        ConfigError: something is missing on this machine or in the settings.
        InfraError: only services are missing.
    """
    findings = list(examine(settings))
    table = [(finding.what, finding.state, finding.found, finding.remedy) for finding in findings]
    typer.echo(
        tabulate(table, headers=("what", "state", "found", "what to do"), maxcolwidths=[None, None, 60, 60])
    )
    missing = [finding for finding in findings if finding.state == MISSING]
    if missing:
        kind = InfraError if all(finding.service for finding in missing) else ConfigError
        raise kind(f"missing: {', '.join(finding.what for finding in missing)}", where="doctor")
    typer.echo("everything that these settings need is here")


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check, one after another; a check that fails is a finding, never an exception."""
    yield _python()
    yield _packages()
    yield _memory()
    yield _disk(settings)
    yield _cores(settings)
    yield _gpu()
    if settings.train.zero:
        yield _deepspeed(settings.train.zero)
    yield _asked("data source", lambda: _source(settings), "See the section [data] of the settings.")
    main = family(settings.model.family)
    for name in main.backbones:
        tower, asked = f"{main.name}.{name}", settings.at(f"{main.name}.{name}")
        reads = main.tokenizer == f"{name}.backbone"
        look = partial(_backbone, asked.backbone, asked.pretrained, reads)
        yield _asked(tower, look, "")
    yield _asked("MLflow", lambda: _mlflow(settings), "", service=True)
    remedy = "See feast.registry; HLLM_FEAST_PASSWORD if the server wants one."
    yield _asked("Feast registry", lambda: _registry(settings), remedy, service=True)
    remedy = (
        f"See feast.online_url; start {settings.feast.online}, and set HLLM_FEAST_PASSWORD if it wants one."
    )
    yield _asked("online store", lambda: _online(settings), remedy, service=True)
    remedy = "See feast.offline and feast.offline_path; HLLM_FEAST_PASSWORD if the server wants one."
    yield _asked("offline store", lambda: _offline(settings), remedy, service=True)
    for where in _buckets(settings):
        yield _asked(f"s3://{split_s3(where)[0]}", lambda where=where: _bucket(where), "", service=True)  # type: ignore[misc]


def _asked(what: str, ask: Callable[[], str], remedy: str, service: bool = False) -> Finding:
    try:
        return Finding(what, OK, ask())
    except HLLMError as error:
        lines = str(error).splitlines()
        advice = " ".join(line.strip() for line in lines[1:]) or remedy
        return Finding(what, MISSING, lines[0], advice, service and not isinstance(error, ConfigError))
    except Exception as error:
        # Drivers put the address they were given, password included, into messages: only the kind is shown.
        return Finding(what, MISSING, f"does not answer ({type(error).__name__})", remedy, service)


def _python() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == PYTHON:
        return Finding("Python", OK, here)
    return Finding("Python", MISSING, here, "Needs CPython 3.11: make setup PYTHON=/path/to/python3.11")


def _packages() -> Finding:
    """What `hllm` itself requires, against what is installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("hllm") or ()]
    wrong, count = [], 0
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Finding("packages", MISSING, "; ".join(wrong), "make setup")
    moved = _moved_from_constraints()
    if moved:
        return Finding("packages", NOTE, f"not the tested versions: {'; '.join(moved)}", "make setup")
    return Finding("packages", OK, f"{count} required packages, as constrained")


def _moved_from_constraints() -> list[str]:
    path = Path(__file__).parents[1] / "constraints.txt"
    if not path.exists():
        return []
    found = []
    for line in path.read_text("utf-8").splitlines():
        name, _, pinned = line.partition("==")
        try:
            installed = version(name.strip()).partition("+")[0]
        except (PackageNotFoundError, ValueError):
            continue
        if pinned and installed != pinned.strip():
            found.append(f"{name} {installed} instead of {pinned.strip()}")
    return found


def _memory() -> Finding:
    import psutil

    free, total = psutil.virtual_memory().available / GIB, psutil.virtual_memory().total / GIB
    limit = _container_limit()
    if limit and limit < total:
        total, free = limit, min(free, limit)
    said = f"{free:.1f} of {total:.1f} GiB are free"
    return _enough("memory", free, MEMORY_GIB, said, "Stop other programs, or take a larger machine or pod.")


def _container_limit() -> float | None:
    """What a container may use: the kernel ends a process that takes more."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) / GIB if text.isdigit() else None


def _disk(settings: Settings) -> Finding:
    from hllm.work.artifacts import Store

    folder = Store(settings.run.root).local.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Finding("disk", MISSING, f"{folder} is not writable", "Name another folder in run.root.")
    remedy = "Free some (`hllm prune`), or move run.root."
    return _enough("disk", free, DISK_GIB, f"{free:.0f} GiB are free in {folder}", remedy)


def _enough(what: str, free: float, needed: float, said: str, remedy: str) -> Finding:
    state = MISSING if free < needed else NOTE if free < 2 * needed else OK
    return Finding(what, state, said, f"At least {needed:g} GiB. {remedy}" if state != OK else "")


def _cores(settings: Settings) -> Finding:
    cores = len(os.sched_getaffinity(0))
    threads = settings.run.threads or cores
    if threads > cores:
        return Finding(
            "CPU", NOTE, f"{cores} cores for {threads} threads", "run.threads = 0 uses every core once."
        )
    return Finding("CPU", OK, f"{cores} cores, {threads} threads")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("GPU", MISSING, "torch is not installed", "make setup")
    if not torch.cuda.is_available():
        return Finding("GPU", OK, "none: everything runs on the CPU")
    cards = [torch.cuda.get_device_properties(card) for card in range(torch.cuda.device_count())]
    return Finding("GPU", OK, ", ".join(f"{card.name} ({card.total_memory / GIB:.0f} GiB)" for card in cards))


def _deepspeed(level: int) -> Finding:
    """Here, and on a CPU able to compile what its processes talk through."""
    what = f"DeepSpeed (train.zero = {level})"
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return Finding(what, MISSING, "not installed", "make setup, or train.zero = 0")
    import torch

    lacking = [tool for tool in ("c++", "ninja") if not shutil.which(tool)]
    if lacking and not torch.cuda.is_available():
        remedy = "On a CPU it compiles an extension: apt-get install g++ ninja-build, or train.zero = 0."
        return Finding(what, MISSING, f"{installed} without {' and '.join(lacking)}", remedy)
    return Finding(what, OK, installed)


def _source(settings: Settings) -> str:
    from hllm.data.readers import locations

    found = locations(settings.data)
    for location in found:
        if not is_s3(location) and not Path(location).is_file():
            raise ConfigError(
                "no such file", where=location, remedy="See the section [data] of the settings."
            )
    return f"{settings.data.source}: {', '.join(Path(location).name for location in found)}"


def _backbone(backbone: str, weights: bool = True, tokenizer: bool = False) -> str:
    if not backbone:
        return "a small random decoder (no backbone is named)"
    from hllm.models.common.backbone import find, require_readable

    source = find(backbone)
    if source.gguf_file or Path(source.name).is_dir():
        require_readable(backbone, weights, tokenizer)
        return f"{source.name}{'/' + source.gguf_file if source.gguf_file else ''}"
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source.name, "config.json"), str):
        return f"{source.name}, in the hub's cache"
    if os.environ.get("HF_HUB_OFFLINE", "") in {"1", "true", "TRUE"}:
        raise ConfigError("is not in the hub's cache, and HF_HUB_OFFLINE is set", where=backbone)
    return f"{source.name}, to be fetched from the hub at first use"


def _mlflow(settings: Settings) -> str:
    from hllm.registry import versions
    from hllm.work import mlflow as server

    with server.mlflow_errors(settings):
        server.client(settings).search_experiments(max_results=1)
    serving = versions.serving_version(settings)
    server.require_write(settings)
    champion = f"version {serving.version} of {serving.model} serves" if serving else "no version serves yet"
    return f"{server.shown(server.tracking_uri(settings))}, {champion}"


def _registry(settings: Settings) -> str:
    from hllm.features.store import PASSWORD, describe

    place = describe(settings, os.environ.get(PASSWORD, ""))["registry"]["path"]
    if is_s3(place):
        list_objects(place)
        return str(place)
    if "://" not in place:
        return _file(Path(place))
    import sqlalchemy

    engine = sqlalchemy.create_engine(place, pool_pre_ping=True)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))
    engine.dispose()
    return str(engine.url.render_as_string(hide_password=True))


def _online(settings: Settings) -> str:
    from hllm.features.store import PASSWORD, describe

    password = os.environ.get(PASSWORD, "")
    kind, url = settings.feast.online, settings.feast.online_url
    if kind == "sqlite":
        return f"sqlite: {_file(Path(url))}"
    if kind == "redis":
        import redis

        from hllm.features.stores.redis import refuse_eviction

        host, _, port = url.partition(",")[0].partition(":")
        with redis.Redis(host, int(port or 6379), password=password or None, socket_timeout=5) as asked:
            asked.ping()
            refuse_eviction(asked, f"redis {host}")
    else:
        _ask_postgres(describe(settings, password)["online_store"])
    return f"{kind} {url.partition(',')[0]} answers"


def _offline(settings: Settings) -> str:
    """Parquet files are written there by us, and read by Feast from wherever it runs."""
    from hllm.features.store import PASSWORD, describe

    place = settings.feast.offline_path
    if settings.feast.offline == "postgres":
        _ask_postgres(describe(settings, os.environ.get(PASSWORD, ""))["offline_store"])
        return f"postgres {place} answers"
    if is_s3(place):
        from hllm.features.stores.s3_files import require_reach

        said = _bucket(place)
        require_reach(place)
        return said
    if Path(place).is_file():
        raise ConfigError("is a file, not a folder", where=place)
    return f"files: {_file(Path(place))}"


def _ask_postgres(place: dict[str, Any]) -> None:
    import psycopg

    with psycopg.connect(
        host=place["host"],
        port=place["port"],
        dbname=place["database"],
        user=place["user"],
        password=place["password"] or None,
        sslmode=place["sslmode"],
        connect_timeout=5,
    ) as asked:
        asked.execute("SELECT 1")


def _file(path: Path) -> str:
    """A file or folder that can be written, or be made."""
    found = path.absolute()
    while not found.exists():
        found = found.parent
    if not os.access(found, os.W_OK):
        raise ConfigError("is not writable", where=found)
    if path.exists():
        return str(path)
    if not found.is_dir():
        raise ConfigError("is a file, not a folder", where=found)
    return f"{path} (made at first use)"


def _buckets(settings: Settings) -> list[str]:
    data = settings.data
    named = (settings.run.root, settings.mlflow.artifact_root, data.path, data.interactions, data.items)
    return list(dict.fromkeys(location for location in named if is_s3(location)))


def _bucket(location: str) -> str:
    """One listing proves address, credentials and bucket."""
    from hllm.work.objects import s3_client, s3_errors

    bucket, key = split_s3(location)
    with s3_errors(location):
        s3_client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    return f"{location} answers"
