"""What waits for pods: it comes back from Airflow's database as it was, and never ends at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock
from urllib.parse import unquote_plus

import pytest
from aiohttp import ClientConnectionError
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.triggers.base import TriggerEvent
from kubernetes_asyncio.client import ApiException
from wiring.trigger import PATIENCE_SECONDS, SETTLED_SECONDS, PodTrigger, SetTrigger


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


class Cluster:
    """The answers of a Kubernetes in which one set waits, and a clock that goes on where somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = datetime(2026, 11, 23, tzinfo=UTC), 0.0
        self.pods = AsyncMock(return_value=SimpleNamespace(items=[]))
        self.sets = AsyncMock(return_value={"metadata": {"name": "set"}})
        self.events = AsyncMock(return_value=SimpleNamespace(items=[]))
        self.delete = AsyncMock()
        self.log = MagicMock()
        core = SimpleNamespace(list_namespaced_pod=self.pods, list_namespaced_event=self.events)
        objects = SimpleNamespace(
            get_namespaced_custom_object=self.sets, delete_namespaced_custom_object=self.delete
        )
        monkeypatch.setattr("wiring.trigger.client.CoreV1Api", lambda connection: core)
        monkeypatch.setattr("wiring.trigger.client.CustomObjectsApi", lambda connection: objects)
        monkeypatch.setattr("wiring.trigger.asyncio.sleep", self.sleep)
        monkeypatch.setattr("wiring.trigger.time.monotonic", lambda: self.slept)
        clock = MagicMock(wraps=datetime)
        clock.now.side_effect = lambda zone: self.now + timedelta(seconds=self.slept)
        monkeypatch.setattr("wiring.trigger.datetime", clock)
        monkeypatch.setattr(KubernetesPodTrigger, "run", followed)

    async def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def run(self, waited: timedelta = timedelta()) -> dict[str, Any]:
        """What a trigger fires that began so long ago; one that began to wait before the triggerer did."""
        self.trigger = SetTrigger(
            pod_name="",
            pod_namespace="hllm",
            trigger_start_time=self.now - waited,
            base_container_name="base",
            schedule_timeout=3600,
            poll_interval=5,
            trigger_kwargs={"jobset": "set"},
        )

        @asynccontextmanager
        async def get_conn() -> AsyncIterator[None]:
            yield None

        self.trigger.__dict__["hook"] = SimpleNamespace(get_conn=get_conn)
        self.trigger.__dict__["_log"] = self.log

        async def events() -> list[TriggerEvent]:
            return [event async for event in self.trigger.run()]

        (event,) = asyncio.run(events())
        payload: dict[str, Any] = event.payload
        return payload


@pytest.fixture
def wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wiring.trigger.SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(KubernetesPodTrigger, "run", followed)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def kubeconfig(server: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "one", "user": "nobody"}}],
        "clusters": [{"name": "one", "cluster": {"server": server}}],
        "users": [{"name": "nobody", "user": {"token": "none"}}],
    }


def named(name: str, rank: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "annotations": {"batch.kubernetes.io/job-completion-index": rank}},
    }


async def followed(self: KubernetesPodTrigger) -> AsyncIterator[TriggerEvent]:
    yield TriggerEvent({"status": "success", "name": self.pod_name})


def pods(*ranks: str) -> SimpleNamespace:
    found = [
        SimpleNamespace(
            metadata=SimpleNamespace(
                name=f"set-node-0-{rank}-abcde",
                annotations={"batch.kubernetes.io/job-completion-index": rank},
            )
        )
        for rank in ranks
    ]
    return SimpleNamespace(items=found)


def warning(message: str, minute: int) -> SimpleNamespace:
    at = datetime(2026, 11, 23, 0, minute, tzinfo=UTC)
    return SimpleNamespace(message=message, reason="FailedCreate", last_timestamp=at, metadata=None)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@pytest.mark.usefixtures("wait_for_nobody")
