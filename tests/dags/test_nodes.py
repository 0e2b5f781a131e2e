"""Steps of several pods, without a cluster: the JobSet they would make, and what becomes of its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubernetes import client as k8s
from kubernetes.client import ApiException
from urllib3.exceptions import MaxRetryError
from wiring.nodes import NodesStep
from wiring.trigger import SetTrigger

from hllm.errors import ConfigError
from hllm.settings import load
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


def started(step: NodesStep) -> tuple[dict[str, Any], SetTrigger]:
    """The set that its task makes, and what it then waits with."""
    cluster(step)
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context_of(step))
    assert deferred.value.method_name == "trigger_reentry"
    trigger = deferred.value.trigger
    assert isinstance(trigger, SetTrigger)
    return made(step), trigger


def made(step: NodesStep) -> dict[str, Any]:
    body: dict[str, Any] = step.hook.custom_object_client.create_namespaced_custom_object.call_args.args[-1]
    return body


def deleted(step: NodesStep) -> MagicMock:
    call: MagicMock = step.hook.custom_object_client.delete_namespaced_custom_object
    return call


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
    assert path == "wiring.trigger.SetTrigger"
    assert SetTrigger(**values).serialize() == (path, values)
    assert (trigger.trigger_kwargs, trigger.pod_name) == ({"jobset": body["metadata"]["name"]}, "")
    assert trigger.in_cluster
    assert (trigger.logging_interval, trigger.startup_timeout) == (15, 20 * 60), "it follows the pod, too"
    assert step.pod is None, "a pod without a name would be all pods"


def without_a_pod(step: NodesStep, status: str, message: str) -> None:
    event = {"jobset": "set", "status": status, "name": "", "namespace": "hllm", "message": message}
    step.trigger_reentry(context_of(step), event)


def test_a_set_that_is_not_admitted_is_deleted(step: NodesStep) -> None:
    cluster(step)
    with pytest.raises(
        AirflowFailException, match="JobSet hllm/set was not admitted within 1 h, and was deleted"
    ):
        without_a_pod(step, "timeout", "was not admitted within 1 h")
    deleted(step).assert_called_once()


def test_a_set_that_cannot_be_followed_is_deleted_and_tried_again(step: NodesStep) -> None:
    cluster(step)
    with pytest.raises(AirflowException, match="JobSet hllm/set could not be followed: 503") as raised:
        without_a_pod(step, "error", "could not be followed: 503")
    assert not isinstance(raised.value, AirflowFailException)
    deleted(step).assert_called_once()


def test_an_api_that_is_away_costs_the_try_and_says_so_and_the_set_was_asked_to_go(step: NodesStep) -> None:
    api, away = cluster(step), MaxRetryError(None, "/api", None)  # type: ignore[arg-type]
    api.list_namespaced_pod.side_effect = deleted(step).side_effect = away
    step.hook.get_pod.side_effect = away
    context = context_of(step)
    event = {"jobset": "set", "status": "error", "name": "", "namespace": "hllm", "message": "is away"}
    with pytest.raises(AirflowException, match="JobSet hllm/set is away"):
        step.trigger_reentry(context, event)
    assert context["ti"]["ended"]["exit_code"] == 75
    assert deleted(step).call_count > 1, "once more, should it come back"
    deleted(step).reset_mock()
    with pytest.raises(AirflowException, match="Kubernetes does not answer"):
        ends(step, "error")
    deleted(step).assert_called()


def test_the_next_try_takes_away_what_earlier_ones_left_before_it_begins(step: NodesStep) -> None:
    first, _ = started(step)
    api = cluster(step)
    pod = pod_that(k8s.V1ContainerState(running=k8s.V1ContainerStateRunning()), phase="Running")
    one, two = SimpleNamespace(items=[pod]), SimpleNamespace(items=[pod_that(terminated(143))])
    api.list_namespaced_pod.side_effect = [one, one, two]
    context = context_of(step)
    context["ti"].try_number = 3
    order = MagicMock()
    order.attach_mock(deleted(step), "delete")
    order.attach_mock(api.list_namespaced_pod, "list")
    order.attach_mock(step.hook.custom_object_client.create_namespaced_custom_object, "create")
    with pytest.raises(TaskDeferred):
        step.execute(context)
    assert [call[0] for call in order.mock_calls] == [*["delete"] * 2, *["list"] * 3, "create"]
    assert order.mock_calls[0].args[-1] == first["metadata"]["name"]
    names = {order.mock_calls[0].args[-1], order.mock_calls[1].args[-1], made(step)["metadata"]["name"]}
    assert len(names) == 3


def test_no_second_set_is_made_while_the_first_cannot_be_taken_away(step: NodesStep) -> None:
    cluster(step)
    deleted(step).side_effect = MaxRetryError(None, "/api", None)  # type: ignore[arg-type]
    context = context_of(step)
    context["ti"].try_number = 2
    with pytest.raises(AirflowException, match="Kubernetes does not answer"):
        step.execute(context)
    step.hook.custom_object_client.create_namespaced_custom_object.assert_not_called()


def test_whoever_ends_the_task_ends_the_set(step: NodesStep) -> None:
    started(step)
    step.on_kill()
    deleted(step).assert_called_once()
    step.hook.core_v1_client.delete_namespaced_pod.assert_not_called()


def ends(step: NodesStep, status: str) -> None:
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
    ends(step, "success")
    deleted(step).assert_called_once()


def test_another_pod_that_failed_is_named(step: NodesStep) -> None:
    pod = pod_that(terminated(75, "process 0 of 1: connection reset\n"), phase="Failed")
    set_of(step, pod, pod_that(terminated(137, "", "OOMKilled"), phase="Failed"))
    with pytest.raises(AirflowException, match="node 1 ended with 137: OOMKilled") as raised:
        ends(step, "failed")
    assert not isinstance(raised.value, AirflowFailException)
    deleted(step).assert_called_once()


def set_of(step: NodesStep, first: k8s.V1Pod | None, other: k8s.V1Pod) -> None:
    """A set of two: its first pod, gone or not, and the other."""
    other.metadata.annotations = {"batch.kubernetes.io/job-completion-index": "1"}
    if first:
        first.metadata.annotations = {"batch.kubernetes.io/job-completion-index": "0"}
    cluster(step, first).list_namespaced_pod.return_value.items = [*([first] if first else ()), other]


@pytest.mark.parametrize("name", ["set-node-0-0-abcde", ""])
def test_of_a_first_pod_that_was_taken_away_the_failed_other_says_why(step: NodesStep, name: str) -> None:
    """A job that fails takes its other pods away, the first one too, before anybody has looked."""
    set_of(step, None, pod_that(terminated(65, "process 0 of 4: items: 3 rows are wrong\n")))
    context = context_of(step)
    event = {"jobset": "set", "status": "error", "name": name, "namespace": "hllm", "message": "Not Found"}
    with pytest.raises(AirflowFailException) as raised:
        step.trigger_reentry(context, event)
    line = "node 1: process 0 of 4: items: 3 rows are wrong"
    assert str(raised.value).endswith(f"ended with 65: {line}")
    assert context["ti"]["ended"] == {"exit_code": 65, "line": line}
    deleted(step).assert_called_once()


@pytest.mark.parametrize(
    ("code", "line"), [(75, "process 0 of 4: another process of this step is gone: closed"), (143, "stopped")]
)
def test_a_first_pod_that_only_noticed_does_not_hide_the_reason(
    step: NodesStep, code: int, line: str
) -> None:
    pod = pod_that(terminated(code, f"{line}\n"))
    set_of(step, pod, pod_that(terminated(64, "hllm.stage1.lr is wrong\n")))
    with pytest.raises(AirflowFailException) as raised:
        ends(step, "failed")
    wanted = f"ended with 64: node 1: hllm.stage1.lr is wrong; node 0 ended with {code}: {line}"
    assert str(raised.value).endswith(wanted)


def test_a_first_pod_that_cannot_start_is_the_reason_that_the_others_waited_in_vain(step: NodesStep) -> None:
    why = k8s.V1ContainerStateWaiting(reason="ErrImagePull", message="hllm:nope: not found")
    pod = pod_that(k8s.V1ContainerState(waiting=why), phase="Pending")
    set_of(step, pod, pod_that(terminated(75, "the 2 machines of this step did not meet\n")))
    with pytest.raises(AirflowException) as raised:
        ends(step, "error")
    assert "could not start or finish: ErrImagePull: hllm:nope: not found; node 1 ended" in str(raised.value)
    deleted(step).assert_called()


def test_a_first_pod_whose_other_was_lost_is_tried_again(step: NodesStep) -> None:
    set_of(step, None, pod_that(terminated(143, "stopped by SIGTERM\n")))
    with pytest.raises(AirflowException, match="ended with 143: node 1: stopped by SIGTERM") as raised:
        ends(step, "error")
    assert not isinstance(raised.value, AirflowFailException)


def test_only_steps_that_can_be_shared_may_have_several_pods() -> None:
    with pytest.raises(ConfigError, match=r"runner\.steps\.ingest\.nodes"):
        load(HERE / "nodes.toml", ["runner.steps.ingest.nodes=2"], environ={})


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between questions to a Kubernetes that has all its answers."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
