"""A real API server's opinion: `KUBECONFIG=... pytest -m cluster tests/k8s`. It has its own namespace."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.jobsets import defined
from tests.k8s.world import K8S, KUBECTL, OVERLAYS, Manifest, kubectl, pods, render

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="KUBECONFIG names no cluster"),
]


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Manifest]]:
    """One overlay and the services, moved into a namespace that exists for this test only."""
    folders = (K8S / "overlays" / request.param, K8S / "services")
    resources = [os.path.relpath(folder, tmp_path) for folder in folders]
    moved = {"namespace": f"hllm-test-{uuid.uuid4().hex[:8]}", "resources": resources}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(moved))
    rendered = render(tmp_path)
    (namespace,) = [each for each in rendered if each["kind"] == "Namespace"]
    assert namespace["metadata"]["name"] == moved["namespace"]
    kubectl("create", "-f", "-", stdin=yaml.safe_dump(namespace))
    try:
        yield rendered
    finally:
        kubectl("delete", "namespace", str(moved["namespace"]), "--wait=false")


def test_the_server_accepts_every_manifest(manifests: list[Manifest]):
    said = kubectl(
        "apply", "--server-side", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(manifests)
    )
    assert said.count("serverside-applied (server dry run)") == len(manifests)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_accepts_the_pods_of_steps(name: str):
    """Without their account and priority: a dry run leaves none behind for a pod to name."""
    for pod in pods(name).values():
        del pod["spec"]["priorityClassName"], pod["spec"]["serviceAccountName"]
        said = kubectl(
            "create", "--dry-run=server", "--namespace", "default", "-f", "-", stdin=yaml.safe_dump(pod)
        )
        assert "created (server dry run)" in said


def test_airflow_may_run_pods_and_nothing_more(manifests: list[Manifest]):
    defined()  # or the server does not know what the right is for
    access = [each for each in manifests if each["kind"] in {"ServiceAccount", "Role", "RoleBinding"}]
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump_all(access))
    namespace = access[0]["metadata"]["namespace"]

    def may(account: str, verb: str, what: str) -> bool:
        resource, _, part = what.partition("/")  # kubectl would take the part for a pod's name
        asked = ["auth", "can-i", verb, resource, f"--subresource={part}", "--namespace", namespace]
        asked.append(f"--as=system:serviceaccount:{namespace}:{account}")
        return subprocess.run([KUBECTL, *asked], capture_output=True, text=True).stdout.strip() == "yes"

    granted = ["create jobsets.jobset.x-k8s.io", "delete jobsets.jobset.x-k8s.io"]
    granted += ["get jobsets.jobset.x-k8s.io"]
    granted += ["create pods", "delete pods", "get pods", "list pods", "patch pods", "get pods/log"]
    for each in [*granted, "list events", "watch events"]:
        assert may("hllm-airflow", *each.split()), each
    for each in [
        "create pods/exec",
        "get pods/exec",
        "watch pods",
        "get secrets",
        "create jobs",
        "update pods",
    ]:
        assert not may("hllm-airflow", *each.split()), each
    assert not may("hllm-step", "get", "pods")
    assert not may("hllm-service", "get", "pods")
