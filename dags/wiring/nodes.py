"""One `hllm` command in several pods that work together: a JobSet, followed by its first pod.

Every pod runs the same command and is told where the first one is (PET_NNODES, PET_NODE_RANK,
PET_MASTER_ADDR, PET_MASTER_PORT, as Kubeflow's TrainJob tells them); `hllm` starts `torchrun` by that. The
first pod's output is the task's log, and its end the task's. A set is never restarted in place: whichever pod
is lost, all end, and the task's next try continues from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import generic_api_retry
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from kubernetes.client import ApiClient, ApiException, V1ObjectMeta, V1Pod
from urllib3.exceptions import HTTPError

from hllm.errors import Terminated
from hllm.work.artifacts import digest_of
from hllm.work.launch import TELLING
from hllm.work.ranks import GONE
from wiring.jobset import GROUP, PLURAL, VERSION, jobset, pods_of, rank_of
from wiring.pod import PodStep, ended_of
from wiring.runner import Ended
from wiring.trigger import SetTrigger


class NodesStep(PodStep):
    """A step of `runner.steps.*.nodes` pods."""

    trigger_class = SetTrigger

    def __init__(self, *, nodes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nodes = nodes
        self.jobset_name = ""

    def execute_async(self, context: Context) -> None:
        """In place of one pod, the set; the trigger waits until its first pod is there."""
        names = [self._name(context, number + 1) for number in range(context["ti"].try_number)]
        self._end_earlier(names[:-1])
        name = names[-1]  # a scheduler that starts again finds the set that it had made
        pod = ApiClient().sanitize_for_serialization(self.build_pod_request_obj(context))
        self._found({"jobset": name})  # whoever ends the task from here on ends the set
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
        self.log.info("JobSet %s/%s: %s pods", self.namespace, name, self.nodes)
        self.pod = V1Pod(metadata=V1ObjectMeta(name="", namespace=self.namespace))  # its trigger will find it
        try:
            self.invoke_defer_method(context=context)
        except TaskDeferred:
            raise
        except BaseException:
            self._delete_set()
            raise
        finally:
            self.pod = None

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """The end of the first pod is the end of all; the set goes, and with it every pod."""
        self._found(event)
        try:
            if event["name"]:
                super().trigger_reentry(context, event)
            else:
                self._conclude(context, event)
        except TaskDeferred:
            raise
        except BaseException:
            self._delete_set()
            raise
        self._delete_set()

    def on_kill(self) -> None:
        if self.jobset_name:
            self._delete_set()
        super().on_kill()

    def _name(self, context: Context, try_number: int) -> str:
        ti = context["ti"]
        return f"hllm-{self.task_id}-{digest_of([ti.dag_id, context['run_id'], ti.task_id, try_number])[:8]}"

    def _found(self, event: Mapping[str, Any]) -> None:
        self.jobset_name = event["jobset"]
        self.trigger_kwargs = {"jobset": self.jobset_name}

    def _end_earlier(self, names: list[str]) -> None:
        """What earlier tries left behind - the API was away, a worker was lost - must not train on beside
        this one. An API that does not take it away ends this try, too."""
        if not names:
            return
        for name in names:
            self._ask_to_go(name)
        self.await_end(
            lambda: [
                pod
                for pod in self.hook.core_v1_client.list_namespaced_pod(
                    self.namespace, label_selector=pods_of(*names)
                ).items
                if pod.status.phase not in ("Succeeded", "Failed")
            ]
        )

    def _ended(self) -> Ended | None:
        """The first pod's end; if that is no good one, the end of the pod that it began with. The others only
        notice: they say so, or the set's controller takes them away."""
        own = super()._ended()
        if own is None and self.pod is not None:  # it never started: the others wait for it
            return None
        if own is not None and not own.exit_code:
            return own
        ends = {"0": own} if own else {}
        ends |= self._others_that_failed()
        if not ends:
            return None
        rank = min(ends, key=lambda one: (*_noticed(ends[one]), one))
        ended = ends.pop(rank)
        line = ended.line if rank == "0" else f"node {rank}: {ended.line}"
        return Ended(ended.exit_code, line + _named(ends))

    def _others_that_failed(self) -> dict[str, Ended]:
        try:
            pods = self.hook.core_v1_client.list_namespaced_pod(
                self.namespace, label_selector=pods_of(self.jobset_name)
            ).items
        except (ApiException, HTTPError) as error:
            self.log.warning("The other pods of JobSet %s: %s", self.jobset_name, error)
            return {}
        ends = {rank_of(pod): ended_of(pod, self.task_id) for pod in pods}
        return {rank: end for rank, end in ends.items() if rank != "0" and end and end.exit_code}

    def _without_an_end(self, event: Mapping[str, Any]) -> AirflowException:
        if event["name"]:
            others = _named(self._others_that_failed())
            problem = super()._without_an_end(event)
            return type(problem)(f"{problem}{others}")
        final = AirflowFailException if event["status"] == "timeout" else AirflowException
        return final(
            f"hllm {' '.join(self.command)}: JobSet {self.namespace}/{self.jobset_name} "
            f"{event['message']}, and was deleted"
        )

    def _delete_set(self) -> None:
        try:
            self._ask_to_go(self.jobset_name)
        except (ApiException, HTTPError) as error:
            self.log.warning("JobSet %s is left to the task's next try: %s", self.jobset_name, error)

    @generic_api_retry
    def _ask_to_go(self, name: str) -> None:
        try:
            self.hook.custom_object_client.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, propagation_policy="Background"
            )
        except ApiException as error:
            if error.status != 404:
                raise


def _named(ends: Mapping[str, Ended]) -> str:
    return "".join(f"; node {rank} ended with {end.exit_code}: {end.line}" for rank, end in ends.items())


def _noticed(ended: Ended) -> tuple[bool, bool, bool]:
    """What to believe last: that another one is gone, that it was stopped, an end that says nothing."""
    return GONE in ended.line, ended.exit_code == Terminated.exit_code, ended.exit_code not in TELLING
