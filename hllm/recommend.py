"""`hllm recommend`: what the serving version would show a user, or somebody with a history of your choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from hllm.data.prepared import Prepared
from hllm.embedding.package import Package
from hllm.errors import ConfigError, DataError
from hllm.features.export import USER
from hllm.features.store import open_store, service_errors
from hllm.features.views import view_name
from hllm.models.family import family, untrained
from hllm.pipeline import keys
from hllm.registry import versions
from hllm.serving.retriever import Recommendation, Retriever
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work.artifacts import Store

if TYPE_CHECKING:
    from hllm.registry.versions import VersionInfo

SHOWN = 5


@dataclass(frozen=True)
class Request:
    """What is recommended for: a heading for people, a vector, and what the user has had (oldest first)."""

    heading: str
    vector_D: npt.NDArray[np.float32] | None
    seen: list[str]


def recommend(
    settings: Settings, version: str | None, user: str | None, history: list[str] | None, k: int
) -> str:
    """A table of the k best items with their titles.

    Raises:
        ConfigError: neither or both of user and history, or no such version.
        DataError: the user has no vector, or the model does not know an item of the history.
    """
    if (user is None) == (history is None):
        raise ConfigError("give either --user or --history", where="hllm recommend")
    info = _version(settings, version)
    package = Package.open(versions.download_package(settings, info.version))
    retriever = Retriever.of(package)
    if history is not None:
        request = Request(f"after {len(history):,} items", None, history)
        found = retriever.for_history(history, k)
    else:
        request = of_user(settings, info, str(user))
        if package.objective == "late_fusion":
            # What it publishes for rankers is its output at [USER]; the catalogue is ranked by the interest.
            if not request.seen:
                raise DataError(
                    "the log it learned from is not at hand, and its published vectors rank no catalogue",
                    where=f"{info.model} version {info.version} (late fusion)",
                    remedy="Give the user's items with --history.",
                )
            found = retriever.for_history(request.seen, k)
        else:
            found = retriever.for_vector(np.asarray(request.vector_D), request.seen, k)
    return _text(info, package, request, found)


def recommend_untrained(
    settings: Settings, name: str, user: str | None, history: list[str] | None, k: int
) -> str:
    """A table of the k best items by a family that needs no training, from the prepared output of these
    settings.

    Raises:
        ConfigError: neither or both of user and history, or a family that is trained.
        DataError: `prepare` has not run, or it does not know the user or any item of the history.
    """
    if (user is None) == (history is None):
        raise ConfigError("give either --user or --history", where="hllm recommend")
    chosen = family(name)
    if chosen.stages or not hasattr(chosen.module, "scorer"):
        able = [each.name for each in untrained() if hasattr(each.module, "scorer")]
        raise ConfigError(
            "recommends by its registered versions (leave --family out)" if chosen.stages else "cannot",
            where=f"--family {name}",
            remedy=f"Without training recommend: {', '.join(able)}.",
        )
    prepared = Prepared.open(Store(settings.run.root).fetch("prepare", keys(settings)["prepare"]))
    table = prepared.item_table(["item_id", "title"])
    ids, titles = table["item_id"].to_pylist(), table["title"].to_pylist()
    if user is not None:
        users = prepared.user_table(["user_id"])["user_id"].to_pylist()
        if user not in users:
            raise DataError("is not in the prepared log", where=f"user {user!r}")
        at = users.index(user)
        start, end = prepared.user_offsets[at : at + 2]
        seen = np.asarray(prepared.event_items[start:end], np.int64)
    else:
        places = {item: place for place, item in enumerate(ids)}
        seen = np.array([places[item] for item in history or () if item in places], np.int64)
        if not len(seen):
            raise DataError("none of these items is in the catalogue", where="--history")
    scores_I = chosen.module.scorer(settings, prepared)([seen])[0]
    scores_I[seen] = -np.inf
    best = np.argsort(-scores_I, kind="stable")[:k]
    rows = [
        (number, _in_one_line(ids[item]), _in_one_line(titles[item] or ""), f"{scores_I[item]:.4f}")
        for number, item in enumerate(best, 1)
    ]
    heading = f"{chosen.title}, nothing trained, after {len(seen):,} events"
    return f"{heading}\n" + tabulate(rows, headers=("", "item", "title", "score"), disable_numparse=True)


def _version(settings: Settings, version: str | None) -> VersionInfo:
    if version is not None:
        return versions.registered_version(settings, version)
    serving = versions.serving_version(settings)
    if serving is None:
        raise ConfigError(
            f"no version of {settings.mlflow.model_name} serves yet",
            where="hllm recommend",
            remedy="Promote one, or name one with --version (a candidate answers --history).",
        )
    return serving


def of_user(settings: Settings, info: VersionInfo, user: str) -> Request:
    """The user's vector as ranking models read it, and what the log of the version's training knows of them.

    Raises:
        ConfigError: the version's vectors are not published.
        DataError: the user has no vector.
    """
    if info.tags.get("publication") not in ("published", versions.VERIFIED):
        raise ConfigError(
            "is not published, so its users have no vectors to read",
            where=f"{info.model} version {info.version}",
            remedy="Publish it (`hllm publish`), or give the user's items with --history.",
        )
    view, entity = view_name(USER, info.version), {USER.join_key: user}
    with service_errors(settings):
        columns = [f"{view}:{USER.vector}", f"{view}:{USER.columns['events']}"]
        answer: dict[str, Any] = (
            open_store(settings).get_online_features(features=columns, entity_rows=[entity]).to_dict()
        )
    vector = answer[USER.vector][0]
    if vector is None:
        raise DataError(
            f"has no vector in {view}",
            where=f"user {user!r}",
            remedy="Ids are strings, exactly as in the log. Of a new user, give the items with --history.",
        )
    seen = _log_of(settings, info, user)
    known = f"{answer[USER.columns['events']][0]:,} events"
    missing = "" if seen else "; the log is not at hand, so items they have had are not left out"
    return Request(f"user {user}, {known}{missing}", np.asarray(vector, np.float32), seen)


def _log_of(settings: Settings, info: VersionInfo, user: str) -> list[str]:
    """The user's items in the log that the version was trained on, oldest first; none if it is not there."""
    import pyarrow.parquet as parquet

    with server.mlflow_errors(settings):
        tags = server.client(settings).get_run(info.run_id).data.tags if info.run_id else {}
    store, key = Store(settings.run.root), tags.get("hllm.output.prepare", "")
    if not versions.OUTPUT_NAME.fullmatch(key) or store.manifest("prepare", key) is None:
        return []
    prepared = Prepared.open(store.fetch("prepare", key))
    rows = parquet.read_table(
        prepared.folder / "users.parquet", columns=["user_index"], filters=[("user_id", "=", user)]
    )
    if not rows.num_rows:
        return []
    at = rows["user_index"][0].as_py()
    items = prepared.event_items[prepared.user_offsets[at] : prepared.user_offsets[at + 1]]
    return prepared.item_table(["item_id"])["item_id"].take(np.asarray(items)).to_pylist()


def _text(info: VersionInfo, package: Package, request: Request, found: list[Recommendation]) -> str:
    latest = [
        package.titles[package.places[item]] or item
        for item in request.seen[-SHOWN:]
        if item in package.places
    ]
    rows = [
        (number, _in_one_line(one.item_id), _in_one_line(one.title), f"{one.score:.4f}")
        for number, one in enumerate(found, 1)
    ]
    return "\n".join(
        [
            f"{info.model} version {info.version}, {request.heading}",
            *([f"latest: {'; '.join(map(_in_one_line, latest))}"] if latest else []),
            tabulate(rows, headers=("", "item", "title", "cosine"), disable_numparse=True),
        ]
    )


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
