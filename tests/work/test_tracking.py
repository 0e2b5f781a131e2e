from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hllm.errors import ConfigError, DataError, InfraError, Terminated
from hllm.registry import versions
from hllm.settings import Mlflow, Settings
from hllm.work import mlflow as server
from hllm.work import tracking
from hllm.work.artifacts import Manifest, Store
from hllm.work.tracking import child_run
from tests.conftest import free_port
from tests.mlflow_server import Server

PIPELINE = "0123456789abcdef"


def manifest(step: str, rows: dict[str, int] | None = None, facts: dict[str, Any] | None = None) -> Manifest:
    return Manifest(
        step, "key", "s", "0.1.0", "2026-01-01T00:00:00+00:00", 2.5, "digest", rows or {}, facts or {}
    )


def runs(settings: Settings) -> tuple[list[Any], list[Any]]:
    """(parents, children), oldest first."""
    client = server.client(settings)
    experiment = client.get_experiment_by_name(settings.run.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return [run for run in found if run not in children], children


def test_steps_of_one_pipeline_share_a_parent_and_other_pipelines_have_their_own(settings: Settings) -> None:
    for pipeline, step in ((PIPELINE, "ingest"), (PIPELINE, "prepare"), ("another", "ingest")):
        with child_run(settings, pipeline, step, {}) as tracker:
            tracker.finish(manifest(step))
    parents, children = runs(settings)
    assert [run.data.tags["hllm.pipeline"] for run in parents] == [PIPELINE, "another"]
    of_first = [run for run in children if run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id]
    assert sorted(run.data.tags["hllm.step"] for run in of_first) == ["ingest", "prepare"]
    assert {run.info.status for run in children} == {"FINISHED"}


def test_a_child_holds_parameters_curves_counts_and_facts(settings: Settings) -> None:
    decided = {"data": {"columns": {"texts": ("title", "genre")}, "path": ""}, "run.seed": 17}
    with child_run(settings, PIPELINE, "train-hllm-1", decided) as tracker:
        for at in range(2500):
            tracker.log_metrics({"loss": 1 / (at + 1), "valid_ndcg@10": at}, at)
        tracker.finish(manifest("train-hllm-1", {"items": 7}, {"as_of": "1998", "loss": {"last": 0.5}}))
    child = runs(settings)[1][0]
    assert child.data.params == {
        "data.columns.texts": '["title", "genre"]',
        "data.path": '""',
        "run.seed": "17",
    }
    assert child.data.metrics["rows.items"] == 7
    assert child.data.metrics["loss/last"] == 0.5
    assert child.data.metrics["seconds"] == 2.5
    assert child.data.tags["hllm.fact.as_of"] == "1998"
    assert child.data.tags["hllm.output"] == f"{settings.run.root}/train-hllm-1/key"
    history = server.client(settings).get_metric_history(child.info.run_id, "valid_ndcg_at_10")
    assert [point.step for point in history] == list(range(2500))


def test_preparing_logs_the_data_set_as_an_input_of_child_and_parent(settings: Settings) -> None:
    with child_run(settings, PIPELINE, "prepare", {}) as tracker:
        tracker.finish(manifest("prepare", {"events": 100_000}))
    for run in (found[0] for found in runs(settings)):
        (logged,) = run.inputs.dataset_inputs
        assert logged.dataset.digest == "digest"
        assert json.loads(logged.dataset.source)["uri"] == f"{settings.run.root}/prepare/key"
        assert json.loads(logged.dataset.profile)["events"] == 100_000


def test_evaluation_puts_the_headline_numbers_on_the_parent_and_finishes_it(settings: Settings) -> None:
    figures = {"filtered": {"ndcg@10": {"value": 0.08, "low": 0.07, "high": 0.09}}}
    metrics = {"headline": "filtered", "models": {"hllm-2": {"overall": figures}}}
    folder = Store(settings.run.root).folder("evaluate", "key")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with child_run(settings, PIPELINE, "evaluate", {}) as tracker:
        tracker.finish(manifest("evaluate"))
    parent = runs(settings)[0][0]
    assert parent.data.metrics == {"hllm-2/ndcg_at_10": 0.08}
    assert parent.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (DataError("half the log is missing", remedy="Look at it."), "FAILED", "half the log is missing"),
        (ValueError("shapes\ndiffer"), "FAILED", "shapes"),
        (Terminated(), "KILLED", "stopped by a signal"),
    ],
)
def test_a_step_that_stops_says_why_and_a_later_one_revives_the_pipeline(
    settings: Settings, error: BaseException, status: str, reason: str
) -> None:
    with pytest.raises(type(error)), child_run(settings, PIPELINE, "prepare", {}):
        raise error
    parents, children = runs(settings)
    assert (children[0].info.status, children[0].data.tags["hllm.error"]) == (status, reason)
    assert parents[0].info.status == status
    with child_run(settings, PIPELINE, "prepare", {}):
        assert runs(settings)[0][0].info.status == "RUNNING"


STEP = """
import os, sys
from hllm.work.tracking import child_run
from hllm.settings import Settings
settings = Settings.model_validate_json(sys.argv[1])
with child_run(settings, sys.argv[2], sys.argv[3], {}) as tracker:
    tracker.log_metrics({"loss": 1.0}, 0)
    if sys.argv[4] == "die":
        os.kill(os.getpid(), 9)
"""


