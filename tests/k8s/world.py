"""The overlays as `kubectl kustomize` renders them, and the pods that Airflow makes with them."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hllm.pipeline import steps
from hllm.settings import Settings, load

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


@cache
def services() -> tuple[Manifest, ...]:
    return tuple(render(K8S / "services"))


def of_kind(kind: str, manifests: tuple[Manifest, ...]) -> dict[str, Manifest]:
    """By name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def named(manifest: Manifest) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


def settings_of(name: str) -> Settings:
    return load(K8S / "overlays" / name / "hllm.toml", environ={})


def templates(name: str) -> dict[str, Manifest]:
    """By the path at which Airflow finds them."""
    files = of_kind("ConfigMap", overlay(name))["hllm-pods"]["data"]
    return {f"/etc/hllm-pods/{file}": yaml.safe_load(text) for file, text in files.items()}


def pods(name: str) -> dict[str, Manifest]:
    """The pod of every step: its template, and over it what the settings say, as the operator merges them."""
    from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
    from kubernetes.client import ApiClient
    from wiring.pod import manifest

    settings, found = settings_of(name), {}
    for step in [*steps(settings), "register", "publish", "verify", "promote", "reject"]:
        asked = settings.runner.pod_of(step)
        template = PodGenerator.deserialize_model_dict(templates(name)[asked.template])
        own = PodGenerator.deserialize_model_dict(manifest(step, [step], asked))
        pod = ApiClient().sanitize_for_serialization(PodGenerator.reconcile_pods(template, own))
        found[step] = {"apiVersion": "v1", "kind": "Pod", **pod}
    return found


def locked_down(spec: dict[str, Any], account: str) -> None:
    """Of every pod: what the profile `restricted` asks for, and no token."""
    (container,) = spec["containers"]
    assert spec["serviceAccountName"] == spec["priorityClassName"] == account
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not any("hostPath" in volume for volume in spec.get("volumes", ()))
