"""The pod runner, without a cluster: the pods it would make, and what it makes of the ends of pods.

`pods.yaml` is written anew by `WRITE_PODS=1 pytest tests/dags/test_pod.py`; read the difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from kubernetes import client as k8s
from kubernetes.client import ApiClient, ApiException
from urllib3.exceptions import MaxRetryError
from wiring.pod import PodStep, variables
from wiring.trigger import PodTrigger

from hllm.errors import ConfigError
from hllm.settings import load

HERE = Path(__file__).resolve().parent
K8S = HERE.parents[1] / "k8s"
PINNED = HERE / "pods.yaml"
NASTY = "cheap $$ or $(AWS_SECRET_ACCESS_KEY)? {{ ds }} ; rm -rf /"
PARAMS = {"config": "/etc/hllm/hllm.toml", "hllm.stage1.lr": 0.002}
DECISION = {"HLLM_DECIDED_BY": "ada", "HLLM_DECIDED_AT": "2026-11-23T01:00:00", "HLLM_DECISION_NOTE": NASTY}


class Pushed(dict[str, Any]):
    """A task instance that keeps what is pushed."""

    dag_id, task_id, map_index, try_number = "hllm_train", "", -1, 1
    start_date = datetime(2026, 11, 23, tzinfo=UTC)

    def xcom_push(self, key: str, value: object) -> None:
        self[key] = value

    def xcom_pull(self, **_: object) -> dict[str, str]:
        return DECISION


@pytest.fixture
def dags(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("HLLM_CONFIG", str(HERE / "kubernetes.toml"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    bag = DagBag(dag_folder=HERE.parents[1] / "dags", collect_dags=True)
    assert not bag.import_errors
    return dict(bag.dags)


def steps_of(dags: dict[str, Any]) -> Iterator[PodStep]:
    for dag in dags.values():
        yield from (task for task in dag.tasks if isinstance(task, PodStep))


def cluster(step: PodStep, pod: k8s.V1Pod | None = None) -> MagicMock:
    """A Kubernetes API for one operator: it has this one pod, if any."""
    api = MagicMock(api_client=ApiClient())
    api.list_namespaced_pod.return_value.items = []
    api.read_namespaced_pod.return_value = pod
    api.list_namespaced_event.return_value.items = []
    api.read_namespaced_pod_log.return_value = [b"loss=0.1\n"]
    api.create_namespaced_pod.side_effect = lambda body, namespace: k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(name=body["metadata"]["name"], namespace=namespace)
    )
    gone = ApiException(404, "Not Found")
    get_pod = MagicMock(return_value=pod) if pod else MagicMock(side_effect=gone)
    queues = MagicMock()
    queues.list_namespaced_custom_object.return_value = {"items": [{"metadata": {"name": "hllm"}}]}
    step.__dict__["hook"] = SimpleNamespace(
        is_in_cluster=True, core_v1_client=api, get_pod=get_pod, custom_object_client=queues
    )
    return api


def context_of(step: PodStep) -> Any:
    ti = Pushed()
    ti.dag_id, ti.task_id = step.dag_id, step.task_id
    params = {**PARAMS, "version": 7} if step.dag_id == "hllm_release" else PARAMS
    return {
        "ti": ti,
        "run_id": "manual__1",
        "dag": step.dag,
        "params": params,
        "triggering_asset_events": {},
        "task_state_store": None,
    }


def created(step: PodStep) -> dict[str, Any]:
    """What the operator sends to Kubernetes when its task starts."""
    api = cluster(step)
    step.random_name_suffix = False
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context_of(step))
    assert type(deferred.value.trigger) is PodTrigger
    assert deferred.value.trigger.pod_name == f"hllm-{step.task_id}"
    assert deferred.value.trigger.in_cluster
    body: dict[str, Any] = api.create_namespaced_pod.call_args.kwargs["body"]
    del body["metadata"]["labels"]["airflow_version"]  # changes with Airflow, not with us
    return body


def without_empty(node: Any) -> Any:
    if isinstance(node, dict):
        kept = {key: without_empty(value) for key, value in node.items()}
        return {key: value for key, value in kept.items() if value not in ([], {}) or key == "emptyDir"}
    return [without_empty(one) for one in node] if isinstance(node, list) else node


def test_the_pod_of_every_step_is_the_pinned_one(dags: dict[str, Any]) -> None:
    pods = [without_empty(created(step)) for step in steps_of(dags)]
    if os.environ.get("WRITE_PODS"):
        head = "# The pod of every step with kubernetes.toml; see test_pod.py.\n"
        PINNED.write_text(
            head + yaml.safe_dump_all(pods, sort_keys=False, width=110, default_flow_style=None)
        )
    pinned = list(yaml.safe_load_all(PINNED.read_text()))
    assert [pod["metadata"]["name"] for pod in pods] == [pod["metadata"]["name"] for pod in pinned]
    for pod, wanted in zip(pods, pinned, strict=True):
        assert pod == wanted


def test_the_same_argv_as_the_local_runner(dags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pods = {(step.dag_id, step.task_id): created(step) for step in steps_of(dags)}
    monkeypatch.setenv("HLLM__RUNNER__KIND", "local")
    local = DagBag(dag_folder=HERE.parents[1] / "dags", collect_dags=True)
    for (dag, task), pod in pods.items():
        assert pod["spec"]["containers"][0]["args"] == ["hllm", *local.dags[dag].task_dict[task].command]


@pytest.mark.parametrize("overlay", ["local", "production"])
def test_the_overlays_of_k8s_shape_these_pods(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = K8S / "overlays" / overlay
    monkeypatch.setenv("HLLM_CONFIG", str(folder / "hllm.toml"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    bag = DagBag(dag_folder=HERE.parents[1] / "dags", collect_dags=True)
    assert not bag.import_errors
    for step in steps_of(dict(bag.dags)):
        name = Path(step.pod_template_file).name  # in a ConfigMap there, of the overlay's file or the base's
        step.pod_template_file = str(folder / name if (folder / name).exists() else K8S / "base" / name)
        spec = created(step)["spec"]
        (container,) = spec["containers"]
        assert container["args"] == ["hllm", *step.command]
        for what in (spec["volumes"], container["volumeMounts"], container["env"]):
            assert len({one["name"] for one in what}) == len(what)
        tolerated = {one["key"] for one in spec.get("tolerations", ())}
        assert ("hllm/spot" in tolerated) == (overlay == "production")
        assert ("nvidia.com/gpu" in tolerated) == ("nvidia.com/gpu" in container["resources"]["limits"])


def test_no_pod_holds_a_secret_a_token_or_a_sidecar(dags: dict[str, Any]) -> None:
    for step in steps_of(dags):
        spec = created(step)["spec"]
        (container,) = spec["containers"]
        assert spec["automountServiceAccountToken"] is False
        assert {source["secretRef"]["name"] for source in container["envFrom"]} == {"hllm-s3", "hllm-feast"}
        names = {variable["name"] for variable in container["env"]}
        assert not [name for name in names if "PASSWORD" in name or "SECRET" in name or "AWS" in name]


def test_what_people_typed_arrives_letter_by_letter() -> None:
    (note, unbuffered) = variables({"HLLM_DECISION_NOTE": NASTY})
    # Kubernetes: `$$` becomes `$`, and `$(NAME)` the value of NAME.
    assert note.value == "cheap $$$$ or $$(AWS_SECRET_ACCESS_KEY)? {{ ds }} ; rm -rf /"
    assert unbuffered.name == "PYTHONUNBUFFERED"


def test_the_operator_waits_reattaches_and_keeps_what_failed(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["train-hllm-1"]
    assert step.deferrable
    assert step.durable
    assert step.logging_interval == 15
    assert step.on_finish_action.value == "delete_succeeded_pod"
    assert step.schedule_timeout_seconds == 12 * 3600
    assert step.startup_timeout_seconds == 20 * 60
    assert step.termination_grace_period == 300


def test_a_task_that_starts_again_finds_its_pod(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["train-hllm-1"]
    running = pod_that(k8s.V1ContainerState(running=k8s.V1ContainerStateRunning()), phase="Running")
    running.metadata.labels = {"try_number": "1"}
    api = cluster(step, running)
    context = context_of(step)
    context["task_state_store"] = {"pod_identifier": {"name": "hllm-x", "namespace": "hllm"}}
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context)
    assert deferred.value.trigger.pod_name == "hllm-x"
    api.create_namespaced_pod.assert_not_called()


def test_a_pod_that_is_being_deleted_is_waited_for_and_not_taken_up(dags: dict[str, Any]) -> None:
    """As after a running task was cleared: it would end with 143, and cost the new try."""
    step = dags["hllm_train"].task_dict["train-hllm-1"]
    ending = pod_that(k8s.V1ContainerState(running=k8s.V1ContainerStateRunning()), phase="Running")
    ending.metadata.labels = {"try_number": "1"}
    ending.metadata.deletion_timestamp = datetime(2026, 11, 23, tzinfo=UTC)
    api = cluster(step)
    there, gone = SimpleNamespace(items=[ending]), SimpleNamespace(items=[])
    api.list_namespaced_pod.side_effect = [there, there, gone, gone]
    with pytest.raises(TaskDeferred):
        step.execute(context_of(step))
    api.create_namespaced_pod.assert_called_once()
    assert api.list_namespaced_pod.call_count == 4


def test_one_on_a_lost_node_is_not_waited_for_forever(
    dags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = dags["hllm_train"].task_dict["train-hllm-1"]
    ending = pod_that(k8s.V1ContainerState(running=k8s.V1ContainerStateRunning()), phase="Running")
    ending.metadata.deletion_timestamp = datetime(2026, 11, 23, tzinfo=UTC)
    api = cluster(step)

    def pods(namespace: str, label_selector: str) -> SimpleNamespace:
        checked = api.patch_namespaced_pod.called and "already_checked!=True" in label_selector
        return SimpleNamespace(items=[] if checked else [ending])

    slept = [0.0]
    monkeypatch.setattr("time.sleep", lambda seconds: slept.append(slept[-1] + seconds))
    monkeypatch.setattr("time.monotonic", lambda: slept[-1])
    api.list_namespaced_pod.side_effect = pods
    with pytest.raises(TaskDeferred):
        step.execute(context_of(step))
    api.create_namespaced_pod.assert_called_once()
    assert 300 < slept[-1] < 400


def pod_that(state: k8s.V1ContainerState | None = None, phase: str = "Failed", **status: Any) -> k8s.V1Pod:
    resources = k8s.V1ResourceRequirements(limits={"memory": "512Gi"})
    statuses = [SimpleNamespace(name="base", state=state)] if state else None
    return k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(name="hllm-x", namespace="hllm", labels={}),
        spec=k8s.V1PodSpec(containers=[k8s.V1Container(name="base", resources=resources)]),
        status=k8s.V1PodStatus(phase=phase, container_statuses=statuses, **status),
    )


def terminated(code: int, message: str = "", reason: str = "Error") -> k8s.V1ContainerState:
    return k8s.V1ContainerState(
        terminated=k8s.V1ContainerStateTerminated(exit_code=code, message=message, reason=reason)
    )


def came_back(
    dags: dict[str, Any], pod: k8s.V1Pod | None, status: str = "failed", task: str = "train-hllm-1"
) -> tuple[Pushed, MagicMock]:
    """The task resumes because its trigger says so; the pod is what Kubernetes shows then."""
    step = dags["hllm_train"].task_dict[task]
    api = cluster(step, pod)
    context = context_of(step)
    context["outlet_events"] = MagicMock()
    event = {"name": "hllm-x", "namespace": "hllm", "status": status, "message": "what the trigger says"}
    try:
        step.trigger_reentry(context, event)
    except AirflowException as error:
        error.api, error.pushed = api, context["ti"]  # type: ignore[attr-defined]
        raise
    return context["ti"], api


@pytest.mark.parametrize(
    ("code", "retried"),
    [(64, False), (65, False), (66, False), (70, False), (1, False), (75, True), (143, True), (137, True)],
)
def test_exit_codes_mean_what_they_mean_locally(dags: dict[str, Any], code: int, retried: bool) -> None:
    with pytest.raises(AirflowException) as raised:
        came_back(dags, pod_that(terminated(code, "items: 3 rows are wrong\n")))
    assert isinstance(raised.value, AirflowFailException) != retried
    command = "hllm train --family hllm --stage 1"
    assert str(raised.value) == f"{command} ended with {code}: items: 3 rows are wrong"
    assert raised.value.pushed["ended"] == {"exit_code": code, "line": "items: 3 rows are wrong"}  # type: ignore[attr-defined]
    raised.value.api.delete_namespaced_pod.assert_not_called()  # type: ignore[attr-defined]


def test_a_succeeded_pod_is_deleted_and_its_line_kept(dags: dict[str, Any]) -> None:
    ti, api = came_back(dags, pod_that(terminated(0, "train: done in 3.0 s\n"), phase="Succeeded"), "success")
    assert ti["ended"] == {"exit_code": 0, "line": "train: done in 3.0 s"}
    api.delete_namespaced_pod.assert_called_once()


def test_the_result_travels_in_the_termination_message(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["register"]
    seen: list[str] = []
    step.on_result = lambda context, result: seen.append(result)
    message = "register: version 4\n" + json.dumps({"version": 4}) + "\n"
    came_back(dags, pod_that(terminated(0, message), phase="Succeeded"), "success", "register")
    assert json.loads(seen[0]) == {"version": 4}


def test_a_pod_out_of_memory_says_so_and_how_much_it_asked_for(dags: dict[str, Any]) -> None:
    log = "step=10 loss=0.3\nstep=20 loss=0.2\n  indented\n"
    with pytest.raises(AirflowException) as raised:
        came_back(dags, pod_that(terminated(137, log, "OOMKilled")))
    assert not isinstance(raised.value, AirflowFailException)
    assert "ended with 137: OOMKilled: it needed more memory than the 512Gi it had asked for" in str(
        raised.value
    )
    assert "[runner.steps.train-hllm-1]" in str(raised.value)
    assert str(raised.value).endswith("last line: step=20 loss=0.2")


def test_an_evicted_pod_says_why(dags: dict[str, Any]) -> None:
    pod = pod_that(terminated(137), reason="Evicted", message="The node was low on resource: memory.")
    with pytest.raises(AirflowException, match="Evicted: The node was low on resource") as raised:
        came_back(dags, pod)
    assert not isinstance(raised.value, AirflowFailException)


def test_an_evicted_pod_that_never_started_is_tried_again(dags: dict[str, Any]) -> None:
    with pytest.raises(AirflowException, match=r"could not start or finish: Evicted: no disk") as raised:
        came_back(dags, pod_that(reason="Evicted", message="no disk"))
    assert not isinstance(raised.value, AirflowFailException)


def test_a_deleted_pod_is_tried_again(dags: dict[str, Any]) -> None:
    with pytest.raises(AirflowException, match="pod hllm/hllm-x is gone: somebody deleted it") as raised:
        came_back(dags, None, "error")
    assert not isinstance(raised.value, AirflowFailException)


def test_a_pod_that_gets_no_gpu_says_why_and_does_not_stay_in_the_queue(dags: dict[str, Any]) -> None:
    why = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    waiting = k8s.V1PodCondition(type="PodScheduled", status="False", message=why)
    with pytest.raises(AirflowFailException) as raised:
        came_back(dags, pod_that(phase="Pending", conditions=[waiting]), "timeout")
    assert "got no node within 12 h (runner.queue_hours), and was deleted: " + why in str(raised.value)
    raised.value.api.delete_namespaced_pod.assert_called_once()  # type: ignore[attr-defined]


def test_an_image_that_cannot_be_pulled_says_which(dags: dict[str, Any]) -> None:
    why = k8s.V1ContainerStateWaiting(reason="ErrImagePull", message="hllm:nope: not found")
    with pytest.raises(AirflowException, match="ErrImagePull: hllm:nope: not found") as raised:
        came_back(dags, pod_that(k8s.V1ContainerState(waiting=why), phase="Pending"), "error")
    raised.value.api.delete_namespaced_pod.assert_called_once()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("status", "retried"), [(403, True), (422, False), (404, False)])
def test_a_refusal_of_kubernetes_is_one_clear_line(dags: dict[str, Any], status: int, retried: bool) -> None:
    step = dags["hllm_train"].task_dict["ingest"]
    error = ApiException(status, "Forbidden")
    error.body = json.dumps(
        {"message": 'pods is forbidden: User "hllm-airflow" cannot create resource "pods"'}
    )
    cluster(step).create_namespaced_pod.side_effect = error
    with pytest.raises(
        AirflowException, match=f"hllm ingest: Kubernetes answered {status}: pods is"
    ) as raised:
        step.execute(context_of(step))
    assert isinstance(raised.value, AirflowFailException) != retried
    assert "\n" not in str(raised.value)


def test_a_kubernetes_that_does_not_answer_is_tried_again(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["ingest"]
    cluster(step).list_namespaced_pod.side_effect = MaxRetryError(None, "/api", None)  # type: ignore[arg-type]
    step.find_pod = step.find_pod.__wrapped__.__get__(step)  # without the provider's own waiting
    with pytest.raises(AirflowException, match="hllm ingest: Kubernetes does not answer"):
        step.execute(context_of(step))


def test_a_queue_that_does_not_exist_fails_at_once(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["ingest"]
    api = cluster(step)
    step.local_queue = "hlm"
    with pytest.raises(AirflowFailException, match=r"no LocalQueue hlm in namespace hllm .*: there are hllm"):
        step.execute(context_of(step))
    step.hook.custom_object_client.list_namespaced_custom_object.side_effect = ApiException(404, "Not Found")
    with pytest.raises(AirflowFailException, match="the cluster has no Kueue"):
        step.execute(context_of(step))
    api.create_namespaced_pod.assert_not_called()


def test_who_may_not_look_at_queues_goes_on(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["ingest"]
    cluster(step)
    step.hook.custom_object_client.list_namespaced_custom_object.side_effect = ApiException(403, "Forbidden")
    with pytest.raises(TaskDeferred):
        step.execute(context_of(step))


def test_a_missing_template_fails_at_once(dags: dict[str, Any]) -> None:
    step = dags["hllm_train"].task_dict["ingest"]
    step.pod_template_file = "/nowhere/pod.yaml"
    with pytest.raises(
        AirflowFailException, match=r"runner\.pod\.template: no such file: /nowhere/pod\.yaml"
    ):
        step.execute(context_of(step))


def test_a_template_adds_what_the_cluster_wants(dags: dict[str, Any], tmp_path: Path) -> None:
    step = dags["hllm_train"].task_dict["ingest"]
    template = tmp_path / "pod.yaml"
    template.write_text(
        "apiVersion: v1\nkind: Pod\nspec:\n  tolerations: [{key: hllm/spot, operator: Exists}]\n"
        "  containers:\n    - {name: base, image: ignored, volumeMounts: [{name: big, mountPath: /big}]}\n"
        "  volumes: [{name: big, emptyDir: {}}]\n"
    )
    step.pod_template_file = str(template)
    spec = created(step)["spec"]
    (container,) = spec["containers"]
    assert spec["tolerations"] == [{"key": "hllm/spot", "operator": "Exists"}]
    assert {"name": "big", "mountPath": "/big"} in container["volumeMounts"]
    assert container["image"].startswith("registry.example/hllm@")
    assert {volume["name"] for volume in spec["volumes"]} == {"big", "settings", "tmp", "work"}


def test_a_step_that_no_dag_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean runner\.steps\.train-hllm-1\?"):
        load(HERE / "kubernetes.toml", ["runner.steps.train-hlm-1.gpus=1"], environ={})


def test_a_step_says_only_what_differs(tmp_path: Path) -> None:
    runner = load(HERE / "kubernetes.toml", environ={}).runner
    assert runner.pod_of("train-hllm-1").image == runner.pod.image
    assert (runner.pod_of("train-hllm-1").gpus, runner.pod.gpus) == (8, 0)
    assert runner.pod_of("register").queue == ""
    assert runner.pod_of("ingest") == runner.pod


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between questions to a Kubernetes that has all its answers."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
