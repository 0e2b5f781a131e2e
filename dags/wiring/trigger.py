"""What waits for pods in Airflow's triggerer, while no worker is held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from aiohttp import ClientError
from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import generic_api_retry
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.triggers.base import TriggerEvent
from kubernetes_asyncio import client

from wiring.jobset import GROUP, NODE, PLURAL, VERSION, pods_of, rank_of, why_failed

SETTLED_SECONDS = 10
"""Seconds before a trigger looks for the first time.

A scheduler reads that the worker process of a task has ended some time after the task began to wait (the
loop of a busy one takes seconds). If the task is queued again by then, Airflow 3.3 takes the old end for the
new one's and fails the task (apache/airflow issues 67287 and 72716). Its pod would be left behind.
"""
PATIENCE_SECONDS = 600
"""How long a Kubernetes that does not answer is asked again, before a set loses its place in the queue."""
ANSWER_SECONDS = 30


class PodTrigger(KubernetesPodTrigger):
    """The provider's own, except that it never ends at once."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        _, values = super().serialize()
        return f"{type(self).__module__}.{type(self).__name__}", values

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await asyncio.sleep(SETTLED_SECONDS)
        async for event in super().run():
            yield event


class SetTrigger(PodTrigger):
    """Waits until the JobSet in `trigger_kwargs` has its first pod, which takes as long as the queue it is
    in, and follows that pod; a person who ends the task ends the set."""

    async def run(self) -> AsyncIterator[TriggerEvent]:
        if not self.pod_name:
            found = await self._first_pod()
            self.pod_name = found.pop("name", "")
            if found:
                await asyncio.sleep(SETTLED_SECONDS)
                self._fired_event = True
                told = {"name": "", "namespace": self.pod_namespace, **self.trigger_kwargs}
                yield TriggerEvent({**told, **found})
                return
        async for event in super().run():
            yield event

    @generic_api_retry
    async def on_kill(self) -> None:
        if self._fired_event:
            return
        async with self.hook.get_conn() as connection:
            await client.CustomObjectsApi(connection).delete_namespaced_custom_object(
                *self._set, propagation_policy="Background"
            )

    @property
    def _set(self) -> tuple[str, str, str, str, str]:
        return GROUP, VERSION, self.pod_namespace, PLURAL, self.trigger_kwargs["jobset"]

    async def _first_pod(self) -> dict[str, str]:
        """Its `name`, or the `status` and `message` of a set that will have none."""
        warnings: list[str] = []
        answered = time.monotonic()
        while True:
            try:
                if found := await self._look(warnings):
                    return found
                answered = time.monotonic()
            except Exception as error:  # whatever it is: nobody would follow the set that goes on
                if not _passes(error) or time.monotonic() - answered > PATIENCE_SECONDS:
                    self.log.exception("JobSet %s", self.trigger_kwargs["jobset"])
                    return {"status": "error", "message": _said(error)}
                self.log.warning("JobSet %s %s; asks again", self.trigger_kwargs["jobset"], _said(error))
            await asyncio.sleep(self.poll_interval)

    async def _look(self, warnings: list[str]) -> dict[str, str]:
        """Nothing yet, or what `_first_pod` returns; `warnings`: what the cluster has said already."""
        name, patient = self.trigger_kwargs["jobset"], {"_request_timeout": ANSWER_SECONDS}
        async with self.hook.get_conn() as connection:
            core = client.CoreV1Api(connection)
            pods = await core.list_namespaced_pod(self.pod_namespace, label_selector=pods_of(name), **patient)
            for pod in pods.items:
                if rank_of(pod) == "0":
                    return {"name": pod.metadata.name}
            found = await client.CustomObjectsApi(connection).get_namespaced_custom_object(
                *self._set, **patient
            )
            if why := why_failed(found):
                return {"status": "failed", "message": f"failed: {why}"}
            events = []
            for about in (name, f"{name}-{NODE}-0"):  # the job says why it has no pods
                selector = f"type=Warning,involvedObject.name={about}"
                answer = await core.list_namespaced_event(
                    self.pod_namespace, field_selector=selector, **patient
                )
                events += answer.items
        for event in sorted(events, key=lambda one: one.last_timestamp or one.metadata.creation_timestamp):
            if event.message not in warnings:
                warnings.append(event.message)
                self.log.warning("%s: %s", event.reason, event.message)
        if (datetime.now(UTC) - self.trigger_start_time).total_seconds() > self.schedule_timeout:
            message = f"was not admitted within {self.schedule_timeout / 3600:g} h (runner.queue_hours)"
            return {"status": "timeout", "message": ": ".join((message, *warnings[-1:]))}
        return {}


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a while: no connection, too many questions, a server in trouble."""
    if isinstance(error, client.ApiException):
        return not error.status or error.status == 429 or error.status >= 500
    return isinstance(error, ClientError | OSError)


def _said(error: Exception) -> str:
    if not isinstance(error, client.ApiException):
        return f"could not be followed: {type(error).__name__} {error}".rstrip()
    if error.status == 404:
        return "is gone: somebody deleted it"
    return f"could not be followed: Kubernetes answered {error.status}: {error.reason}"
