"""The Feast store that the settings describe: one description, for this process and for others.

The password of a server is read from HLLM_FEAST_PASSWORD and nowhere else. In the file written for plain
Feast users it stays the text `${HLLM_FEAST_PASSWORD}`, which Feast itself fills in from their environment.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from hllm.errors import ConfigError, HLLMError, InfraError
from hllm.features.stores.s3_files import SCHEME, reach_s3
from hllm.settings import Settings
from hllm.work.artifacts import write_atomically
from hllm.work.lease import claimed
from hllm.work.objects import is_s3, read_object, write_object

if TYPE_CHECKING:
    from feast import FeatureStore

PASSWORD = "HLLM_FEAST_PASSWORD"  # noqa: S105  (the variable's name)
CACHE_SECONDS = 60
"""How soon a long-running reader sees a newly published version."""


def open_store(settings: Settings, mlflow: bool = False) -> FeatureStore:
    """Feast, configured by the settings. The import takes seconds: only commands that need Feast call this.

    With `mlflow`, `store.mlflow.resolve_features("models:/hllm/champion")` works, and costs its import."""
    os.environ.setdefault("FEAST_USAGE", "False")
    from feast import FeatureStore, RepoConfig

    # After the import, which sets filters of its own. Our on-demand view is one product per row, in numpy.
    warnings.filterwarnings("ignore", message="On demand feature view is an experimental feature")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ibis")
    atexit.register(_leave_quietly)
    if settings.feast.offline == "file" and is_s3(settings.feast.offline_path):
        reach_s3()
    _make_folders(settings)
    with service_errors(settings):
        _make_registry(settings)
        content = describe(settings, os.environ.get(PASSWORD, ""))
        content["mlflow"] |= {"enabled": mlflow}
        if content["registry"]["registry_type"] == "file":
            kind = "WholeS3RegistryStore" if is_s3(settings.feast.registry) else "WholeFileRegistryStore"
            content["registry"]["registry_store_type"] = f"hllm.features.stores.registry.{kind}"
        store = FeatureStore(config=RepoConfig(**content))
        _ = store.registry  # read now: one that is gone or damaged is no store
        return store


def write_yaml(settings: Settings, folder: Path) -> Path:
    """A `feature_store.yaml` for people who use Feast without this package. It holds no password."""
    import yaml

    path = folder / "feature_store.yaml"
    text = yaml.safe_dump(
        describe(settings, f"${{{PASSWORD}}}" if os.environ.get(PASSWORD) else ""), sort_keys=False
    )
    write_atomically(
        path,
        b"# Written by `hllm publish`: the stores that these vectors were published to.\n" + text.encode(),
    )
    return path


def describe(settings: Settings, password: str) -> dict[str, Any]:
    """The content of a feature_store.yaml, with absolute paths: Feast resolves relative ones against the
    folder of that file, our settings against the working directory."""
    return {
        "project": settings.feast.project,
        "provider": "local",
        "registry": _registry(settings, password),
        "online_store": _online(settings, password),
        "offline_store": _offline(settings, password),
        "entity_key_serialization_version": 3,
        "mlflow": _mlflow(settings),
    }


def _mlflow(settings: Settings) -> dict[str, Any]:
    """Feast finds a model's feature service through MLflow. An address with a password is not written
    down: MLFLOW_TRACKING_URI, where it came from, works for Feast too."""
    from hllm.work.mlflow import local_database, tracking_uri

    uri = tracking_uri(settings)
    database = local_database(uri)
    found: dict[str, Any] = {"enabled": True, "auto_log": False}
    if not urlsplit(uri).password:
        found["tracking_uri"] = f"sqlite:///{database.absolute()}" if database else uri
    return found


def online_path(settings: Settings) -> Path:
    return Path(settings.feast.online_url).absolute()


def _registry(settings: Settings, password: str) -> dict[str, Any]:
    place = settings.feast.registry
    if "://" not in place:
        return {
            "registry_type": "file",
            "path": str(Path(place).absolute()),
            "cache_ttl_seconds": CACHE_SECONDS,
        }
    if is_s3(place):
        return {"registry_type": "file", "path": place, "cache_ttl_seconds": CACHE_SECONDS}
    scheme, _, rest = place.partition("://")
    user, at, where = rest.rpartition("@")
    if ":" in user:
        raise ConfigError(
            "a password in the registry's URL would end up in logs",
            where="feast.registry",
            remedy=f"Put it into {PASSWORD}.",
        )
    if user and password:
        user += ":" + (password if password.startswith("${") else quote(password, safe=""))
    return {
        "registry_type": "sql",
        "path": f"{scheme}://{user}{at}{where}",
        "cache_ttl_seconds": CACHE_SECONDS,
    }


def _online(settings: Settings, password: str) -> dict[str, Any]:
    if settings.feast.online == "sqlite":
        return {"type": "sqlite", "path": str(online_path(settings))}
    if settings.feast.online == "redis":
        # A comma would end the parameter. Feast reads it as JSON, in which a comma has another spelling.
        secret = password if password.startswith("${") else json.dumps(password).replace(",", "\\u002c")
        text = settings.feast.online_url + (f",password={secret}" if password else "")
        # One publication writes a version's rows: reading their old timestamps first would be wasted. And
        # `hllm retire` removes rows: Feast would hold every key in memory for that.
        return {
            "type": "redis",
            "connection_string": text,
            "skip_dedup": True,
            "full_scan_for_deletion": False,
        }
    return {"type": "postgres", **postgres(settings.feast.online_url, password, "feast.online_url")}


def _offline(settings: Settings, password: str) -> dict[str, Any]:
    if settings.feast.offline == "file":
        # Not Feast's default reader of files (dask): it keeps one candidate per user and second, and
        # drops training rows older than the first vector, both without a word.
        return {"type": "duckdb"}
    return {"type": "postgres", **postgres(settings.feast.offline_path, password, "feast.offline_path")}


def postgres(place: str, password: str, setting: str) -> dict[str, Any]:
    """`[user@]host:port/database`; the host may be the folder of a Unix socket."""
    address, slash, database = place.rpartition("/")
    user, _, server = address.rpartition("@")
    host, colon, port = server.rpartition(":")
    if not slash or not colon or not database or not port.isdigit():
        raise ConfigError(
            f"{place!r} does not name a PostgreSQL database",
            where=setting,
            remedy="Write [user@]host:port/database.",
        )
    return {
        "host": host,
        "port": int(port),
        "database": database,
        "db_schema": "public",
        "user": user or "hllm",
        "password": password,
        "sslmode": os.environ.get("PGSSLMODE", "prefer"),
    }


def connect_postgres(settings: Settings, setting: str) -> Any:
    """A connection to the database that `feast.offline_path` or `feast.online_url` names."""
    import psycopg

    place = postgres(settings.at(setting), os.environ.get(PASSWORD, ""), setting)
    return psycopg.connect(
        host=place["host"],
        port=place["port"],
        dbname=place["database"],
        user=place["user"],
        password=place["password"],
        sslmode=place["sslmode"],
    )


def _leave_quietly() -> None:
    """Let go of the DuckDB connection under Feast's offline store: with Feast loaded, Python leaves it to
    DuckDB's own library to notice at exit, which then prints forty lines about leaked objects."""
    ibis = sys.modules.get("ibis")
    backend = ibis.options.default_backend if ibis else None
    if backend is not None:
        backend.con = None


