"""What a platform engineer sees of things that go wrong: one clear line in the task, nothing left behind."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hllm.pipeline import keys
from hllm.settings import Settings, load
from hllm.work.artifacts import Manifest, Store, file_digests
from hllm.work.objects import list_objects
from tests.cluster.conftest import Platform
from tests.cluster.faults import FAULTS
from tests.cluster.world import Run, wait_until
from tests.world import run_steps

pytestmark = pytest.mark.cluster

KILL = """
import os, signal
for process in os.listdir("/proc"):
    if process.isdigit() and int(process) not in (1, os.getpid()):
        os.kill(int(process), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def faults(platform: Platform, prepared: None) -> dict[str, Run]:
    """Those that need nobody to bring them about, all at once."""
    return {
        name: platform.start(f"fault_{name}", fault["step"])
        for name, fault in FAULTS.items()
        if name == "disk" or (fault["step"] == "ingest" and name != "rights")
    }


def settings_of(platform: Platform, name: str) -> Settings:
    """What the fault's command runs with."""
    return load(platform.folder / "hllm.toml", environ=FAULTS[name]["environment"])


def training(platform: Platform, run: Run) -> str:
    """The pod of a training that has begun: its first checkpoint is in S3."""
    settings = settings_of(platform, run.dag.removeprefix("fault_"))
    work = Store(settings.run.root, cache=platform.folder / "cache").work_location(
        run.task, keys(settings)[run.task]
    )
    wait_until("a checkpoint in S3", lambda: list_objects(f"{work}/"))
    return str(wait_until("its pod", lambda: platform.place.running(run.dag, run.task)))


def ended(platform: Platform, run: Run) -> str:
    """The one line that the task leaves."""
    run.wait("failed", "success")
    line = str(platform.api.ended(run.dag, run.run, run.task)["line"])
    assert "\n" not in line
    return line


def test_a_training_that_is_killed_continues_with_the_same_result(
    platform: Platform, prepared: None, tmp_path: Path
) -> None:
    run, place = platform.start("fault_killed", "train-hllm-1"), platform.place
    pod = training(platform, run)
    place.kubectl("exec", pod, "--", "python3", "-c", KILL)
    run.wait("success")
    assert len(place.pods(run.dag, run.task)) == 2
    said = run.every_log()
    assert "ended with 137" in said
    assert "continues from step" in said
    settings = settings_of(platform, "killed")
    key, there = keys(settings), platform.store
    found = there.manifest(run.task, key[run.task])
    assert isinstance(found, Manifest)
    alone = settings.model_copy(update={"run": settings.run.model_copy(update={"root": str(tmp_path)})})
    inputs = there.fetch("prepare", key["prepare"])
    shutil.copytree(inputs, Store(str(tmp_path)).folder("prepare", key["prepare"]))
    assert file_digests(run_steps(alone, run.task)) == found.files


def test_a_pod_that_somebody_deletes_is_made_again(platform: Platform, prepared: None) -> None:
    run, place = platform.start("fault_deleted", "train-hllm-1"), platform.place
    place.kubectl("delete", "pod", training(platform, run), "--force", "--grace-period=0")
    run.wait("success")
    assert len(place.pods(run.dag, run.task)) == 2
    assert "is gone: somebody deleted it, or its node was lost" in run.every_log()


def test_of_a_task_that_a_person_marks_as_failed_no_pod_is_left(platform: Platform, prepared: None) -> None:
    run = platform.start("fault_failed", "train-hllm-1")
    pod = training(platform, run)
    run.fail()
    run.wait("failed")
    wait_until("the pod to be gone", lambda: pod not in platform.place.living())
    assert len(platform.place.pods(run.dag, run.task)) == 1


def test_a_scheduler_that_starts_again_makes_no_second_pod(platform: Platform, prepared: None) -> None:
    run = platform.start("fault_restarted", "train-hllm-1")
    training(platform, run)
    platform.processes.kill("airflow-scheduler")
    platform.processes.start_again("airflow-scheduler")
    run.wait("success")
    assert len(platform.place.pods(run.dag, run.task)) == 1


def test_too_little_memory_is_called_that_with_what_was_asked(
    platform: Platform, faults: dict[str, Run]
) -> None:
    line = ended(platform, faults["memory"])
    assert line.startswith("OOMKilled: it needed more memory than the 48Mi it had asked for"), line
    assert "[runner.steps.ingest]" in line


def test_nine_gpus_on_a_node_with_eight_wait_then_end_clearly(
    platform: Platform, faults: dict[str, Run]
) -> None:
    run = faults["gpus"]
    line = ended(platform, run)
    assert "got no node within 0.01 h (runner.queue_hours), and was deleted: " in line
    assert "Insufficient nvidia.com/gpu" in line
    assert "FailedScheduling" in run.log(), "while it waits, its log says for what"
    (pod,) = platform.place.pods(run.dag, run.task)
    assert pod["metadata"]["name"] not in platform.place.living()


def test_an_image_that_cannot_be_pulled_is_named_within_a_minute(
    platform: Platform, faults: dict[str, Run]
) -> None:
    line = ended(platform, faults["image"])
    assert re.search("could not start or finish: (ErrImagePull|ImagePullBackOff): ", line), line
    assert "localhost/no-such-image:1" in line


def test_a_queue_that_does_not_exist_is_named_before_there_is_a_pod(
    platform: Platform, faults: dict[str, Run]
) -> None:
    run = faults["queue"]
    assert run.wait("failed")
    assert "no LocalQueue no-such-queue in namespace" in run.log()
    assert platform.place.pods(run.dag, run.task) == []


def test_a_bucket_that_does_not_exist_is_named(platform: Platform, faults: dict[str, Run]) -> None:
    assert "the bucket no-such-bucket does not exist" in ended(platform, faults["bucket"])


def test_wrong_credentials_are_called_that(platform: Platform, faults: dict[str, Run]) -> None:
    assert "access denied" in ended(platform, faults["credentials"])


def test_a_certificate_for_another_name_is_called_that(platform: Platform, faults: dict[str, Run]) -> None:
    line = ended(platform, faults["certificate"])
    assert "the certificate is not accepted: " in line
    assert "storage.example" in line


def test_a_step_that_fills_its_disk_says_how_much_it_may_have(
    platform: Platform, faults: dict[str, Run]
) -> None:
    line = ended(platform, faults["disk"])
    assert "Evicted: " in line
    assert "1Mi" in line


@pytest.fixture
def without_rights(platform: Platform) -> Iterator[None]:
    place = platform.place
    binding = yaml.safe_load(place.kubectl("get", "rolebinding", "hllm-airflow", "-o", "yaml"))
    place.kubectl("delete", "rolebinding", "hllm-airflow")
    yield
    for name in ("resourceVersion", "uid", "creationTimestamp", "managedFields"):
        binding["metadata"].pop(name, None)
    place.apply(binding)
    time.sleep(1)


def test_an_airflow_without_rights_says_which_it_lacks(platform: Platform, without_rights: None) -> None:
    line = ended(platform, platform.start("fault_rights", "ingest"))
    assert "Kubernetes answered 403: pods is forbidden: User" in line
    assert 'hllm-airflow" cannot' in line
