"""What waits for a pod: it comes back from Airflow's database as it was, and never ends at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.triggers.base import TriggerEvent
from wiring.trigger import SETTLED_SECONDS, PodTrigger


@pytest.fixture
def trigger() -> PodTrigger:
    return PodTrigger(
        pod_name="hllm-ingest",
        pod_namespace="hllm",
        trigger_start_time=datetime(2026, 11, 23, tzinfo=UTC),
        base_container_name="base",
        trigger_kwargs={"jobset": "set"},
    )


def test_it_comes_back_as_it_was(trigger: PodTrigger) -> None:
    path, values = trigger.serialize()
    assert path == "wiring.trigger.PodTrigger"
    assert PodTrigger(**values).serialize() == (path, values)
    assert (values["pod_name"], values["trigger_kwargs"]) == ("hllm-ingest", {"jobset": "set"})


def test_a_pod_that_has_ended_already_is_not_reported_before_the_scheduler_saw_its_task_wait(
    trigger: PodTrigger, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[object] = []

    async def sleep(seconds: float) -> None:
        order.append(seconds)

    async def ended(self: KubernetesPodTrigger) -> AsyncIterator[TriggerEvent]:
        order.append(self.pod_name)
        yield TriggerEvent({"status": "success"})

    async def events() -> list[TriggerEvent]:
        return [event async for event in trigger.run()]

    monkeypatch.setattr("wiring.trigger.asyncio.sleep", sleep)
    monkeypatch.setattr(KubernetesPodTrigger, "run", ended)
    (event,) = asyncio.run(events())
    assert event.payload == {"status": "success"}
    assert order == [SETTLED_SECONDS, "hllm-ingest"]
