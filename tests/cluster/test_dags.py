"""Both DAGs, every step a pod: from a raw log in S3 to a champion that Redis serves."""

from __future__ import annotations

import time

import pytest

from hllm.pipeline import keys, steps
from hllm.registry import versions
from tests.cluster.conftest import Platform
from tests.cluster.world import Run, wait_until
from tests.features.world import online
from tests.services import PASSWORD

pytestmark = pytest.mark.cluster


def test_every_step_ran_in_one_pod_and_its_output_is_in_s3(platform: Platform, trained: Run) -> None:
    found = keys(platform.settings)
    for name in steps(platform.settings):
        assert platform.store.manifest(name, found[name]), name
        assert len(platform.place.pods("hllm_train", name)) == 1, name
    ended = {task["task_id"]: task["state"] for task in platform.api.tasks("hllm_train", trained.run)}
    assert set(ended.values()) == {"success"}
    assert not [name for name in platform.place.living() if "hllm" in name], "succeeded pods are deleted"


def test_what_a_person_approves_is_published_and_serves(
    platform: Platform, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published by pods: Feast's registry in PostgreSQL, vectors in Redis and S3, the alias in MLflow."""
    api = platform.api
    (release,) = wait_until("a release", lambda: api.runs_started_by("hllm_release", trained.run))
    approval = Run(api, "hllm_release", release, "approve")
    approval.wait("awaiting_input")
    time.sleep(5)  # Airflow must have seen the end of the process that asked
    api.approve("hllm_release", release, "approve", "from the tests")
    Run(api, "hllm_release", release, "promote").wait("success")
    serving = versions.serving_version(platform.settings)
    assert serving is not None
    assert serving.verified
    assert (serving.tags["decided_by"], serving.tags["decision_note"]) == ("admin", "from the tests")
    assert float(serving.tags["cost"].split()[0]) > 0
    monkeypatch.setenv("HLLM_FEAST_PASSWORD", PASSWORD)
    read = online(platform.settings, serving.version, [("u3", "item7")])
    assert len(read["user_vector"][0]) == len(read["item_vector"][0]) == 32
