"""What settings alone decide, beyond each value by itself: refused when they are read, not hours later.

Each rule is one function: it raises ConfigError with the setting's name and what to do.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from hllm.errors import ConfigError
from hllm.settings.location import folder
from hllm.settings.tree import Settings

FEAST_PROJECT = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_]{0,62}")
HOST_PORT = re.compile(r"[^\s/@,:]+:\d{1,5}")
LABELLED = ("auc", "uauc", "wuauc")
PROCESSES_PER_CORE = 4
TASKS = (
    *("ingest", "validate", "prepare", "evaluate", "rank", "register", "publish", "verify", "promote"),
    *("reject", "refresh-items", "refresh-users", "watch", "retire", "prune"),
)


def check(settings: Settings) -> None:
    """
    Raises:
        ConfigError: the first rule that these settings break.
    """
    for rule in RULES:
        rule(settings)


def families_are_known(settings: Settings) -> None:
    known = _families()
    for where, names in (
        ("model.family", [settings.model.family]),
        ("model.baselines", settings.model.baselines),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{where}: there is no model family {name}" + _near(name, known),
                    remedy=f"There are {', '.join(known)}.",
                )
            if not known[name].stages:
                raise ConfigError(
                    f"{where}: {name} is not trained: it stands in every evaluation by itself",
                    remedy=f"Trained families: {', '.join(n for n, f in known.items() if f.stages)}.",
                )
    if settings.model.family in settings.model.baselines:
        raise ConfigError(f"model.baselines: {settings.model.family} is the model itself")
    if len(set(settings.model.baselines)) < len(settings.model.baselines):
        raise ConfigError("model.baselines: a family is there twice")
    stages = len(known[settings.model.family].stages)
    if settings.model.stages > stages:
        raise ConfigError(f"model.stages: {settings.model.family} has {stages} stages")


def gate_asks_for_what_is_measured(settings: Settings) -> None:
    gate, known = settings.gate, _families()
    cutoffs = [f"{kind}@{k}" for kind in ("ndcg", "recall") for k in settings.evaluation.cutoffs]
    judging = known[settings.model.family].learns(settings) != "generative"
    measured = [*cutoffs, *(LABELLED if judging else ())]
    if gate.metric not in measured:
        raise ConfigError(
            f"gate.metric: {gate.metric} is not measured" + _near(gate.metric, measured),
            remedy=f"Measured are {', '.join(measured)} (evaluation.cutoffs).",
        )
    for name in gate.min_vs:
        if name not in known:
            raise ConfigError(f"gate.min_vs.{name}: there is no such model family" + _near(name, known))
        compared = not known[name].stages or name in (settings.model.family, *settings.model.baselines)
        if gate.min_vs[name] and not compared:
            raise ConfigError(
                f"gate.min_vs.{name}: {known[name].title} is not trained beside the model",
                remedy=f'Add "{name}" to model.baselines, or set gate.min_vs.{name} = 0.',
            )


def cutoffs_are_cutoffs(settings: Settings) -> None:
    cutoffs = settings.evaluation.cutoffs
    if not cutoffs or min(cutoffs) < 1 or len(set(cutoffs)) < len(cutoffs):
        raise ConfigError(
            f"evaluation.cutoffs: {list(cutoffs)} are not one or more different whole numbers from 1 on"
        )


def split_has_its_days(settings: Settings) -> None:
    prepare, ranking = settings.prepare, settings.ranking
    days = {"prepare.valid_from": prepare.valid_from, "prepare.test_from": prepare.test_from}
    days |= {"ranking.valid_from": ranking.valid_from, "ranking.test_from": ranking.test_from}
    days["validation.not_before"] = settings.validation.not_before
    moments = {name: _day(name, text) for name, text in days.items() if text}
    if prepare.split == "temporal":
        for name in ("prepare.valid_from", "prepare.test_from"):
            if name not in moments:
                raise ConfigError(f"{name}: a temporal split needs the day", remedy="Like 2024-03-31.")
        if not moments["prepare.valid_from"] < moments["prepare.test_from"]:
            raise ConfigError("prepare.test_from: is not after prepare.valid_from")
    if ranking.test_from:
        if prepare.split != "temporal":
            raise ConfigError('ranking.test_from: a ranker needs prepare.split = "temporal"')
        if "ranking.valid_from" not in moments:
            raise ConfigError("ranking.valid_from: a ranker needs the day")
        order = ("prepare.test_from", "ranking.valid_from", "ranking.test_from")
        for before, after in pairwise(order):
            if not moments[before] < moments[after]:
                raise ConfigError(f"{after}: is not after {before}")


def widths_divide_by_heads(settings: Settings) -> None:
    for name, family in _families().items():
        if not family.settings.model_fields:
            continue
        section = settings.at(name)
        towers = [(name, section), *((f"{name}.{each}", getattr(section, each)) for each in family.backbones)]
        for where, tower in towers:
            width, heads = getattr(tower, "width", 0), getattr(tower, "heads", 0)
            if not heads or getattr(tower, "backbone", False):
                continue
            if width % heads:
                raise ConfigError(f"{where}.heads: {heads} heads do not divide a width of {width}")
            if hasattr(tower, "backbone") and width // heads % 2:
                raise ConfigError(
                    f"{where}.heads: a head of {width // heads} is not even, as rotary positions want it"
                )


def names_are_names(settings: Settings) -> None:
    if not FEAST_PROJECT.fullmatch(settings.feast.project):
        raise ConfigError(
            f"feast.project: {settings.feast.project!r} is no name of a Feast project",
            remedy="Letters, digits and _, beginning with a letter or digit, at most 63.",
        )
    model = settings.mlflow.model_name
    if not model.strip() or model != model.strip() or re.search(r"[./:%\"'\x00-\x1f]", model):
        raise ConfigError(
            f"mlflow.model_name: {model!r} is no name of a registered model",
            remedy="Without . / : % and quotes, which MLflow's addresses of models hold.",
        )
    for where, text in (
        ("run.name", settings.run.name),
        ("release.approved_by", settings.release.approved_by),
    ):
        if not text.strip() or re.search(r"[\x00-\x1f]", text):
            raise ConfigError(f"{where}: is empty, or holds a line break")


def stores_have_addresses(settings: Settings) -> None:
    feast = settings.feast
    if feast.online == "redis" and not all(HOST_PORT.fullmatch(p) for p in feast.online_url.split(",")[:1]):
        raise ConfigError(
            f"feast.online_url: {feast.online_url!r} is no address of a Redis", remedy="Like redis:6379."
        )
    for kind, where, text in (
        (feast.online, "feast.online_url", feast.online_url),
        (feast.offline, "feast.offline_path", feast.offline_path),
    ):
        if kind == "postgres" and not re.fullmatch(r"(?:[^\s@/:]+@)?[^\s@]+:\d{1,5}/[^\s/]+", text):
            raise ConfigError(
                f"{where}: {_without_password(text)!r} does not name a PostgreSQL database",
                remedy="Write [user@]host:port/database; the password comes from HLLM_FEAST_PASSWORD.",
            )
        if kind in ("sqlite", "file"):
            _place(where, text)
    if "://" in feast.registry and not feast.registry.startswith("s3://"):
        scheme = feast.registry.partition("://")[0]
        if not scheme.startswith(("postgresql", "sqlite", "mysql")):
            raise ConfigError(
                f"feast.registry: {scheme}:// is no registry known here",
                remedy="A file, s3://, or a SQL URL.",
            )
    else:
        _place("feast.registry", feast.registry)
    uri = settings.mlflow.tracking_uri
    if "://" in uri:
        parts = urlsplit(uri)
        if parts.scheme.partition("+")[0] not in (
            "http",
            "https",
            "sqlite",
            "postgresql",
            "mysql",
            "mssql",
            "file",
        ):
            raise ConfigError(f"mlflow.tracking_uri: {parts.scheme}:// is no store of MLflow")
        if parts.scheme.startswith("http"):
            try:
                usable = bool(parts.hostname) and parts.port != 0
            except ValueError:
                usable = False
            if not usable:
                raise ConfigError(
                    f"mlflow.tracking_uri: {_without_password(uri)!r} is no address of a server"
                )
    elif not uri.strip():
        raise ConfigError("mlflow.tracking_uri: is empty")


def columns_are_different(settings: Settings) -> None:
    columns = settings.data.columns
    if settings.data.source != "table":
        return
    for name in ("user_id", "item_id"):
        if not getattr(columns, name).strip():
            raise ConfigError(f"data.columns.{name}: names no column")
    named = [columns.user_id, columns.item_id, columns.timestamp, columns.label, columns.event]
    given = [name for name in named if name]
    if len(set(given)) < len(given):
        raise ConfigError("data.columns: one column of the log is named for two things", examples=given)
    if len(set(columns.texts)) < len(columns.texts) or columns.item_id in columns.texts:
        raise ConfigError("data.columns.texts: a column is there twice, or is the item's id")


def runner_steps_are_steps(settings: Settings) -> None:
    known = [*TASKS]
    for name, family in _families().items():
        stages = range(1, 1 + len(family.stages))
        known += [*(f"train-{name}-{stage}" for stage in stages)]
        known += [f"embed-{name}-1", f"embed-{name}-3"] if family.stages else []
    for name, pod in settings.runner.steps.items():
        if name not in known:
            raise ConfigError(
                f"runner.steps.{name} is not a step" + _near(name, known, "runner.steps."),
                remedy=f"Known here: {', '.join(known)}.",
            )
        if pod.nodes > 1 and not name.startswith(("train-", "embed-", "evaluate")):
            raise ConfigError(
                f"runner.steps.{name}.nodes is {pod.nodes}, but only one pod can do that step",
                remedy="train, embed and evaluate can be shared between pods.",
            )


def processes_fit_the_machine(settings: Settings) -> None:
    most = PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if settings.run.processes > most:
        raise ConfigError(
            f"run.processes: {settings.run.processes} on a machine of {os.cpu_count()} cores",
            remedy=f"At most {most} here; 0 means one for each GPU, or one.",
        )


RULES: tuple[Callable[[Settings], None], ...] = (
    families_are_known,
    cutoffs_are_cutoffs,
    gate_asks_for_what_is_measured,
    split_has_its_days,
    widths_divide_by_heads,
    names_are_names,
    stores_have_addresses,
    columns_are_different,
    runner_steps_are_steps,
    processes_fit_the_machine,
)


def _families() -> Mapping[str, Any]:
    found: Mapping[str, Any] = importlib.import_module("hllm.models.family").families()
    return found


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f". Did you mean {prefix}{found[0]}?" if found else ""


def _without_password(text: str) -> str:
    return re.sub(r":[^@/]*@", ":***@", text)


def _day(name: str, text: str) -> date:
    try:
        return datetime.fromisoformat(text).date()
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is no day", remedy="Like 2024-03-31.") from None


def _place(name: str, text: str) -> None:
    try:
        folder(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}", remedy=f"It is {text!r}.") from None
