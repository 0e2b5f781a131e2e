"""Steps of several pods, without a cluster: the JobSet they would make, and what becomes of its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubernetes import client as k8s
from kubernetes.client import ApiException
from wiring.nodes import FirstPodTrigger, NodesStep, SetTrigger
from wiring.pod import refuse_unknown_steps

from hllm.errors import ConfigError
from hllm.settings import Pod
from tests.dags.test_pod import cluster, context_of, pod_that, terminated

HERE = Path(__file__).resolve().parent
STEP = "train-hllm-1"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> NodesStep:
    monkeypatch.setenv("HLLM_CONFIG", str(HERE / "nodes.toml"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    bag = DagBag(dag_folder=HERE.parents[1] / "dags", collect_dags=True)
    assert not bag.import_errors
    found = bag.dags["hllm_train"].task_dict[STEP]
    assert isinstance(found, NodesStep)
    assert not isinstance(bag.dags["hllm_train"].task_dict["ingest"], NodesStep)
    return found


def started(step: NodesStep) -> tuple[dict[str, Any], FirstPodTrigger]:
    """The set that its task makes, and what it then waits with."""
    cluster(step)
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context_of(step))
    assert deferred.value.method_name == "first_pod_made"
    return step.hook.custom_object_client.create_namespaced_custom_object.call_args.args[
        -1
    ], deferred.value.trigger


def test_the_set_fits_the_published_schema(step: NodesStep) -> None:
    body, _ = started(step)
    found = JobsetV1alpha2JobSet.from_dict(body)
    assert found is not None
    known = found.to_dict()["spec"]
    for ours, theirs in ((body["spec"], known), (body["spec"]["network"], known["network"])):
        assert set(ours) <= set(theirs), "what the schema does not know is lost"
    (job,), (theirs,) = body["spec"]["replicatedJobs"], known["replicatedJobs"]
    assert set(job) <= set(theirs)
    assert set(job["template"]["spec"]) <= set(theirs["template"]["spec"])
    assert set(job["template"]["spec"]["template"]["spec"]) <= set(
        theirs["template"]["spec"]["template"]["spec"]
    )


def test_every_pod_is_the_steps_own_and_is_told_where_the_first_one_is(step: NodesStep) -> None:
    body, _ = started(step)
    (job,) = body["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    assert (spec["backoffLimit"], body["spec"]["failurePolicy"]) == (0, {"maxRestarts": 0})
    (container,) = spec["template"]["spec"]["containers"]
    assert container["args"] == ["hllm", "train", "--family", "hllm", "--stage", "1"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    told = {one["name"]: one.get("value") or one["valueFrom"] for one in container["env"]}
    name = body["metadata"]["name"]
    assert told["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    assert told["PET_NNODES"] == "2"
    # Not by another variable: the job's controller appends its own, and only earlier ones are expanded.
    assert told["PET_NODE_RANK"] == {
        "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    }
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "hllm"
    assert "kueue.x-k8s.io/queue-name" not in spec["template"]["metadata"]["labels"]


def test_a_scheduler_that_starts_again_finds_its_set(step: NodesStep) -> None:
    one, _ = started(step)
    again, _ = started(step)
    assert one["metadata"]["name"] == again["metadata"]["name"]
    step.hook.custom_object_client.create_namespaced_custom_object.side_effect = ApiException(409, "Conflict")
    with pytest.raises(TaskDeferred):
        step.execute(context_of(step))


def test_a_cluster_without_jobset_is_said_at_once(step: NodesStep) -> None:
    cluster(step)
    step.hook.custom_object_client.create_namespaced_custom_object.side_effect = ApiException(
        404, "Not Found"
    )
    with pytest.raises(AirflowFailException, match=r"no JobSet \(jobset.x-k8s.io/v1alpha2\)"):
        step.execute(context_of(step))


def test_the_trigger_comes_back_as_it_was(step: NodesStep) -> None:
    body, trigger = started(step)
    path, values = trigger.serialize()
    assert path == "wiring.nodes.FirstPodTrigger"
    assert FirstPodTrigger(**values).serialize() == (path, values)
    assert trigger.trigger_kwargs == {"jobset": body["metadata"]["name"]}


def test_a_set_that_is_not_admitted_is_deleted(step: NodesStep) -> None:
    cluster(step)
    event = {"jobset": "set", "status": "timeout", "name": "", "message": "was not admitted within 1 h"}
    with pytest.raises(
        AirflowFailException, match="JobSet hllm/set was not admitted within 1 h, and was deleted"
    ):
        step.first_pod_made(context_of(step), event)
    step.hook.custom_object_client.delete_namespaced_custom_object.assert_called_once()


def test_a_set_that_cannot_be_followed_is_deleted_and_tried_again(step: NodesStep) -> None:
    cluster(step)
    event = {"jobset": "set", "status": "error", "name": "", "message": "could not be followed: 503"}
    with pytest.raises(AirflowException, match="JobSet hllm/set could not be followed: 503") as raised:
        step.first_pod_made(context_of(step), event)
    assert not isinstance(raised.value, AirflowFailException)
    step.hook.custom_object_client.delete_namespaced_custom_object.assert_called_once()


def test_whoever_ends_the_task_while_its_pods_run_ends_the_set(step: NodesStep) -> None:
    pod = pod_that(k8s.V1ContainerState(running=k8s.V1ContainerStateRunning()), phase="Running")
    cluster(step, pod)
    event = {"jobset": "set", "status": "running", "name": "set-node-0-0", "namespace": "hllm"}
    with pytest.raises(TaskDeferred) as deferred:
        step.first_pod_made(context_of(step), event)
    path, values = deferred.value.trigger.serialize()
    assert path == "wiring.nodes.SetTrigger"
    trigger = SetTrigger(**values)
    assert (trigger.pod_name, trigger.trigger_kwargs["jobset"]) == (pod.metadata.name, "set")
    step.on_kill()
    step.hook.custom_object_client.delete_namespaced_custom_object.assert_called_once()


def ends(step: NodesStep, pod: k8s.V1Pod, status: str) -> None:
    event = {
        "jobset": "set",
        "status": status,
        "name": "set-node-0-0",
        "namespace": "hllm",
        "message": "ended",
    }
    step.trigger_reentry(context_of(step), event)


def test_the_set_goes_when_its_first_pod_has_ended(step: NodesStep) -> None:
    pod = pod_that(terminated(0, "train: done\n"), phase="Succeeded")
    cluster(step, pod)
    ends(step, pod, "success")
    step.hook.custom_object_client.delete_namespaced_custom_object.assert_called_once()


def test_another_pod_that_failed_is_named(step: NodesStep) -> None:
    pod = pod_that(terminated(75, "process 0 of 1: connection reset\n"), phase="Failed")
    other = pod_that(terminated(137, "", "OOMKilled"), phase="Failed")
    other.metadata.annotations = {"batch.kubernetes.io/job-completion-index": "1"}
    api = cluster(step, pod)
    api.list_namespaced_pod.return_value.items = [pod, other]
    with pytest.raises(AirflowException, match="node 1 ended with 137: OOMKilled") as raised:
        ends(step, pod, "failed")
    assert not isinstance(raised.value, AirflowFailException)
    step.hook.custom_object_client.delete_namespaced_custom_object.assert_called_once()


def test_only_steps_that_can_be_shared_may_have_several_pods() -> None:
    with pytest.raises(ConfigError, match=r"runner\.steps\.ingest\.nodes"):
        refuse_unknown_steps({"ingest": Pod(nodes=2)})
    refuse_unknown_steps({"train-hllm-1": Pod(nodes=2)})


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between questions to a Kubernetes that has all its answers."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
