"""Registered versions, and the one rule about them: a champion is always fully published.

`hllm promote` moves the alias `champion` only after the version's vectors were published, read back and
compared, and it writes the registered model's tag `hllm.serving_version`. MLflow has no permission per alias,
so anybody can also move `champion` in the MLflow page, to a version whose vectors are nowhere. Readers are
safe from that, because they ask `serving_version`: the alias counts only while the version it names carries
`publication = verified`; otherwise the last promoted version goes on serving, and a warning says what
happened. The tag `feast.feature_service` exists on verified versions only, so Feast's own lookup by alias
(`store.mlflow.resolve_features`) fails clearly instead of reading views that do not exist.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hllm.errors import ConfigError, DataError, InfraError
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work.artifacts import Store
from hllm.work.objects import is_s3

OUTPUT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
CANDIDATE, CHAMPION = "candidate", "champion"
VERIFIED = "verified"
PUBLISHING = ("publishing", "published", VERIFIED)
"""Something of such a version is in the feature store."""
PUBLICATIONS = ("absent", *PUBLISHING, "retired")
SERVING_TAG = "hllm.serving_version"
SERVICE_TAG = "feast.feature_service"


@dataclass(frozen=True)
class VersionInfo:
    """One registered version as the other parts need it."""

    model: str
    version: int
    run_id: str
    source: str
    description: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def verified(self) -> bool:
        return self.tags.get("publication") == VERIFIED

    def output(self, settings: Settings, tag: str = "export") -> tuple[str, str]:
        """(step, key) of the output that a tag names. A tag can be written by anybody: it is believed only of
        an output under `run.root`.

        Raises:
            DataError: it names no output.
            ConfigError: it names one under another root.
        """
        said = self.tags.get(tag, "")
        root, step, key = ["", "", *said.rstrip("/").rsplit("/", 2)][-3:]
        where = f"{self.model} version {self.version}"
        if not root or not all(OUTPUT_NAME.fullmatch(part) for part in (step, key)):
            raise DataError(
                f"its tag {tag} names no output: {said[:200]!r}",
                where=where,
                remedy="`hllm register` with the settings of that version writes the tag anew.",
            )
        if place_of(root) != place_of(settings.run.root):
            raise ConfigError(
                f"was made under {root}, not under run.root = {settings.run.root}",
                where=where,
                remedy="Use the settings that it was registered with.",
            )
        return step, key

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.version}"


def place_of(root: str) -> str:
    """A root as everybody would write it."""
    store = Store(root)
    return store.root if store.remote else str(store.local.resolve())


def registered_version(settings: Settings, version: str | None = None) -> VersionInfo:
    """The version given by number or alias, or else the one that these settings registered.

    Raises:
        ConfigError: there is no such version.
    """
    model = settings.mlflow.model_name
    if version is None:
        found = version_of_pipeline(settings, _pipeline(settings))
        if found is None:
            raise ConfigError(
                f"these settings have registered no version of {model}", remedy="Run `hllm register` first."
            )
        return found
    number = number_in(version)
    found = _by_number(settings, number) if number else _by_alias(settings, version)
    if found is None:
        kind = "version" if version.isdecimal() else "alias"
        raise ConfigError(
            f"{model} has no {kind} {version[:100]}", where="--version", remedy=_known(settings)
        )
    return found


def number_in(text: str) -> int | None:
    """The number of a version in a text that anybody may have written; None where it is no such number."""
    plain = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) or None if plain else None


def version_named(settings: Settings, text: str) -> VersionInfo | None:
    """The version whose number a tag holds, if there (still) is one."""
    number = number_in(text)
    return _by_number(settings, number) if number else None


def version_of_pipeline(settings: Settings, pipeline: str) -> VersionInfo | None:
    """The version that a pipeline registered; the first if there were ever two."""
    found = _search(settings, f"tags.pipeline = '{pipeline}'")
    # MLflow's search leaves the aliases out.
    return _by_number(settings, min(info.version for info in found)) if found else None


def all_versions(settings: Settings) -> list[VersionInfo]:
    """Every version, oldest first; without their aliases, which MLflow's search leaves out."""
    return sorted(_search(settings, ""), key=lambda info: info.version)


def champion(settings: Settings) -> VersionInfo | None:
    """The version that the alias names, whether it is published or not; readers want `serving_version`."""
    return _by_alias(settings, CHAMPION)


def serving_version(settings: Settings) -> VersionInfo | None:
    """The version whose vectors are to be read: the champion if it is verified, or else the last promoted.

    The second case happens when somebody moves or removes the alias by hand; stderr says so.
    """
    named = champion(settings)
    if named and named.verified:
        return named
    last = last_promoted(settings)
    if last and not last.verified:
        last = None
    if named:
        state = named.tags.get("publication", "absent")
        what = f"the alias {CHAMPION} names version {named.version}, which is not published ({state})"
        if last:
            _warn(
                f"{what}: it was moved by hand. Version {last.version}, promoted last, goes on serving. "
                f"Publish, verify and promote version {named.version}, or `hllm rollback --to {last.version}`"
            )
        else:
            _warn(f"{what}, and no version was promoted before it: nothing serves")
    elif last:
        _warn(f"the alias {CHAMPION} is gone; version {last.version}, promoted last, goes on serving")
    return last


