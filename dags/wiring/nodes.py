"""One `hllm` command in several pods that work together: a JobSet, followed by its first pod.

Every pod runs the same command and is told where the first one is (PET_NNODES, PET_NODE_RANK,
PET_MASTER_ADDR, PET_MASTER_PORT, as Kubeflow's TrainJob tells them); `hllm` starts `torchrun` by that. The
first pod's output is the task's log, and its end the task's. A set is never restarted in place: whichever pod
is lost, all end, and the task's next try continues from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from airflow.triggers.base import TriggerEvent
from kubernetes.client import ApiClient, ApiException, V1Pod
from kubernetes_asyncio import client as asyncio_client

from hllm.steps import digest_of
from wiring.pod import PodStep
from wiring.trigger import SETTLED_SECONDS, PodTrigger

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
NODE = "node"
"""The set's only job; its pods are called NAME-node-0-RANK."""
PORT = 29400
INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation by which an indexed job tells its pods which one they are."""
KEEP_SECONDS = 86_400
"""A set that nobody deleted - Airflow was gone - deletes itself so long after its end."""


class SetTrigger(PodTrigger):
    """Follows the first pod of the JobSet in `trigger_kwargs`; a person who ends the task ends the set."""

    async def on_kill(self) -> None:
        if self._fired_event:
            return
        async with self.hook.get_conn() as connection:
            api = asyncio_client.CustomObjectsApi(connection)
            await api.delete_namespaced_custom_object(
                GROUP,
                VERSION,
                self.pod_namespace,
                PLURAL,
                self.trigger_kwargs["jobset"],
                propagation_policy="Background",
            )


class FirstPodTrigger(SetTrigger):
    """Waits until the JobSet has its first pod, which takes as long as the queue it is in."""

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await asyncio.sleep(SETTLED_SECONDS)
        try:
            found = await self._first_pod()
        except Exception as error:  # whatever it is, the set must not go on while the next try makes another
            self.log.exception("JobSet %s", self.trigger_kwargs["jobset"])
            found = {"status": "error", "message": f"could not be followed: {error}"}
        self._fired_event = True
        yield TriggerEvent({"name": "", "namespace": self.pod_namespace, **self.trigger_kwargs, **found})

    async def _first_pod(self) -> dict[str, str]:
        deadline = time.time() + self.schedule_timeout
        selector = f"jobset.sigs.k8s.io/jobset-name={self.trigger_kwargs['jobset']}"
        while True:
            async with self.hook.get_conn() as connection:
                api = asyncio_client.CoreV1Api(connection)
                pods = (await api.list_namespaced_pod(self.pod_namespace, label_selector=selector)).items
            first = next((pod for pod in pods if rank_of(pod) == "0"), None)
            if first is not None:
                return {"status": "running", "name": first.metadata.name}
            if time.time() > deadline:
                hours = self.schedule_timeout / 3600
                message = f"was not admitted within {hours:g} h (runner.queue_hours)"
                return {"status": "timeout", "message": message}
            await asyncio.sleep(self.poll_interval)


class NodesStep(PodStep):
    """A step of `runner.steps.*.nodes` pods."""

    trigger_class = SetTrigger

    def __init__(self, *, nodes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nodes = nodes
        self.jobset_name = ""

    def execute_async(self, context: Context) -> None:
        """In place of one pod, the set; the trigger then waits until its first pod is there."""
        ti = context["ti"]
        run = digest_of([ti.dag_id, context["run_id"], ti.task_id, ti.try_number])[:8]
        name = f"hllm-{self.task_id}-{run}"  # a scheduler that starts again finds the set that it had made
        pod = ApiClient().sanitize_for_serialization(self.build_pod_request_obj(context))
        try:
            self.hook.custom_object_client.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, jobset(name, pod, self.nodes)
            )
        except ApiException as error:
            if error.status == 404:
                raise AirflowFailException(
                    f"hllm {' '.join(self.command)}: the cluster has no JobSet ({GROUP}/{VERSION}), and "
                    f"runner.steps.{self.task_id}.nodes is {self.nodes}"
                ) from None
            if error.status != 409:  # this try's own, from before a restart
                raise
        self.jobset_name = name
        self.log.info("JobSet %s/%s: %s pods", self.namespace, name, self.nodes)
        self.convert_config_file_to_dict()
        self.defer(
            trigger=FirstPodTrigger(
                trigger_kwargs={"jobset": name},
                pod_name="",
                pod_namespace=self.namespace,
                trigger_start_time=ti.start_date,
                base_container_name=self.base_container_name,
                kubernetes_conn_id=self.kubernetes_conn_id,
                config_dict=self._config_dict,
                in_cluster=self._inside(),
                schedule_timeout=self.schedule_timeout_seconds,
                poll_interval=self.poll_interval,
            ),
            method_name="first_pod_made",
        )

    def first_pod_made(self, context: Context, event: dict[str, Any]) -> None:
        """From here on the first pod is followed as the only pod of another step is."""
        self.jobset_name = event["jobset"]
        if event["status"] != "running":
            self._delete_set()
            final = AirflowFailException if event["status"] == "timeout" else AirflowException
            problem = final(
                f"hllm {' '.join(self.command)}: JobSet {self.namespace}/{self.jobset_name} "
                f"{event['message']}, and was deleted"
            )
            self._leave(context, problem)
            raise problem
        self.trigger_kwargs = {"jobset": self.jobset_name}
        self.pod = self.hook.get_pod(event["name"], self.namespace)
        self.invoke_defer_method(context=context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """The end of the first pod is the end of all; the set goes, and with it every pod."""
        self.jobset_name = event["jobset"]
        self.trigger_kwargs = {"jobset": self.jobset_name}
        try:
            super().trigger_reentry(context, event)
        except TaskDeferred:
            raise
        except AirflowException as error:
            others = self._others_that_failed()
            self._delete_set()
            raise type(error)(f"{error}{others}") from None
        self._delete_set()

    def on_kill(self) -> None:
        super().on_kill()
        if self.jobset_name:
            self._delete_set()

    def _others_that_failed(self) -> str:
        """The first pod often only notices that another one is gone."""
        found = self.hook.core_v1_client.list_namespaced_pod(
            self.namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={self.jobset_name}"
        ).items
        said = [one for pod in found if (one := _failed(pod)) and rank_of(pod) != "0"]
        return f"; {'; '.join(said)}" if said else ""

    def _delete_set(self) -> None:
        try:
            self.hook.custom_object_client.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, self.jobset_name, propagation_policy="Background"
            )
        except ApiException as error:
            if error.status != 404:
                self.log.warning("JobSet %s was not deleted: %s", self.jobset_name, error.reason)


def jobset(name: str, pod: Mapping[str, Any], nodes: int) -> dict[str, Any]:
    """`nodes` times this pod, as one set that starts, ends and waits in the queue together."""
    spec, labels = dict(pod["spec"]), {**pod["metadata"]["labels"], "hllm/nodes": "true"}
    (container,) = spec["containers"]
    told = {
        "PET_NNODES": str(nodes),
        "PET_MASTER_ADDR": f"{name}-{NODE}-0-0.{name}",
        "PET_MASTER_PORT": str(PORT),
    }
    # JOB_COMPLETION_INDEX says the same, but the job's controller puts it last: "$(...)" would stay as it is.
    rank = {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}}
    variables = [
        *({"name": key, "value": value} for key, value in told.items()),
        {"name": "PET_NODE_RANK", **rank},
    ]
    spec["containers"] = [{**container, "env": [*container.get("env", ()), *variables]}]
    spec["restartPolicy"] = "Never"
    own = {key: value for key, value in labels.items() if not key.startswith("kueue.x-k8s.io/")}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        # Kueue admits the set, not its pods one by one.
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "replicatedJobs": [
                {
                    "name": NODE,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": nodes,
                            "parallelism": nodes,
                            "backoffLimit": 0,
                            "template": {
                                "metadata": {"labels": own},
                                "spec": spec,
                            },
                        }
                    },
                }
            ],
        },
    }


def rank_of(pod: V1Pod) -> str:
    """Which of the set it is."""
    return (pod.metadata.annotations or {}).get(INDEX, "")


def _failed(pod: V1Pod) -> str:
    for status in (pod.status.container_statuses or ()) if pod.status else ():
        ended = status.state.terminated if status.state else None
        if ended and ended.exit_code:
            line = (ended.message or "").strip().partition("\n")[0]
            return f"node {rank_of(pod)} ended with {ended.exit_code}: {ended.reason or ''} {line}".rstrip()
    return ""
