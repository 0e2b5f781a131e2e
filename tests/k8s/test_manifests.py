"""What the overlays render to: valid by the current schemas, and as closed as they claim to be."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml

from hllm.settings import load
from tests.k8s.world import K8S, OVERLAYS, Manifest, named, of_kind, overlay

SCHEMA = "1.37"
EVERY = [
    pytest.param(manifest, id=f"{name}-{named(manifest)}") for name in OVERLAYS for manifest in overlay(name)
]
STEPS = [
    pytest.param(manifest["template"], id=f"{name}-{named(manifest)}")
    for name in OVERLAYS
    for manifest in of_kind("PodTemplate", overlay(name)).values()
]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}


@pytest.mark.parametrize("manifest", EVERY)
def test_manifest_fits_the_current_schema(manifest: Manifest):
    kubernetes_validate.validate(manifest, SCHEMA, strict=True)


@pytest.mark.parametrize("manifest", EVERY)
def test_everything_is_in_one_namespace_and_labelled(manifest: Manifest):
    wanted = None if manifest["kind"] in CLUSTER_WIDE else "hllm"
    assert manifest["metadata"].get("namespace") == wanted
    if manifest["kind"] != "ConfigMap":
        assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "hllm"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_overlays_hold_no_secret(name: str):
    assert not of_kind("Secret", overlay(name))


@pytest.mark.parametrize("name", OVERLAYS)
def test_namespace_enforces_the_restricted_profile(name: str):
    (namespace,) = of_kind("Namespace", overlay(name)).values()
    for mode in ("enforce", "audit", "warn"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_airflow_gets_a_token(name: str):
    accounts = of_kind("ServiceAccount", overlay(name))
    assert {name: each["automountServiceAccountToken"] for name, each in accounts.items()} == {
        "default": False,
        "hllm-airflow": True,
        "hllm-service": False,
        "hllm-step": False,
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_airflow_may_do_what_the_pod_operator_needs_and_nothing_else(name: str):
    manifests = overlay(name)
    (role,) = of_kind("Role", manifests).values()
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    pods = {("", "pods", verb) for verb in ("create", "delete", "get", "list", "patch")}
    assert granted == {*pods, ("", "pods/log", "get"), ("", "events", "list"), ("", "events", "watch")}
    (binding,) = of_kind("RoleBinding", manifests).values()
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "hllm-airflow", "namespace": "hllm"}]
    assert not of_kind("ClusterRole", manifests)
    assert not of_kind("ClusterRoleBinding", manifests)


@pytest.mark.parametrize("name", OVERLAYS)
def test_traffic_is_denied_by_default(name: str):
    policies = of_kind("NetworkPolicy", overlay(name))
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_allowance_names_a_port_and_a_peer(name: str):
    for policy, manifest in of_kind("NetworkPolicy", overlay(name)).items():
        spec = manifest["spec"]
        assert set(spec["policyTypes"]) >= {each.title() for each in ("ingress", "egress") if each in spec}
        for rule, peers in [(rule, "to") for rule in spec.get("egress", ())] + [
            (rule, "from") for rule in spec.get("ingress", ())
        ]:
            assert rule["ports"], policy
            assert rule[peers], policy
            for peer in rule[peers]:
                assert peer, f"{policy} allows everybody"
                if "ipBlock" in peer:
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"], "the node's own credentials"


@pytest.mark.parametrize("name", OVERLAYS)
def test_nothing_may_talk_to_a_step(name: str):
    for manifest in of_kind("NetworkPolicy", overlay(name)).values():
        if manifest["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "hllm"}}:
            assert "ingress" not in manifest["spec"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_steps_wait_and_services_come_first(name: str):
    classes = of_kind("PriorityClass", overlay(name))
    assert classes["hllm-step"]["preemptionPolicy"] == "Never"
    assert classes["hllm-service"]["value"] > classes["hllm-step"]["value"]
    assert not any(each.get("globalDefault") for each in classes.values())


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_quota_counts_steps(name: str):
    quota = of_kind("ResourceQuota", overlay(name))["hllm-steps"]["spec"]
    assert quota["scopeSelector"]["matchExpressions"] == [
        {"scopeName": "PriorityClass", "operator": "In", "values": ["hllm-step"]}
    ]
    assert set(quota["hard"]) == {
        "pods",
        "requests.cpu",
        "requests.memory",
        "limits.cpu",
        "limits.memory",
    }


@pytest.mark.parametrize("template", STEPS)
def test_step_runs_with_nothing_it_does_not_need(template: Manifest):
    pod = template["spec"]
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "hllm"
    assert pod["serviceAccountName"] == "hllm-step"
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["priorityClassName"] == "hllm-step"
    assert pod["restartPolicy"] == "Never"
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("template", STEPS)
def test_step_holds_the_agreed_mounts_and_no_secret(template: Manifest):
    pod, (container,) = template["spec"], template["spec"]["containers"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert mounts["/etc/hllm"]["configMap"]["name"] == "hllm-settings"
    assert "sizeLimit" in mounts["/tmp"]["emptyDir"]
    assert "sizeLimit" in mounts["/work"]["emptyDir"]
    assert {each["secretRef"]["name"] for each in container["envFrom"]} == {"hllm-s3", "hllm-feast"}
    assert container["env"] == [{"name": "HLLM_CONFIG", "value": "/etc/hllm/hllm.toml"}]
    assert not any("hostPath" in each for each in pod["volumes"])


@pytest.mark.parametrize("template", STEPS)
def test_step_says_what_it_takes(template: Manifest):
    (container,) = template["spec"]["containers"]
    asked, most = container["resources"]["requests"], container["resources"]["limits"]
    assert set(asked) >= {"cpu", "memory"}
    assert asked["memory"] == most["memory"], "a step that passes its request is the first to be killed"
    assert asked.get("nvidia.com/gpu") == most.get("nvidia.com/gpu")


def test_local_asks_for_no_gpu():
    assert "nvidia.com" not in yaml.safe_dump_all(overlay("local"))
    assert list(of_kind("PodTemplate", overlay("local"))) == ["hllm-step"]


def test_production_has_gpus_queues_and_spot_nodes():
    templates = of_kind("PodTemplate", overlay("production"))
    assert set(templates) == {"hllm-step", "hllm-step-gpu"}
    for each in templates.values():
        assert each["template"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "hllm"
        assert "hllm/spot" in {toleration["key"] for toleration in each["template"]["spec"]["tolerations"]}
    plain, gpu = (templates[name]["template"]["spec"] for name in ("hllm-step", "hllm-step-gpu"))
    assert {each["key"] for each in gpu["tolerations"]} == {"nvidia.com/gpu", "hllm/spot"}
    assert "nvidia.com/gpu" not in plain["containers"][0]["resources"]["limits"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert gpu["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (shared,) = [each for each in gpu["volumes"] if each["name"] == "shm"]
    assert shared["emptyDir"]["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in gpu["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_settings_load(name: str):
    settings = load(K8S / "overlays" / name / "hllm.toml", environ={})
    assert settings.run.root.startswith("s3://")
    assert settings.mlflow.tracking_uri == "http://mlflow:5000"
    (config,) = of_kind("ConfigMap", overlay(name)).values()
    assert config["metadata"]["name"] == "hllm-settings"
    assert set(config["data"]) == {"hllm.toml"}