def test_its_questions_are_those_of_the_api() -> None:
    """A server that answers them over HTTP: nothing yet, then trouble, then a pod."""
    asked: list[str] = []
    pods = iter([(200, []), (503, []), (200, [named("set-node-0-0-abcde", "0")])])

    class Api(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            kind = self.path.partition("?")[0].rpartition("/")[2]
            status, items = next(pods) if kind == "pods" else (200, [])
            body = json.dumps({"items": items}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    with serving(Api) as server:
        trigger = SetTrigger(
            pod_name="",
            pod_namespace="hllm",
            trigger_start_time=datetime.now(UTC),
            base_container_name="base",
            poll_interval=0.01,
            config_dict=kubeconfig(server),
            trigger_kwargs={"jobset": "set"},
        )

        async def events() -> list[TriggerEvent]:
            found = [event async for event in trigger.run()]
            await trigger.on_kill()
            return found

        (event,) = asyncio.run(events())
    assert event.payload["name"] == "set-node-0-0-abcde"
    core, sets = "/api/v1/namespaces/hllm", "/apis/jobset.x-k8s.io/v1alpha2/namespaces/hllm/jobsets/set"
    listed = f"GET {core}/pods?labelSelector=jobset.sigs.k8s.io/jobset-name in (set)"
    warned = f"GET {core}/events?fieldSelector=type=Warning,involvedObject.name=set"
    assert [unquote_plus(one) for one in asked] == [
        *(listed, f"GET {sets}", warned, f"{warned}-node-0"),
        *(listed, listed),
        f"DELETE {sets}?propagationPolicy=Background",
    ]


def test_it_waits_for_the_first_pod_of_the_set_and_follows_it(cluster: Cluster) -> None:
    cluster.pods.side_effect = [pods(), pods("1"), pods("1", "0")]
    assert cluster.run() == {"status": "success", "name": "set-node-0-0-abcde"}
    assert cluster.slept == 2 * 5 + SETTLED_SECONDS
    assert "set" in cluster.pods.call_args.kwargs["label_selector"]


def test_a_kubernetes_that_is_away_for_minutes_costs_no_place_in_the_queue(cluster: Cluster) -> None:
    away = [ClientConnectionError("reset"), ApiException(503, "starting"), ApiException(429), TimeoutError()]
    cluster.pods.side_effect = [*away * 29, pods(), *away * 29, pods("0")]
    assert cluster.run()["status"] == "success"
    assert cluster.slept > PATIENCE_SECONDS


def test_one_that_stays_away_is_given_up(cluster: Cluster) -> None:
    cluster.pods.side_effect = ApiException(503, "starting")
    found = cluster.run()
    assert (found["status"], found["name"], found["jobset"]) == ("error", "", "set")
    assert found["message"] == "could not be followed: Kubernetes answered 503: starting"
    assert PATIENCE_SECONDS < cluster.slept < PATIENCE_SECONDS + 60


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "could not be followed: Kubernetes answered 401: no"),
        (403, "could not be followed: Kubernetes answered 403: no"),
        (404, "is gone: somebody deleted it"),
    ],
)
def test_a_refusal_ends_the_wait_at_once(cluster: Cluster, status: int, message: str) -> None:
    cluster.sets.side_effect = ApiException(status, "no")
    found = cluster.run()
    assert (found["status"], found["message"]) == ("error", message)
    assert cluster.slept == SETTLED_SECONDS, "not before the scheduler saw its task wait"


def test_a_set_that_failed_before_its_first_pod_was_seen_says_why(cluster: Cluster) -> None:
    failed = {"type": "Failed", "status": "True", "message": "jobset failed due to one or more job failures"}
    cluster.pods.return_value = pods("1")
    cluster.sets.return_value = {"status": {"conditions": [failed]}}
    found = cluster.run()
    assert (found["status"], found["message"]) == ("failed", f"failed: {failed['message']}")


def test_the_wait_does_not_begin_anew_with_the_triggerer(cluster: Cluster) -> None:
    found = cluster.run(waited=timedelta(minutes=50))
    assert found["status"] == "timeout"
    assert found["message"] == "was not admitted within 1 h (runner.queue_hours)"
    assert 600 < cluster.slept < 630


def test_what_the_cluster_refuses_is_said_once_and_in_the_end(cluster: Cluster) -> None:
    quota = [warning("exceeded quota: steps", 2), warning("violates PodSecurity", 1)]
    cluster.events.return_value = SimpleNamespace(items=quota)
    found = cluster.run(waited=timedelta(minutes=50))
    assert found["message"].endswith("(runner.queue_hours): exceeded quota: steps")
    said = [call.args[-1] for call in cluster.log.warning.call_args_list]
    assert said == ["violates PodSecurity", "exceeded quota: steps"]
    asked = {call.kwargs["field_selector"] for call in cluster.events.call_args_list}
    assert asked == {f"type=Warning,involvedObject.name={name}" for name in ("set", "set-node-0")}


def test_a_person_who_ends_the_task_ends_the_set(cluster: Cluster) -> None:
    cluster.pods.return_value = pods("0")
    cluster.run()
    asyncio.run(cluster.trigger.on_kill())
    assert cluster.delete.call_args.args[-1] == "set"