def start(settings: Settings, step: str, how: str, **environment: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", STEP, settings.model_dump_json(), PIPELINE, step, how]
    return subprocess.Popen(
        argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment
    )


def test_two_processes_on_a_new_database_share_one_parent(settings: Settings, tmp_path: Path) -> None:
    fresh = Mlflow(tracking_uri=f"sqlite:///{tmp_path / 'new' / 'm.db'}", artifact_root=str(tmp_path / "art"))
    settings = settings.model_copy(update={"mlflow": fresh})
    started = [start(settings, step, "finish") for step in ("train-hllm-1", "train-sasrec-1")]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    parents, children = runs(settings)
    assert len(parents) == 1
    assert sorted(run.data.tags["hllm.step"] for run in children) == ["train-hllm-1", "train-sasrec-1"]
    assert all("system/cpu_utilization_percentage" in run.data.metrics for run in children)


def test_a_killed_step_is_found_and_closed_by_the_next_one(settings: Settings) -> None:
    assert start(settings, "prepare", "die").wait(120) == -9
    assert runs(settings)[1][0].info.status == "RUNNING"
    with child_run(settings, PIPELINE, "prepare", {}):
        pass
    assert [run.info.status for run in runs(settings)[1]] == ["KILLED", "FINISHED"]


def test_a_step_whose_pipeline_cannot_name_its_outputs_does_not_begin(settings: Settings) -> None:
    """Nothing would keep `hllm prune` from removing what it reads."""
    with child_run(settings, "p", "train", {}) as tracker:
        tracker.client.delete_run(tracker.parent)
        with pytest.raises(ConfigError, match="must be in the 'active' state"):
            tracker.belongs_to({"prepare": "k"})


def version_from(settings: Settings, run_id: str) -> versions.VersionInfo:
    tags = {"pipeline": PIPELINE}
    return versions.VersionInfo("hllm", 7, run_id, "", "", tags, ())


def test_a_step_on_a_version_is_a_child_of_the_run_it_came_from(settings: Settings) -> None:
    with child_run(settings, PIPELINE, "evaluate", {}) as tracker:
        parent = tracker.parent
    elsewhere = settings.model_copy(update={"run": settings.run.model_copy(update={"name": "other"})})
    with tracking.version_run(elsewhere, version_from(settings, parent), "verify", {"by": "ada"}) as tracker:
        tracker.note({"hllm.checked": "all of it"})
        assert tracker.parent == parent
    parents, children = runs(settings)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert children[1].data.params == {"version": "7", "by": "ada"}
    assert children[1].data.tags["hllm.checked"] == "all of it"


def test_a_version_whose_run_somebody_deleted_can_still_be_released(settings: Settings) -> None:
    with child_run(settings, PIPELINE, "evaluate", {}) as tracker:
        deleted = tracker.parent
    server.client(settings).delete_run(deleted)
    with tracking.version_run(settings, version_from(settings, deleted), "promote", {}) as tracker:
        assert tracker.parent != deleted
    assert runs(settings)[0][0].info.status == "FINISHED"


def test_pages_of_a_local_store_are_where_somebody_shows_them(settings: Settings) -> None:
    """`make ui` takes the next free port when 5000 is taken."""
    assert server.page_root(settings) == ""
    argv = ["mlflow", "server", "--port", "5003", "--backend-store-uri", settings.mlflow.tracking_uri]
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *argv])
    try:
        assert server.page_root(settings) == "http://127.0.0.1:5003/"
    finally:
        process.kill()
        process.wait()


def test_a_deleted_experiment_is_named(settings: Settings) -> None:
    client = server.client(settings)
    client.delete_experiment(client.create_experiment("shop"))
    with (
        pytest.raises(ConfigError, match="experiment shop has been deleted"),
        child_run(settings, PIPELINE, "x", {}),
    ):
        pass


def test_the_environment_names_a_server(
    settings: Settings, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    said = start(settings, "ingest", "finish").communicate(timeout=120)[0]
    told = [line for line in said.splitlines() if not line.startswith("waiting for MLflow")]
    assert told == []  # not a word on stdout or stderr, but of a machine that is slow
    with child_run(settings, PIPELINE, "prepare", {"run.seed": 1}) as tracker:
        tracker.log_metrics({"loss": 0.25}, 3)
        tracker.finish(manifest("prepare"))
    parents, children = runs(settings)
    assert len(parents) == 1
    assert [run.data.tags["hllm.step"] for run in children] == ["ingest", "prepare"]
    assert children[1].data.metrics["loss"] == 0.25
    assert children[1].info.artifact_uri.startswith("mlflow-artifacts:/")


def test_a_server_that_is_away_stops_a_step_before_its_work(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{free_port()}")
    with pytest.raises(InfraError) as error, child_run(settings, PIPELINE, "prepare", {}):
        pytest.fail("the step must not begin")
    assert error.value.exit_code == 75
    assert "MLFLOW_TRACKING_URI" in str(error.value)
    assert "secret" not in str(error.value)


def test_commands_end_with_75_when_the_server_is_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from hllm.cli import app

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    done = CliRunner().invoke(app, ["rollback", "--set", f"run.root={tmp_path}"])
    assert done.exit_code == 75
    assert "MLflow does not answer" in done.stderr
    assert "Traceback" not in done.output


def test_a_server_that_goes_away_costs_the_record_but_not_the_work(
    settings: Settings,
    mlflow_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "AWAY_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    with child_run(settings, PIPELINE, "train-hllm-1", {}) as tracker:
        mlflow_server.stop()
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.finish(manifest("train-hllm-1"))
    assert "the record of train-hllm-1 is incomplete" in capsys.readouterr().err
