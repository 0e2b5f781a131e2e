"""Settings by their dotted names: what one means, which sections there are, which one was probably meant."""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Iterable

from hllm.settings.section import Section
from hllm.settings.tree import Settings


def describe(dotted: str) -> str:
    """The docstring of one setting."""
    section, _, name = dotted.rpartition(".")
    model = section_at(section)
    field = model.model_fields.get(name) if model else None
    return " ".join((field.description or "").split()) if field else ""


def nearest(dotted: str) -> str:
    """The setting that was probably meant. Its own name decides, then whether it is in or below the section
    that was typed (`train.batchsize` is `hllm.stage1.batch_size`)."""
    section, _, typed = dotted.rpartition(".")

    def likeness(key: str) -> float:
        parent, _, name = key.rpartition(".")
        nearby = (section == parent) + (f"{parent}.".startswith(f"{section}."))
        alike = difflib.SequenceMatcher(None, typed, name).ratio()
        return alike + 0.1 * nearby if alike >= 0.6 else 0.0

    best = max(all_keys(Settings), key=likeness)
    return best if likeness(best) else ""


def renamed(dotted: str) -> list[str]:
    """What a setting of an earlier release is called now; none for others."""
    gate, _, family = dotted.partition("gate.min_vs_")
    if not gate and family:
        return [f"gate.min_vs.{family}"]
    known = importlib.import_module("hllm.models.family").renamed()
    for old, new in known.items():
        if dotted == old or dotted.startswith(f"{old}."):
            return [name + dotted.removeprefix(old) for name in new]
    return []


def section_type(model: type[Section], name: str) -> type[Section] | None:
    annotation = typing.get_type_hints(model)[name]
    if isinstance(annotation, types.GenericAlias):
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def section_at(dotted: str) -> type[Section] | None:
    model: type[Section] | None = Settings
    for part in filter(None, dotted.split(".")):
        model = section_type(model, part) if model and part in model.model_fields else None
    return model


def all_keys(model: type[Section], prefix: str = "") -> Iterable[str]:
    for name in model.model_fields:
        yield prefix + name
        section = section_type(model, name)
        if section:
            yield from all_keys(section, prefix + name + ".")
