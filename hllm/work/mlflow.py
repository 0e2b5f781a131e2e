"""MLflow's store or server: where it is, a quiet client for it, and its failures as our errors."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hllm.errors import ConfigError, InfraError
from hllm.settings import Settings
from hllm.work.objects import is_s3, s3_errors
from hllm.work.waiting import waiting_for

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own defaults wait for minutes before they admit that nobody answers; we retry whole steps.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
_SQLITE = "sqlite:///"


def tracking_uri(settings: Settings) -> str:
    """MLFLOW_TRACKING_URI when it is set, `mlflow.tracking_uri` otherwise."""
    return os.environ.get("MLFLOW_TRACKING_URI") or settings.mlflow.tracking_uri


def shown(uri: str) -> str:
    """The address without the password it may hold."""
    parts = urlsplit(uri)
    return uri.replace(f"{parts.username or ''}:{parts.password}@", "***@") if parts.password else uri


def local_database(uri: str) -> Path | None:
    """The file behind a SQLite store."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def artifact_location(settings: Settings) -> str | None:
    """Where a new experiment keeps its files. A server decides for itself unless the setting names S3:
    a folder of this machine would mean nothing to it."""
    root = settings.mlflow.artifact_root
    if is_s3(root):
        return f"{root.rstrip('/')}/{settings.run.name}"
    if tracking_uri(settings).startswith("http"):
        return None
    return (Path(root).resolve() / settings.run.name).as_uri()


def client(settings: Settings) -> MlflowClient:
    """A client that prints nothing.

    Raises:
        InfraError: the server does not answer.
    """
    quiet()
    uri = tracking_uri(settings)
    _knock(uri)
    database = local_database(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    registry = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    # Two processes must not create the tables of a new database at the same time.
    with mlflow_errors(settings), local_lock(uri), waiting_for(f"MLflow at {shown(uri)}"):
        if database is not None and not database.exists():
            _make_database(database)
        try:
            return MlflowClient(tracking_uri=uri, registry_uri=registry)
        except (MlflowException, SQLAlchemyError):
            if database is None or not _holds_nothing(database):
                raise
            aside = database.with_name(f"{database.name}.half-made-{time.strftime('%Y%m%dT%H%M%S')}")
            database.replace(aside)
            print(f"mlflow: {database} was half made and is made anew ({aside.name})", file=sys.stderr)
            _make_database(database)
            return MlflowClient(tracking_uri=uri, registry_uri=registry)


def _make_database(database: Path) -> None:
    """MLflow's tables take a second to make: beside, and in place once they are whole. Who is killed in
    between leaves a file that the next one removes."""
    from mlflow.tracking import MlflowClient

    building = database.with_name(f".{database.name}.new")
    building.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"{_SQLITE}{building.absolute()}").search_experiments(max_results=1)
    os.replace(building, database)


def _holds_nothing(database: Path) -> bool:
    """Whether a database that MLflow does not open has no run and no registered model: then nothing is lost
    with it. One that cannot be read is not touched."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            return not any(
                connection.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0]
                for table in ("runs", "registered_models", "logged_models")
                if table in tables
            )
    except sqlite3.Error:
        return False


def page_root(settings: Settings) -> str:
    """Where MLflow's web pages are: at the server, or where `make ui` shows a local store now; else empty."""
    uri = tracking_uri(settings)
    if uri.startswith("http"):
        return shown(uri).rstrip("/") + "/"
    import psutil

    for process in psutil.process_iter(["cmdline", "cwd"]):
        argv = process.info["cmdline"] or []
        shows = {"mlflow", "server", "--port", "--backend-store-uri", uri} <= set(argv)
        if shows and process.info["cwd"] == os.getcwd():
            return f"http://127.0.0.1:{argv[argv.index('--port') + 1]}/"
    return ""


def point_fluent_at(settings: Settings) -> None:
    """The functions that take no client (log_model, load_model) read the address from a global."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri(settings))
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri(settings))


def quiet() -> None:
    """No addresses, progress bars and notices on stdout; must be called before mlflow is first imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def wait_for(settings: Settings, seconds: float) -> None:
    """Return when the server answers.

    Raises:
        InfraError: it did not for so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _knock(tracking_uri(settings))
        except InfraError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@contextmanager
def local_lock(uri: str) -> Iterator[None]:
    """One process at a time, for a store on this machine; a server guards itself."""
    database = local_database(uri)
    if database is None:
        yield
        return
    import fcntl

    with database.with_name(f".{database.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def mlflow_errors(settings: Settings) -> Iterator[None]:
    """MLflow's exceptions, and those of the S3 that keeps its files, as the two that matter: you can fix it
    (ConfigError), or try again (InfraError)."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    uri = shown(tracking_uri(settings))
    try:
        with waiting_for(f"MLflow at {uri}"):
            yield
    except MlflowException as error:
        first = str(error.message).splitlines()[0][:300]
        if error.error_code in {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}:
            remedy = "Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
            raise ConfigError(f"MLflow refuses access: {first}", where=uri, remedy=remedy) from error
        if error.error_code in {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}:
            raise ConfigError(f"MLflow refuses the request: {first}", where=uri) from error
        raise InfraError(f"MLflow failed: {first}", where=uri, remedy=_REMEDY) from error
    except (RequestException, SQLAlchemyError) as error:
        raise InfraError(
            f"MLflow failed: {str(error).splitlines()[0][:300]}", where=uri, remedy=_REMEDY
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in {"boto3", "botocore"}:
            raise
        # A server may keep files in S3 whatever our own setting says.
        root = settings.mlflow.artifact_root
        with s3_errors(root if is_s3(root) else uri, "mlflow.artifact_root" if is_s3(root) else ""):
            raise


@contextmanager
def nothing_found() -> Iterator[None]:
    """MLflow raises where we expect an empty answer, by two different codes."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        absent = error.error_code in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
        if not absent and "not found" not in str(error.message).lower():
            raise


def require_write(settings: Settings) -> None:
    """Who may only read finds it out here: a tag that nobody has set is taken away from the experiment and
    the model, where they exist. That changes nothing and needs the same permission as every change.

    Raises:
        ConfigError: MLflow refuses.
        InfraError: MLflow does not answer.
    """
    asked = client(settings)
    with mlflow_errors(settings):
        experiment = asked.get_experiment_by_name(settings.run.name)
        if experiment is not None:
            with nothing_found():
                asked.delete_experiment_tag(experiment.experiment_id, "hllm.doctor")
        with nothing_found():
            asked.delete_registered_model_tag(settings.mlflow.model_name, "hllm.doctor")


_REMEDY = (
    "Is MLflow running where MLFLOW_TRACKING_URI or mlflow.tracking_uri say? Then run the same command again."
)


def _knock(uri: str) -> None:
    """A server that is not there is noticed in seconds, before any work."""
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname, port), timeout=5):
            pass
    except OSError as error:
        raise InfraError(f"MLflow does not answer: {error}", where=shown(uri), remedy=_REMEDY) from None
