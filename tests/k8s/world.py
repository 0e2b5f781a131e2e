"""The overlays as `kubectl kustomize` renders them, and a few ways to look into them."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = ("local", "production")
KUBECTL = str(Path(sys.executable).with_name("kubectl"))

Manifest = dict[str, Any]


def kubectl(*args: str, stdin: str = "") -> str:
    """What kubectl prints; its own words where it fails."""
    ended = subprocess.run([KUBECTL, *args], input=stdin, capture_output=True, text=True)
    assert ended.returncode == 0, f"kubectl {' '.join(args)}: {ended.stderr}"
    return ended.stdout


def render(folder: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(kubectl("kustomize", str(folder))))


@cache
def overlay(name: str) -> tuple[Manifest, ...]:
    return tuple(render(K8S / "overlays" / name))


def of_kind(kind: str, manifests: tuple[Manifest, ...]) -> dict[str, Manifest]:
    """By name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def named(manifest: Manifest) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"
