"""Settings from where people write them: a TOML file, the environment, `--set`. Unknown keys are errors."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hllm.errors import ConfigError
from hllm.settings.keys import describe, nearest, renamed, section_type
from hllm.settings.rules import check
from hllm.settings.section import Section
from hllm.settings.tree import Settings

ENV_PREFIX = "HLLM__"


def load(
    path: str | Path | None, overrides: Iterable[str] = (), environ: Mapping[str, str] = os.environ
) -> Settings:
    """Settings from a TOML file, the environment and `a.b=c` overrides.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (with the nearest key), a value
            does not fit.
    """
    where = str(path) if path else "settings"
    tree = read_toml(Path(path)) if path else {}
    sources: dict[str, str] = {}  # dotted key -> where the user typed it
    typed: dict[str, str] = {}  # dotted key -> as it was typed there
    for key, value in environ.items():
        if key.startswith(ENV_PREFIX):
            dotted = key.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _put(tree, dotted, value, key)
            sources[dotted], typed[dotted] = key, value
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(
                "is not of the form section.key=value", where=f"--set {override}", remedy="Like run.seed=18."
            )
        dotted = dotted.strip()
        _put(tree, dotted, value, f"--set {override}")
        sources[dotted], typed[dotted] = f"--set {override}", value
    refuse_unknown(tree, Settings, "", where, sources)
    settings = _validated(tree, where, sources, typed)
    try:
        check(settings)
    except ConfigError as error:
        first, _, remedy = str(error).partition("\n")
        dotted = first.partition(":")[0]
        raise ConfigError(first, where=sources.get(dotted, where), remedy=remedy.strip()) from None
    return settings


def _validated(
    tree: dict[str, Any], where: str, sources: Mapping[str, str], typed: Mapping[str, str]
) -> Settings:
    try:
        return Settings.model_validate(merge(Settings().model_dump(), tree))
    except ValidationError as error:
        first = error.errors()[0]
        dotted = ".".join(str(part) for part in first["loc"])
        text = first["type"] == "string_type"
        if text and dotted in typed and not isinstance(first["input"], str):  # 5, where text is meant
            _place(tree, dotted, typed[dotted])
            return _validated(tree, where, sources, {k: v for k, v in typed.items() if k != dotted})
        advice = f"{dotted}: {describe(dotted)}" if describe(dotted) else ""
        raise ConfigError(
            f"{dotted}: {_said(first['msg'])}, got {_shown(first['input'])}",
            where=sources.get(dotted, where),
            remedy=("Write it in quotes. " if text else "") + advice,
        ) from None


def _said(message: str) -> str:
    """Pydantic's words, as a part of a sentence."""
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _place(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = value


def read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError("is not a file", where=path, remedy="Name a TOML file.")
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            "no such settings file", where=path, remedy=f"Looked in {path.resolve()}."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8", where=path, remedy="Save it as UTF-8.") from None
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid TOML: {error}", where=path) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from None


def merge(defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A partly written section keeps the section's own defaults (stage 1 and stage 2 differ)."""
    merged = dict(defaults)
    for key, value in given.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _put(tree: dict[str, Any], dotted: str, text: str, source: str) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{parent} is a value, not a section", where=source)
    try:
        read = tomllib.loads(f"value = {text}")
        tree[last] = read["value"] if len(read) == 1 else text
    except (tomllib.TOMLDecodeError, ValueError, RecursionError):
        tree[last] = text


def _leaves(value: Any, dotted: str) -> Iterator[str]:
    """The dotted names of the values in a section."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{dotted}.{name}")
    else:
        yield dotted


def refuse_unknown(
    tree: Mapping[str, Any], model: type[Section], prefix: str, where: str, sources: Mapping[str, str]
) -> None:
    for key, value in tree.items():
        dotted = prefix + key
        if key not in model.model_fields:
            typed = next((source for path, source in sources.items() if path.startswith(dotted)), where)
            given = next(_leaves(value, dotted), dotted)
            if now := renamed(given):
                raise ConfigError(f"{given} is called {' and '.join(now)} now", where=typed)
            near = nearest(dotted)
            raise ConfigError(
                f"{dotted} is not a setting." + (f" Did you mean {near}?" if near else ""),
                where=typed,
                remedy=f"Known here: {', '.join(prefix + name for name in model.model_fields)}.",
            )
        section = section_type(model, key)
        if section and not isinstance(value, Mapping):
            raise ConfigError(
                f"{dotted} is a section, not a value",
                where=sources.get(dotted, where),
                remedy=f"In it: {', '.join(section.model_fields)}.",
            )
        if section and isinstance(value, Mapping):
            refuse_unknown(value, section, dotted + ".", where, sources)
