"""One `hllm` command as one Kubernetes pod: what it is made of, and how its end becomes the task's.

Imported only where `runner.kind = "kubernetes"`. The pod speaks to Airflow by its exit code and its
termination message, which `hllm` writes: no sidecar, no token, no way from the pod to the cluster.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import generic_api_retry
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.triggers.base import BaseTrigger
from kubernetes.client import ApiException, V1EnvVar, V1Pod
from urllib3.exceptions import HTTPError

from hllm.errors import InfraError
from hllm.settings import Pod, Settings
from wiring.form import ROOT
from wiring.runner import Ended, Environment, failure
from wiring.trigger import PodTrigger

SECRETS = ("hllm-s3", "hllm-feast")
"""Credentials reach the command as environment, by reference: the pod's spec holds none."""

KUEUE, KUEUE_VERSIONS = "kueue.x-k8s.io", ("v1beta2", "v1beta1")

SLACK_SECONDS = 30
"""What a pod may take to go, beyond `runner.grace_seconds`."""

REFUSED_FOR_GOOD = {400, 404, 405, 422}
"""Answers of the Kubernetes API that asking again does not change. 403 is not one: full quotas say so too."""


class PodStep(KubernetesPodOperator):
    """One `hllm` command in a pod. No worker is held while it waits or runs: a trigger watches it.

    A scheduler, triggerer or worker that starts again finds the pod by its name in Airflow's task state, or
    by its labels; there is never a second one.
    """

    ui_color = "#e8f0fe"
    trigger_class = PodTrigger

    def __init__(
        self,
        *,
        settings: Settings,
        task_id: str,
        command: Sequence[str],
        environment: Environment,
        on_result: Callable[[Context, str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        runner = settings.runner
        asked = runner.pod_of(task_id)
        super().__init__(
            task_id=task_id,
            namespace=runner.namespace,
            full_pod_spec=PodGenerator.deserialize_model_dict(manifest(task_id, command, asked)),
            pod_template_file=str(ROOT / asked.template) if asked.template else None,
            termination_grace_period=runner.grace_seconds,
            # What it printed last, where it was killed before it could say why.
            termination_message_policy="FallbackToLogsOnError",
            deferrable=True,
            durable=True,
            logging_interval=runner.log_seconds,
            poll_interval=5,
            schedule_timeout_seconds=round(runner.queue_hours * 3600),
            startup_timeout_seconds=round(runner.start_minutes * 60),
            on_finish_action="delete_succeeded_pod",
            on_kill_action="delete_pod",
            do_xcom_push=False,
            log_events_on_failure=True,
            log_pod_spec_on_failure=False,
            **kwargs,
        )
        self.grace_seconds = runner.grace_seconds
        self.command = list(command)
        self.environment = environment
        self.on_result = on_result
        self.local_queue = asked.queue

    def execute(self, context: Context) -> None:
        if self.pod_template_file and not Path(self.pod_template_file).is_file():
            raise AirflowFailException(f"runner.pod.template: no such file: {self.pod_template_file}")
        environment = self.environment(context)
        # After Airflow has rendered its templates: what people typed is never one.
        self.env_vars = variables(environment)
        self.log.info("hllm %s with %s", " ".join(self.command), ", ".join(sorted(environment)))
        try:
            if self.local_queue:
                self._refuse_unknown_queue()
            super().execute(context)
        except (ApiException, HTTPError) as error:
            self._leave(context, problem := refused(self.command, error))
            raise problem from None

    def _refuse_unknown_queue(self) -> None:
        """A pod in a queue that does not exist would wait as if the queue were full."""
        known: list[str] | None = None
        for version in KUEUE_VERSIONS:
            try:
                found = self.hook.custom_object_client.list_namespaced_custom_object(
                    KUEUE, version, self.namespace, "localqueues"
                )
            except ApiException as error:
                if error.status == 403:
                    self.log.warning("%s", refused(self.command, error))
                    return
                if error.status != 404:
                    raise
            else:
                known = [queue["metadata"]["name"] for queue in found["items"]]
                break
        if self.local_queue not in (known or ()):
            there = "the cluster has no Kueue" if known is None else f"there are {', '.join(known) or 'none'}"
            raise AirflowFailException(
                f"hllm {' '.join(self.command)}: no LocalQueue {self.local_queue} in namespace "
                f"{self.namespace} (runner.pod.queue, or queue in [runner.steps.{self.task_id}]): {there}"
            )

    def get_or_create_pod(self, pod_request_obj: V1Pod, context: Context) -> V1Pod:
        """Not one that is being deleted, as when the task was cleared: it ends, and would take this try
        along."""
        for pod in self.await_end(lambda: self._being_deleted(context)):
            self.patch_already_checked(pod, reraise=False)
        return super().get_or_create_pod(pod_request_obj, context)

    @generic_api_retry
    def _being_deleted(self, context: Context) -> list[V1Pod]:
        found = self.hook.core_v1_client.list_namespaced_pod(
            self.namespace, label_selector=self._build_find_pod_label_selector(context)
        ).items
        return [pod for pod in found if pod.metadata.deletion_timestamp]

    def await_end(self, left: Callable[[], list[V1Pod]]) -> list[V1Pod]:
        """Wait for pods that were asked to go: they may write a last checkpoint, where the next will write.
        What is left in the end is on a node that nobody hears of."""
        deadline = time.monotonic() + self.grace_seconds + SLACK_SECONDS
        while pods := left():
            names = ", ".join(pod.metadata.name for pod in pods)
            if time.monotonic() > deadline:
                self.log.warning("Goes on, though %s should have ended long ago", names)
                return pods
            self.log.info("Waits for the end of %s", names)
            time.sleep(self.poll_interval)
        return []

    def _leave(self, context: Context, problem: Exception) -> None:
        """For people and for whoever follows the run; no task reads it."""
        context["ti"].xcom_push("ended", {"exit_code": InfraError.exit_code, "line": str(problem)})

    def invoke_defer_method(self, last_log_time: Any = None, context: Context | None = None) -> None:
        self.in_cluster = self._inside()
        super().invoke_defer_method(last_log_time, context)

    def defer(self, *, trigger: BaseTrigger, **kwargs: Any) -> None:
        if type(trigger) is KubernetesPodTrigger:
            trigger = self.trigger_class(**trigger.serialize()[1])
        super().defer(trigger=trigger, **kwargs)

    def _inside(self) -> bool | None:
        """A trigger, unlike the operator, does not see by itself that it runs inside the cluster."""
        return True if self.hook.is_in_cluster and not os.environ.get("KUBECONFIG") else self.in_cluster

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """The trigger saw the pod end, or gave up: the pod itself says which."""
        try:
            super().trigger_reentry(context, event)
        except (ApiException, HTTPError) as error:
            raise refused(self.command, error) from None
        except AirflowException as error:
            # The operator's own account of it has a stack trace; ours comes from `self.pod`.
            self.log.debug("%s", error)
        self._conclude(context, event)

    def _conclude(self, context: Context, event: Mapping[str, Any]) -> None:
        ended = self._ended()
        if ended is None:
            without = self._without_an_end(event)
            self._leave(context, without)
            raise without
        # For people and for whoever follows the run; no task reads it.
        context["ti"].xcom_push("ended", {"exit_code": ended.exit_code, "line": ended.line})
        if ended.exit_code:
            raise failure(self.command, ended)
        if self.on_result:
            self.on_result(context, ended.result)

    def _ended(self) -> Ended | None:
        return ended_of(self.pod, self.task_id)

    def _without_an_end(self, event: Mapping[str, Any]) -> AirflowException:
        """Its command never started, or nobody can say how it ended."""
        about = f"hllm {' '.join(self.command)}: pod {event['namespace']}/{event['name']}"
        if self.pod is None:
            return AirflowException(f"{about} is gone: somebody deleted it, or its node was lost")
        # A pod that waits must not start after its task has failed.
        self.on_kill()
        why = why_not(self.pod) or str(event.get("message", "")).partition("\n")[0]
        if event["status"] == "timeout" and not scheduled(self.pod):
            hours = self.schedule_timeout_seconds / 3600
            return AirflowFailException(
                f"{about} got no node within {hours:g} h (runner.queue_hours), and was deleted: {why}"
            )
        return AirflowException(f"{about} could not start or finish: {why}")


def manifest(task_id: str, command: Sequence[str], asked: Pod) -> dict[str, Any]:
    """The pod of one step, but for what is only known when it runs: name, environment, labels of the run."""
    requests = {"cpu": asked.cpu, "memory": asked.memory}
    limits = {"memory": asked.memory}
    if asked.cpu_limit:
        limits["cpu"] = asked.cpu_limit
    if asked.disk:
        requests["ephemeral-storage"] = limits["ephemeral-storage"] = asked.disk
    volumes: dict[str, Any] = {
        "/etc/hllm": {"name": "settings", "configMap": {"name": "hllm-settings"}},
        "/tmp": {"name": "tmp", "emptyDir": {}},  # noqa: S108 - the pod's own
        "/work": {"name": "work", "emptyDir": {}},
    }
    spec: dict[str, Any] = {}
    if asked.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(asked.gpus)
        # NCCL and data loaders share memory; a container gets 64 MB of it. What is used counts as its memory.
        volumes["/dev/shm"] = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # noqa: S108
        if not asked.template:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    labels = {"app.kubernetes.io/name": "hllm", "app.kubernetes.io/component": "step"}
    if asked.queue:
        labels["kueue.x-k8s.io/queue-name"] = asked.queue
    return {
        "metadata": {"name": f"hllm-{task_id}", "labels": labels},
        "spec": {
            **spec,
            "serviceAccountName": "hllm-step",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "priorityClassName": "hllm-step",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "runAsGroup": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "base",
                    "image": asked.image,
                    "args": ["hllm", *command],
                    "envFrom": [{"secretRef": {"name": name}} for name in SECRETS],
                    "resources": {"requests": requests, "limits": limits},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [
                        {"name": volume["name"], "mountPath": path}
                        | ({"readOnly": True} if "configMap" in volume else {})
                        for path, volume in volumes.items()
                    ],
                }
            ],
            "volumes": list(volumes.values()),
        },
    }


def variables(environment: Mapping[str, str]) -> list[V1EnvVar]:
    """The container's environment, letter by letter: Kubernetes would expand `$(NAME)`, even of a secret."""
    return [
        V1EnvVar(name=name, value=value.replace("$", "$$"))
        for name, value in sorted({**environment, "PYTHONUNBUFFERED": "1"}.items())
    ]


def ended_of(pod: V1Pod | None, task_id: str) -> Ended | None:
    """How the pod's command ended; None if it never did."""
    statuses = (pod.status.container_statuses if pod and pod.status else None) or ()
    terminated = next((one.state.terminated for one in statuses if one.name == "base" and one.state), None)
    if pod is None or terminated is None:
        return None
    message = (terminated.message or "").strip()
    if terminated.exit_code == 0:
        line, _, result = message.partition("\n")
        return Ended(0, line, result)
    # One line of `hllm`, or the end of what it printed: there, indented lines explain the one before.
    line = next((one for one in reversed(message.splitlines()) if one and not one[0].isspace()), "")
    if terminated.reason == "OOMKilled":
        asked = pod.spec.containers[0].resources.limits["memory"]
        why = (
            f"OOMKilled: it needed more memory than the {asked} it had asked for "
            f"(runner.pod.memory, or memory in [runner.steps.{task_id}])"
        )
    elif pod.status.reason:  # evicted, or its node was shut down
        why = f"{pod.status.reason}: {pod.status.message or ''}".strip(" :")
    else:
        return Ended(terminated.exit_code, line)
    return Ended(terminated.exit_code, f"{why}; last line: {line}" if line else why)


def why_not(pod: V1Pod) -> str:
    """Why a pod does not run, as the cluster says it: its container's reason, its own, or the scheduler's."""
    for status in pod.status.container_statuses or ():
        if status.state and status.state.waiting and status.state.waiting.reason:
            return f"{status.state.waiting.reason}: {status.state.waiting.message or ''}".strip(" :")
    if pod.status.reason:
        return f"{pod.status.reason}: {pod.status.message or ''}".strip(" :")
    said = [one for one in pod.status.conditions or () if one.status == "False" and one.message]
    return said[0].message if said else ""


def scheduled(pod: V1Pod) -> bool:
    """Whether the pod has a node."""
    return any(one.type == "PodScheduled" and one.status == "True" for one in pod.status.conditions or ())


def refused(command: Sequence[str], error: Exception) -> AirflowException:
    """What the Kubernetes API answered, in one line."""
    about = f"hllm {' '.join(command)}: Kubernetes"
    if not isinstance(error, ApiException) or not error.status:
        return AirflowException(f"{about} does not answer: {error}")
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.reason
    kind = AirflowFailException if error.status in REFUSED_FOR_GOOD else AirflowException
    return kind(f"{about} answered {error.status}: {said}")
