"""What the overlays render to: valid by the current schemas, and as closed as they claim to be."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml

from tests.k8s.world import OVERLAYS, Manifest, named, of_kind, overlay, services, settings_of

SCHEMA = "1.37"
EVERY = [
    pytest.param(manifest, id=f"{name}-{named(manifest)}")
    for name, manifests in ({name: overlay(name) for name in OVERLAYS} | {"services": services()}).items()
    for manifest in manifests
]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
LINK_LOCAL = {"169.254.20.10/32": {53}, "169.254.170.23/32": {80}}
"""NodeLocal DNSCache, EKS Pod Identity: one address and one port each."""


@pytest.mark.parametrize("manifest", EVERY)
def test_manifest_fits_the_current_schema(manifest: Manifest):
    kubernetes_validate.validate(manifest, SCHEMA, strict=True)


@pytest.mark.parametrize("manifest", EVERY)
def test_everything_is_in_one_namespace_and_labelled(manifest: Manifest):
    wanted = None if manifest["kind"] in CLUSTER_WIDE else "hllm"
    assert manifest["metadata"].get("namespace") == wanted
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
    events = {("", "events", "list"), ("", "events", "watch")}
    sets = {("jobset.x-k8s.io", "jobsets", verb) for verb in ("create", "delete", "get")}
    queues = {("kueue.x-k8s.io", "localqueues", "list")}
    assert granted == {*pods, *events, *sets, *queues, ("", "pods/log", "get")}
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
                if peer.get("ipBlock", {}).get("cidr") in LINK_LOCAL:
                    assert {port["port"] for port in rule["ports"]} == LINK_LOCAL[peer["ipBlock"]["cidr"]]
                elif "ipBlock" in peer:
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


def test_local_asks_for_no_gpu():
    assert "nvidia.com" not in yaml.safe_dump_all(overlay("local"))


def test_production_limits_gpus():
    hard = of_kind("ResourceQuota", overlay("production"))["hllm-gpus"]["spec"]["hard"]
    assert set(hard) == {"requests.nvidia.com/gpu"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_settings_in_the_cluster_load(name: str):
    settings = settings_of(name)
    assert settings.run.root.startswith("s3://")
    assert settings.mlflow.tracking_uri == "http://mlflow:5000"
    assert settings.runner.kind == "kubernetes"
    assert settings.runner.namespace == "hllm"
    config = of_kind("ConfigMap", overlay(name))["hllm-settings"]
    assert set(config["data"]) == {"hllm.toml"}
