"""The trigger form, from the schema of the settings; and its answers, as environment variables.

An answer never becomes part of a command line: it travels as `HLLM__SECTION__KEY`, which `hllm` checks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airflow.sdk import Param

from hllm.models.family import untrained
from hllm.pipeline import trained_models
from hllm.settings import ENV_PREFIX, Settings, load

ROOT = Path(__file__).resolve().parents[2]
"""The repository: settings name folders relative to it, so commands run in it."""

TRAINING = ("epochs", "steps", "batch_size", "lr")


def config_path() -> str:
    """The settings file that shapes the DAGs: HLLM_CONFIG of the DAG processor, else the demo's."""
    return os.environ.get("HLLM_CONFIG") or "configs/demo.toml"


def settings() -> Settings:
    """Cheap enough for parsing: one small TOML file, no data and no model library."""
    return load(ROOT / config_path())


def offered(current: Settings) -> dict[str, tuple[str, ...]]:
    """Section of the form -> settings a person changes for one run. All others stay in the settings file."""
    trained = trained_models(current)
    compared = dict.fromkeys(each.family.name for each in trained if each.family.name != current.model.family)
    names = (*(each.name for each in untrained()), *compared)
    return {
        "Run": ("run.seed",),
        **{
            each.title: tuple(f"{each.family.name}.stage{each.stage}.{name}" for name in TRAINING)
            for each in trained
        },
        "Gate": (*(f"gate.min_vs.{name}" for name in names), "gate.min_vs_champion"),
    }


def params(current: Settings) -> dict[str, Param]:
    """One field per offered setting. Empty means: as the settings file says."""
    found = {"config": config_param()}
    for section, names in offered(current).items():
        for dotted in names:
            field = _schema_of(dotted)
            about = field.pop("description", "").replace("`", "")
            found[dotted] = Param(
                None,
                section=section,
                title=dotted,
                description=f"{about} Empty: as the settings say ({_value(current, dotted)} in "
                f"{config_path()}).",
                **field,
            )
    return found


def _value(current: Settings, dotted: str) -> Any:
    """A family that `gate.min_vs` does not name is compared without a threshold."""
    section, _, name = dotted.rpartition(".")
    return current.gate.min_vs.get(name, 0.0) if section == "gate.min_vs" else current.at(dotted)


def config_param() -> Param:
    """The settings file, as a field of the form."""
    return Param(
        config_path(),
        type="string",
        minLength=1,
        title="Settings file",
        description="Path of the TOML file, from the repository's folder or absolute. "
        "It must have the steps drawn here.",
    )


def environment(answers: Mapping[str, Any]) -> dict[str, str]:
    """The form's answers as the environment of a command."""
    found = {"HLLM_CONFIG": str(ROOT / answers["config"])}
    for names in offered(settings()).values():
        for dotted in names:
            if answers.get(dotted) is not None:
                found[ENV_PREFIX + dotted.upper().replace(".", "__")] = json.dumps(
                    answers[dotted], ensure_ascii=False
                )
    return found


def _schema_of(dotted: str) -> dict[str, Any]:
    """The JSON schema of one setting, with null allowed."""
    schema = Settings.model_json_schema()
    node: dict[str, Any] = schema
    for part in dotted.split("."):
        about = node.get("description", "")
        node = node["properties"][part] if "properties" in node else {**node["additionalProperties"]}
        node.setdefault("description", about)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    kept = {key: value for key, value in node.items() if key not in ("default", "title")}
    return {**kept, "type": ["null", kept["type"]]}
