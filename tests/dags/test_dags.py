"""The DAG files as Airflow reads them: in a process of its own, so that what they import is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hllm.pipeline import steps
from hllm.settings import load

ROOT = Path(__file__).resolve().parents[2]

READ = """
import json, sys, time
import airflow.sdk, airflow.providers.standard.operators.hitl
from airflow.dag_processing.dagbag import DagBag
began = time.process_time()
bag = DagBag(dag_folder=sys.argv[1], collect_dags=True)
seconds = time.process_time() - began
print(json.dumps({
    "seconds": seconds,
    "errors": {str(path): str(error) for path, error in bag.import_errors.items()},
    "heavy": sorted({"torch", "pandas", "mlflow", "feast", "pyarrow", "transformers", "wiring.pod",
                     "airflow.providers.cncf.kubernetes.operators.pod"} & set(sys.modules)),
    "dags": {
        name: {
            "tasks": list(dag.task_dict),
            "upstream": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
            "command": {task.task_id: getattr(task, "command", None) for task in dag.tasks},
            "retries": {task.task_id: task.retries for task in dag.tasks},
            "outlets": {task.task_id: [asset.uri for asset in task.outlets] for task in dag.tasks},
            "inlets": {task.task_id: [asset.uri for asset in task.inlets] for task in dag.tasks},
            "params": {
                key: dag.params.get_param(key).schema | {"value": dag.params.get_param(key).value}
                for key in dag.params
            },
            "schedule": str(getattr(dag.timetable, "asset_condition", "")),
            "at_once": dag.max_active_tasks,
            "paused": dag.is_paused_upon_creation,
        }
        for name, dag in bag.dags.items()
    },
}))
"""


def read_dags(home: Path, folder: Path = ROOT / "dags", config: str = "configs/demo.toml") -> dict[str, Any]:
    environment = {**os.environ, "AIRFLOW_HOME": str(home), "HLLM_CONFIG": config}
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_dags(tmp_path_factory.mktemp("airflow"))


def test_the_dags_parse_and_nothing_else_is_taken_for_one(found: dict[str, Any]) -> None:
    assert found["errors"] == {}
    assert sorted(found["dags"]) == ["hllm_items", "hllm_release", "hllm_train", "hllm_users", "hllm_watch"]


def test_parsing_is_cheap_and_imports_nothing_heavy(found: dict[str, Any]) -> None:
    assert found["heavy"] == []
    assert found["seconds"] < 5  # of CPU, about 0.3; the limit only catches work at import time


def test_hllm_train_is_the_pipeline_and_then_register(found: dict[str, Any]) -> None:
    pipeline = steps(load(ROOT / "configs/demo.toml"))
    train = found["dags"]["hllm_train"]
    assert train["tasks"] == [*pipeline, "register"]
    for name, step in pipeline.items():
        assert train["command"][name] == list(step.argv)
        assert set(train["upstream"][name]) == set(step.needs)
    assert train["upstream"]["register"] == ["evaluate"]
    assert train["command"]["register"] == ["register"]


def test_tasks_are_wired_by_assets(found: dict[str, Any]) -> None:
    train, release = found["dags"]["hllm_train"], found["dags"]["hllm_release"]
    assert train["outlets"]["prepare"] == ["hllm://movielens-100k/prepare"]
    assert train["inlets"]["prepare"] == train["outlets"]["validate"]
    assert train["outlets"]["register"] == ["hllm://candidate/"]
    assert "hllm_candidate" in release["schedule"] or "hllm://candidate" in release["schedule"]


def test_a_release_is_a_decision_with_a_branch_for_either_answer(found: dict[str, Any]) -> None:
    release = found["dags"]["hllm_release"]
    assert release["upstream"] == {
        "approve": [],
        "publish": ["approve"],
        "verify": ["publish"],
        "promote": ["verify"],
        "reject": ["approve"],
    }
    for name in ("publish", "verify", "promote", "reject"):
        assert release["command"][name] == [name]


def test_what_serves_is_refreshed_and_watched_when_somebody_switches_it_on(found: dict[str, Any]) -> None:
    for kind in ("items", "users"):
        dag = found["dags"][f"hllm_{kind}"]
        assert dag["upstream"] == {"ingest": [], "validate": ["ingest"], f"refresh-{kind}": ["validate"]}
        assert dag["command"][f"refresh-{kind}"] == ["refresh", kind]
        assert set(dag["retries"].values()) == {6}  # they may meet each other
        assert dag["paused"]
    assert found["dags"]["hllm_watch"]["command"] == {"watch": ["watch"]}


def test_the_form_offers_settings_with_their_own_limits_and_leaves_them_alone_when_empty(
    found: dict[str, Any],
) -> None:
    params = found["dags"]["hllm_train"]["params"]
    assert params["config"]["value"] == "configs/demo.toml"
    lr = params["hllm.stage1.lr"]
    assert lr["value"] is None
    assert lr["type"] == ["null", "number"]
    assert lr["exclusiveMinimum"] == 0
    assert all(param["value"] is None for name, param in params.items() if name != "config")


def test_the_settings_decide_retries_and_how_much_runs_at_once(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(
        '[run]\nname = "a b"\n[model]\nfamily = "sasrec"\n[runner]\nretries = 3\nparallel_steps = 2\n'
    )
    train = read_dags(tmp_path / "home", config=str(config))["dags"]["hllm_train"]
    assert train["at_once"] == 2
    assert train["retries"]["ingest"] == 3
    assert "embed-sasrec-3" in train["tasks"]
    assert "embed-hllm-3" not in train["tasks"]
    assert train["outlets"]["ingest"] == ["hllm://a%20b/ingest"]


def test_a_wrong_settings_file_is_an_import_error_that_names_the_key(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[hllm.stage1]\nbatchsize = 3\n")
    errors = read_dags(tmp_path / "home", config=str(config))["errors"]
    assert len(errors) == 5
    assert all("Did you mean hllm.stage1.batch_size?" in error for error in errors.values())


def test_airflow_rules_of_ruff_find_nothing() -> None:
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [str(ruff), "check", "--select", "AIR3", "--no-cache", "dags"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
