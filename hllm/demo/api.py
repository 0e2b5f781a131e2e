"""Airflow's public REST API, as far as the demo needs it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

from hllm.demo.services import DIRECT, Airflow
from hllm.errors import ConfigError, InfraError

PATIENCE_SECONDS = 30.0
FINISHED = {"success", "failed", "skipped", "upstream_failed", "removed"}


class Api:
    """Requests in the name of one user of this Airflow."""

    def __init__(self, airflow: Airflow, user: str = "admin") -> None:
        self.url = airflow.url
        passwords = json.loads(airflow.passwords.read_text("utf-8"))
        if user not in passwords:
            raise ConfigError(
                f"this Airflow knows no user {user!r}",
                where=self.url,
                remedy="Stop `make ui` and start it with the same settings.",
            )
        self._token = ""
        self._token = self.post("/auth/token", {"username": user, "password": passwords[user]})[
            "access_token"
        ]

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, body)

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("PATCH", path, body)

    def trigger(self, dag: str, conf: dict[str, Any]) -> str:
        """Start a run; returns its id. Waits for the DAG processor to have read the DAG."""
        self._wait_for_dag(dag)
        return str(
            self.post(f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
        )

    def active_runs(self, dag: str) -> list[str]:
        """Runs that have not ended. Waits for the DAG processor to have read the DAG."""
        self._wait_for_dag(dag)
        found = self.get(f"/api/v2/dags/{dag}/dagRuns?state=running&state=queued&limit=100")["dag_runs"]
        return [str(run["dag_run_id"]) for run in found]

    def give_up(self, dag: str, run: str) -> None:
        """Mark a run as failed, so that the next one may start."""
        self.patch(f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}", {"state": "failed"})

    def run_state(self, dag: str, run: str) -> str:
        return str(self.get(f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}")["state"])

    def tasks(self, dag: str, run: str) -> list[dict[str, Any]]:
        found = self.get(f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances?limit=100")
        return list(found["task_instances"])

    def task_state(self, dag: str, run: str, task: str) -> str:
        path = f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances/{task}"
        return str(self.get(path)["state"])

    def ended(self, dag: str, run: str, task: str) -> dict[str, Any]:
        """How a task's command ended: `exit_code` and `line`; empty when it left nothing."""
        try:
            entry = self.get(
                f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances/{task}"
                "/xcomEntries/ended?deserialize=true"
            )
        except ConfigError:
            return {}
        value = entry.get("value")
        return value if isinstance(value, dict) else {}

    def runs_started_by(self, dag: str, source_run: str) -> list[str]:
        """Runs of a DAG that an asset event of another run has started."""
        found = []
        for run in self.get(f"/api/v2/dags/{dag}/dagRuns?limit=20&order_by=-run_after")["dag_runs"]:
            events = self.get(
                f"/api/v2/dags/{dag}/dagRuns/{quote(run['dag_run_id'], safe='')}/upstreamAssetEvents"
            )["asset_events"]
            if any(event.get("source_run_id") == source_run for event in events):
                found.append(str(run["dag_run_id"]))
        return found

    def approve(self, dag: str, run: str, task: str, note: str) -> None:
        path = f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances/{task}/-1/hitlDetails"
        self.patch(path, {"chosen_options": ["Approve"], "params_input": {"note": note}})

    def _wait_for_dag(self, dag: str) -> None:
        deadline = time.monotonic() + 180  # the files are read one after another
        while True:
            try:
                if not self.get(f"/api/v2/dags/{dag}")["is_stale"]:
                    return
            except ConfigError:
                pass
            errors = self.get("/api/v2/importErrors")["import_errors"]
            if errors:
                lines = errors[0]["stack_trace"].strip().splitlines()
                raise ConfigError(lines[-1], where=errors[0]["filename"])
            if time.monotonic() > deadline:
                raise InfraError(f"{dag} was not read by the DAG processor", where=self.url)
            time.sleep(0.5)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """
        Raises:
            ConfigError: Airflow refuses the request.
            InfraError: Airflow does not answer.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            request = urllib.request.Request(f"{self.url}{path}", method=method)  # noqa: S310 - our own loopback URL
            request.add_header("Content-Type", "application/json")
            if self._token:
                request.add_header("Authorization", f"Bearer {self._token}")
            data = json.dumps(body).encode() if body is not None else None
            try:
                with DIRECT.open(request, data, timeout=20) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                detail = error.read().decode("utf-8", "replace")[:500]
                # A database busy with the scheduler's write is no reason to give up; reads can be repeated.
                if error.code < 500 or method != "GET" or time.monotonic() > deadline:
                    kind = InfraError if error.code >= 500 else ConfigError
                    raise kind(
                        f"{method} {path} was answered with {error.code}: {detail}", where=self.url
                    ) from None
            except OSError as error:
                if method != "GET" or time.monotonic() > deadline:
                    raise InfraError(f"{method} {path}: {error}", where=self.url) from None
            time.sleep(0.5)
