"""One step in two pods that meet each other: what Airflow makes of a JobSet."""

from __future__ import annotations

import json

import pytest

from hllm.pipeline import keys
from tests.cluster.conftest import Platform
from tests.cluster.jobsets import controlled
from tests.cluster.test_faults import KILL, settings_of, training
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


def test_a_set_that_loses_a_pod_is_made_again_and_continues(platform: Platform, prepared: None) -> None:
    place = platform.place
    with controlled(place):
        run = platform.start("fault_lost", "train-hllm-1")
        first = training(platform, run)
        second = f"{first[:-1]}1"
        place.kubectl("exec", second, "--", "python3", "-c", KILL)
        run.wait("success")
        said = run.every_log()
        assert "another process of this step is gone" in said
        assert "continues from step" in said
        assert len(place.pods(run.dag, run.task)) == 4
        made = keys(settings_of(platform, "lost"))[run.task]
        found = platform.store.manifest(run.task, made)
        assert found
        assert found.facts["processes"] == 2


def test_of_a_set_whose_task_a_person_marks_as_failed_nothing_is_left(
    platform: Platform, prepared: None
) -> None:
    place = platform.place
    with controlled(place):
        run = platform.start("fault_cancelled", "train-hllm-1")
        training(platform, run)
        run.fail()
        run.wait("failed")
        names = {pod["metadata"]["name"] for pod in place.pods(run.dag, run.task)}
        assert len(names) == 2
        wait_until("both pods to be gone", lambda: not names & set(place.living()))
        assert json.loads(place.kubectl("get", "jobsets", "-o", "json"))["items"] == []