def last_promoted(settings: Settings) -> VersionInfo | None:
    """The version that `promote` or `rollback` chose last, wherever the alias points now."""
    return version_named(settings, model_tags(settings).get(SERVING_TAG, ""))


def set_tags(settings: Settings, version: int | str, tags: Mapping[str, str | None]) -> None:
    """Write tags of a version; None removes one.

    Raises:
        ConfigError: an unknown publication, or a feature service on a version that is not verified.
    """
    publication = tags.get("publication")
    if publication is not None and publication not in PUBLICATIONS:
        raise ConfigError(
            f"publication is one of {', '.join(PUBLICATIONS)}", where=f"publication = {publication}"
        )
    model = settings.mlflow.model_name
    with _registry(settings) as client:
        if tags.get(SERVICE_TAG) and publication != VERIFIED:
            now = client.get_model_version(model, str(version)).tags.get("publication")
            if publication is not None or now != VERIFIED:
                raise ConfigError(
                    f"{SERVICE_TAG} is set only on a verified version", where=f"{model} version {version}"
                )
        ordered = dict(tags)
        if publication is not None and publication != VERIFIED:
            ordered = {SERVICE_TAG: None, **ordered}
        elif publication is not None:
            service = ordered.pop(SERVICE_TAG, None)
            ordered |= {"publication": ordered.pop("publication")}
            ordered |= {SERVICE_TAG: service} if service else {}  # of a verified version only
        for name, value in ordered.items():
            if value is None:
                client.delete_model_version_tag(model, str(version), name)
            else:
                client.set_model_version_tag(model, str(version), name, value)


def model_tags(settings: Settings) -> dict[str, str]:
    """Tags of the registered model; empty when there is no such model yet."""
    with _registry(settings) as client, server.nothing_found():
        return dict(client.get_registered_model(settings.mlflow.model_name).tags)
    return {}


def set_model_tags(settings: Settings, tags: Mapping[str, str]) -> None:
    with _registry(settings) as client:
        for name, value in tags.items():
            client.set_registered_model_tag(settings.mlflow.model_name, name, value)


def set_alias(settings: Settings, alias: str, version: int) -> None:
    with _registry(settings) as client:
        client.set_registered_model_alias(settings.mlflow.model_name, alias, str(version))


def remove_alias(settings: Settings, alias: str) -> None:
    with _registry(settings) as client, server.nothing_found():
        client.delete_registered_model_alias(settings.mlflow.model_name, alias)


def download_package(settings: Settings, version: int | str) -> Path:
    """The deployable package of a version as a local folder; files that lie on this machine are not copied.

    Raises:
        InfraError: MLflow's artifact store does not hand it out.
    """
    from mlflow.artifacts import download_artifacts

    info = registered_version(settings, str(version))
    inside = "artifacts/package"
    source = f"{info.uri}/{inside}"
    uri = server.tracking_uri(settings)
    cache = Store(settings.run.root).local / "packages" / f"{info.model}-{info.version}-{info.run_id[:8]}"
    if (cache / "complete").exists():
        return cache / inside
    server.point_fluent_at(settings)
    with server.mlflow_errors(settings):
        try:
            with _registry(settings) as client:
                where = client.get_model_version_download_uri(info.model, str(info.version))
            on_this_machine = not is_s3(where) and not uri.startswith("http")
            found = Path(download_artifacts(source, dst_path=None if on_this_machine else str(cache)))
        except OSError as error:
            raise InfraError(f"the package cannot be read: {error}", where=source) from error
    if not found.is_dir():
        raise InfraError("the package is not there", where=source, remedy="Was its artifact folder deleted?")
    if not on_this_machine:
        (cache / "complete").touch()
    return found


# ---- looking versions up ----


@contextmanager
def _registry(settings: Settings) -> Iterator[Any]:
    client = server.client(settings)
    with server.mlflow_errors(settings):
        yield client


def _search(settings: Settings, condition: str) -> list[VersionInfo]:
    name = f"name = '{settings.mlflow.model_name}'"
    query, found, page = f"{name} AND {condition}" if condition else name, [], None
    with _registry(settings) as client:
        while True:
            answer = client.search_model_versions(query, page_token=page)
            found += [_info(entry) for entry in answer]
            page = answer.token
            if not page:
                return found


def _by_number(settings: Settings, version: int) -> VersionInfo | None:
    with _registry(settings) as client, server.nothing_found():
        return _info(client.get_model_version(settings.mlflow.model_name, str(version)))
    return None


def _by_alias(settings: Settings, alias: str) -> VersionInfo | None:
    with _registry(settings) as client, server.nothing_found():
        return _info(client.get_model_version_by_alias(settings.mlflow.model_name, alias))
    return None


def _info(entry: Any) -> VersionInfo:
    return VersionInfo(
        model=entry.name,
        version=int(entry.version),
        run_id=entry.run_id or "",
        source=entry.source,
        description=entry.description or "",
        tags=dict(entry.tags),
        aliases=tuple(entry.aliases),
    )


def _pipeline(settings: Settings) -> str:
    from hllm.pipeline import keys, pipeline_key

    return pipeline_key(keys(settings))


def _known(settings: Settings) -> str:
    numbers = [str(info.version) for info in all_versions(settings)]
    return (
        f"Versions: {', '.join(numbers)}."
        if numbers
        else "No version is registered yet: run `hllm register`."
    )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
