"""The pods of steps in each overlay: what the cluster adds, and over it what the settings ask for."""

from __future__ import annotations

import kubernetes_validate
import pytest

from hllm.pipeline import steps
from tests.k8s.world import OVERLAYS, Manifest, locked_down, pods, settings_of, templates

SCHEMA = "1.37"


@pytest.fixture(scope="module")
def every_pod() -> dict[str, Manifest]:
    return {f"{name} {step}": pod for name in OVERLAYS for step, pod in pods(name).items()}


def restricted(pod: Manifest) -> None:
    """What the Pod Security profile `restricted` asks for, and a little more."""
    spec = pod["spec"]
    locked_down(spec, "hllm-step")
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["containers"][0]["name"] == "base"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_template_is_a_pod_that_the_namespace_admits(name: str):
    for template in templates(name).values():
        kubernetes_validate.validate(template, SCHEMA, strict=True)
        restricted(template)


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_template_repeats_what_the_settings_say(name: str):
    """Lists of both are joined: a volume would be there twice, and the server refuses that."""
    for template in templates(name).values():
        assert "volumes" not in template["spec"]
        assert set(template["spec"]["containers"][0]) == {"name", "image", "securityContext"}


def test_every_pod_fits_the_schema_and_the_profile(every_pod: dict[str, Manifest]):
    for pod in every_pod.values():
        kubernetes_validate.validate(pod, SCHEMA, strict=True)
        restricted(pod)


def test_every_pod_is_known_to_the_network_policies_and_the_quota(every_pod: dict[str, Manifest]):
    for pod in every_pod.values():
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "hllm"
        resources = pod["spec"]["containers"][0]["resources"]
        for amounts in (resources["requests"], resources["limits"]):
            assert set(amounts) >= {"cpu", "memory"}, "the quota refuses a pod without them"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_named_step_is_in_the_plan(name: str):
    settings = settings_of(name)
    assert set(settings.runner.steps) <= set(steps(settings))


def test_local_pods_take_neither_gpus_nor_queues():
    for pod in pods("local").values():
        assert "nvidia.com/gpu" not in pod["spec"]["containers"][0]["resources"]["limits"]
        assert "kueue.x-k8s.io/queue-name" not in pod["metadata"]["labels"]
        assert "tolerations" not in pod["spec"]


def test_production_pods_wait_in_the_queue_and_may_run_on_spot_nodes():
    for pod in pods("production").values():
        assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "hllm"
        assert "hllm/spot" in {toleration["key"] for toleration in pod["spec"]["tolerations"]}


def test_production_gives_gpus_to_the_steps_that_use_them_and_to_no_other():
    with_gpus = {"train-hllm-1", "train-hllm-2", "embed-hllm-1", "embed-hllm-3"}
    for step, pod in pods("production").items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        tolerated = {toleration["key"] for toleration in spec["tolerations"]}
        required = spec["affinity"]["nodeAffinity"].get("requiredDuringSchedulingIgnoredDuringExecution")
        shared = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
        if step in with_gpus:
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
            assert "nvidia.com/gpu" in tolerated
            assert "nvidia.com/gpu.present" in str(required)
            assert [volume["medium"] for volume in shared] == ["Memory"]
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        else:
            assert "nvidia.com/gpu" not in container["resources"]["limits"]
            assert "nvidia.com/gpu" not in tolerated
            assert not required
