"""The values for the charts of others. The charts cannot be had here: what is checked is our side of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.world import K8S, OVERLAYS, of_kind, overlay, settings_of

CHARTS = {
    path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted((K8S / "charts").glob("*.yaml"))
}


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{path}.{name}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, tree


def test_there_are_values_for_every_service():
    assert set(CHARTS) == {"airflow", "mlflow"}


@pytest.mark.parametrize("chart", CHARTS)
def test_secrets_are_named_not_written(chart: str):
    for path, _ in leaves(CHARTS[chart]):
        assert not re.search(r"\.(password|pass|secretKey|fernetKey|awsSecretAccessKey)$", path), path


@pytest.mark.parametrize("chart", CHARTS)
def test_every_service_account_is_one_of_ours_and_exists(chart: str):
    accounts = of_kind("ServiceAccount", overlay("production"))
    found = dict(leaves(CHARTS[chart]))
    named = {path: value for path, value in found.items() if path.endswith("serviceAccount.name")}
    assert named
    for path, name in named.items():
        assert name in accounts
        assert found[path.removesuffix("name") + "create"] is False


def test_only_what_starts_pods_has_the_account_that_may():
    values = CHARTS["airflow"]
    accounts = {
        part: values[part]["serviceAccount"]["name"]
        for part in values
        if isinstance(values[part], dict) and "serviceAccount" in values[part]
    }
    may = {"scheduler", "triggerer"}
    assert accounts == dict.fromkeys(may, "hllm-airflow") | dict.fromkeys(set(accounts) - may, "hllm-service")
    assert values["rbac"] == {"create": False}


@pytest.mark.parametrize("chart", CHARTS)
def test_no_container_runs_as_root_or_writes_to_its_root(chart: str):
    found = dict(leaves(CHARTS[chart]))
    assert any(path.endswith("readOnlyRootFilesystem") and value is True for path, value in found.items())
    assert any(path.endswith("runAsNonRoot") and value is True for path, value in found.items())
    assert any(
        path.endswith("seccompProfile.type") and value == "RuntimeDefault" for path, value in found.items()
    )
    assert any(path.endswith("capabilities.drop.0") and value == "ALL" for path, value in found.items())
    assert not any(path.endswith("allowPrivilegeEscalation") and value for path, value in found.items())


@pytest.mark.parametrize("chart", CHARTS)
def test_every_service_says_what_it_takes(chart: str):
    found = dict(leaves(CHARTS[chart]))
    asked = {path: value for path, value in found.items() if path.endswith("requests.memory")}
    assert asked
    for path, value in asked.items():
        assert found[path.replace("requests", "limits")] == value


def test_every_service_comes_before_steps():
    """Where the chart has a key for it: in each of Airflow's parts that we size, and of the one of MLflow."""
    airflow = [part for part in CHARTS["airflow"].values() if isinstance(part, dict) and "resources" in part]
    assert len(airflow) == 5
    for part in [*airflow, CHARTS["mlflow"]]:
        assert part["priorityClassName"] == "hllm-service"


@pytest.mark.parametrize("name", OVERLAYS)
def test_mlflow_listens_where_the_settings_look_for_it(name: str):
    port = CHARTS["mlflow"]["service"]["port"]  # the chart's own is 80
    assert settings_of(name).mlflow.tracking_uri == f"http://mlflow:{port}"
    allowed = CHARTS["mlflow"]["extraEnvVars"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert f"mlflow:{port}" in allowed.split(",")
    (rule,) = of_kind("NetworkPolicy", overlay(name))["mlflow"]["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": CHARTS["mlflow"]["service"]["containerPort"]}]


def test_the_version_of_mlflow_that_serves_also_migrates_the_database():
    values = CHARTS["mlflow"]
    assert values["backendStore"]["databaseMigration"] is True
    assert values["initImages"]["mlflowDbMigration"] == values["image"]


def test_no_volume_is_one_that_the_mlflow_chart_has_already():
    values = CHARTS["mlflow"]
    assert {volume["name"] for volume in values["extraVolumes"]} & {"tmp", "migrations-config"} == set()
    mounts = Counter(mount["mountPath"] for mount in values["extraVolumeMounts"])
    assert mounts == {"/work": 1}


def test_airflow_finds_the_settings_and_the_templates_of_pods():
    values = CHARTS["airflow"]
    mounted = {mount["mountPath"]: mount["name"] for mount in values["volumeMounts"]}
    configs = {
        volume["name"]: volume["configMap"]["name"] for volume in values["volumes"] if "configMap" in volume
    }
    assert configs[mounted["/etc/hllm"]] == "hllm-settings"
    assert configs[mounted["/etc/hllm-pods"]] == "hllm-pods"
    assert {"name": "HLLM_CONFIG", "value": "/etc/hllm/hllm.toml"} in values["env"]
    assert set(configs.values()) <= set(of_kind("ConfigMap", overlay("production")))


def test_the_readme_says_how_to_make_every_secret():
    readme = (K8S / "README.md").read_text("utf-8")
    named = {
        value
        for values in CHARTS.values()
        for path, value in leaves(values)
        if re.search("[sS]ecret", path) and str(value).startswith("hllm-")
    }
    assert len(named) > 5
    for name in named | {"hllm-s3", "hllm-feast"}:
        assert re.search(rf"create secret generic {name}\s", readme), name
