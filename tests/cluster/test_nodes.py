"""One step in two pods that meet each other: what Airflow makes of a JobSet."""

from __future__ import annotations

import json

import pytest

from hllm.steps import keys
from tests.cluster.conftest import Platform
from tests.cluster.jobsets import controlled
from tests.cluster.test_faults import settings_of
from tests.cluster.world import wait_until

pytestmark = pytest.mark.cluster


def test_two_pods_train_one_model(platform: Platform, prepared: None) -> None:
    place = platform.place
    with controlled(place):
        run = platform.start("fault_nodes", "train-hllm-1")
        run.wait("success")
        pods = place.pods(run.dag, run.task)
        assert len(pods) == 2
        addresses = {pod["status"]["podIP"] for pod in pods}
        assert len(addresses) == 2
        made = keys(settings_of(platform, "nodes"))[run.task]
        found = platform.store.manifest(run.task, made)
        assert found
        assert found.facts["processes"] == 2
        names = {pod["metadata"]["name"] for pod in pods}
        wait_until("both pods to be gone", lambda: not names & set(place.living()))
        assert json.loads(place.kubectl("get", "jobsets", "-o", "json"))["items"] == []
