"""What waits for a pod in Airflow's triggerer, while no worker is held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.triggers.base import TriggerEvent

SETTLED_SECONDS = 10
"""Seconds before a trigger looks for the first time.

A scheduler reads that the worker process of a task has ended some time after the task began to wait (the
loop of a busy one takes seconds). If the task is queued again by then, Airflow 3.3 takes the old end for the
new one's and fails the task (apache/airflow issues 67287 and 72716). Its pod would be left behind.
"""


class PodTrigger(KubernetesPodTrigger):
    """The provider's own, except that it never ends at once."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        _, values = super().serialize()
        return f"{type(self).__module__}.{type(self).__name__}", values

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await asyncio.sleep(SETTLED_SECONDS)
        async for event in super().run():
            yield event