def _make_registry(settings: Settings) -> None:
    """The first of all registries is made here, empty. Where one has been, or a publication knows of one,
    its absence is an error."""
    place = settings.feast.registry
    if _is_there(place) or was_published(settings):
        return
    from hllm.features.stores.registry import empty

    with registry_lock(settings):
        if not _is_there(place):
            write_registry(place, empty())


def was_published(settings: Settings) -> bool:
    """Whether something was registered in the registry of these settings."""
    place = settings.feast.registry
    if "://" not in place and _lock_of(place).exists():
        return True
    from hllm.work.artifacts import Store

    known = (manifest.facts.get("registry") for manifest in Store(settings.run.root).finished("publish"))
    return (place if "://" in place else str(Path(place).absolute())) in known


def _is_there(place: str) -> bool:
    if is_s3(place):
        return read_object(place) is not None
    return "://" in place or Path(place).exists()


def write_registry(place: str, content: bytes) -> None:
    if is_s3(place):
        write_object(place, content)
    else:
        write_atomically(Path(place).absolute(), content)


def _lock_of(place: str) -> Path:
    path = Path(place).absolute()
    return path.with_name(f".{path.name}.lock")


def renew_registry(settings: Settings) -> bool:
    """Make an empty registry in the place of one that is gone or damaged, which is kept beside; whether that
    was needed. For `hllm publish --again`, which registers what was published."""
    from hllm.features.stores.registry import empty, parsed

    place = settings.feast.registry
    if "://" in place and not is_s3(place):
        return False
    with registry_lock(settings):
        content = read_object(place) if is_s3(place) else _content(Path(place))
        if content is not None:
            with contextlib.suppress(InfraError):
                parsed(content, place)
                return False
            write_registry(f"{place}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}", content)
        write_registry(place, empty())
        return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _make_folders(settings: Settings) -> None:
    if "://" not in settings.feast.registry:
        Path(settings.feast.registry).absolute().parent.mkdir(parents=True, exist_ok=True)
    if settings.feast.online == "sqlite":
        online_path(settings).parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def service_errors(settings: Settings) -> Iterator[None]:
    """A server that does not answer, as an error that says which one and that a retry helps."""
    try:
        yield
    except HLLMError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library == "_duckdb" and f"{SCHEME}://" in str(error):
            raise InfraError(
                f"an offline file cannot be read: {str(error).splitlines()[0]}",
                where=settings.feast.offline_path,
                remedy="Does S3 answer (`hllm doctor`)? Then run the same command again.",
            ) from error
        if library not in {"redis", "psycopg", "psycopg_pool", "sqlite3", "sqlalchemy"}:
            raise
        raise InfraError(
            f"the feature store failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=f"{settings.feast.online} {settings.feast.online_url}",
            remedy=f"Check that the stores in [feast] answer, and {PASSWORD} if they want a password; "
            "then run the same command again.",
        ) from error


@contextlib.contextmanager
def registry_lock(settings: Settings) -> Iterator[None]:
    """Feast rewrites a registry file whole: of two publications at once it would lose one."""
    place = settings.feast.registry
    if is_s3(place):
        with claimed(f"{place}.lock", f"process {os.getpid()} on {socket.gethostname()}"):
            yield
        return
    if "://" in place:
        yield
        return
    import fcntl

    path = _lock_of(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
