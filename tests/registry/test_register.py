from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hllm.errors import DataError, GateError
from hllm.pipeline import keys, pipeline_key, steps
from hllm.plan import RELEASE, plan
from hllm.registry import register as register_module
from hllm.registry import versions
from hllm.registry.promote import promote
from hllm.registry.register import register
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work.artifacts import Store
from tests import world
from tests.conftest import free_port
from tests.mlflow_server import Server

Sets = dict[str, Any]


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_source: world.TinySource) -> Path:
    """The finished outputs of two pipelines, which differ in their seed."""
    folder = tmp_path_factory.mktemp("evaluated")
    for sets in ({}, {"run.seed": 18}):
        settings = world.tiny_settings(folder, tiny_source, **sets)
        store, all_keys = Store(settings.run.root), keys(settings)
        world.run_steps(
            settings, *(name for name in steps(settings) if not store.manifest(name, all_keys[name]))
        )
    return folder / "runs"


@pytest.fixture
def pipeline(
    tmp_path: Path, evaluated: Path, migrated: Path, tiny_source: world.TinySource
) -> Callable[..., Settings]:
    """Settings of an evaluated pipeline: `pipeline()` and, as a later one, `pipeline(**{"run.seed": 18})`."""
    shutil.copytree(evaluated, tmp_path / "runs")
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return lambda **sets: world.tiny_settings(tmp_path, tiny_source, **sets)


def publish(settings: Settings, version: int) -> None:
    """What `publish` and `verify` leave in MLflow."""
    tags = {"publication": "verified", "feast.feature_service": f"hllm_v{version}"}
    versions.set_tags(settings, version, tags)


def test_a_candidate_stands_with_everything_a_reviewer_needs(pipeline: Callable[..., Settings]) -> None:
    settings = pipeline()
    registered = register(settings)
    assert registered.version == 1
    assert registered.passed
    info = versions.registered_version(settings)
    assert info.aliases == ("candidate",)
    assert info.tags["gate"] == "passed"
    assert info.tags["publication"] == "absent"
    assert info.tags["family"] == "hllm"
    assert info.tags["width"] == "32"
    assert info.tags["pipeline"] == pipeline_key(keys(settings))
    assert info.output(settings) == ("embed-hllm-3", keys(settings)["embed-hllm-3"])
    assert len(info.tags["git_commit"]) >= 6
    for tag in ("data_digest", "settings_digest", "report"):
        assert info.tags[tag]
    for words in (
        "Gate passed",
        "| popular |",
        "SASRec",
        "[The report](#/experiments/",
        "What to look at",
        "items",
    ):
        assert words in info.description.replace("most popular", "popular"), info.description
    client = server.client(settings)
    files = {entry.path for entry in client.list_artifacts(registered.run_id)}
    assert {"report.html", "validation.json", "metrics.json"} <= files
    parent = client.get_run(registered.run_id)
    assert parent.info.status == "FINISHED"
    assert "hllm-2/ndcg_at_10" in parent.data.metrics
    assert parent.data.params["hllm.stage1.steps"] == "4"
    assert len(parent.inputs.dataset_inputs) == 1
    record = Store(settings.run.root).folder("register", info.tags["pipeline"])
    assert json.loads((record / "registered.json").read_text())["version"] == 1
    assert "<html" in (record / "report.html").read_text()


ASK = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
import hllm
histories = json.loads(sys.argv[3])
answer = model.predict(pandas.DataFrame({"history": histories}), params={"k": 4})
print(json.dumps({"answer": answer.to_dict("list"), "hllm": hllm.__file__}))
"""


def test_the_model_answers_where_hllm_is_not_installed(
    pipeline: Callable[..., Settings], tmp_path: Path, tiny_source: world.TinySource
) -> None:
    import mlflow
    import pandas as pd

    from hllm.embedding.package import Package

    settings = pipeline()
    register(settings)
    histories = [tiny_source.item_ids[:3], ["never heard of it", tiny_source.item_ids[7]]]
    server.point_fluent_at(settings)
    model = mlflow.pyfunc.load_model("models:/hllm@candidate")
    asked = pd.DataFrame({"history": histories})
    here = model.predict(asked, params={"k": 4})
    package = Package.open(versions.download_package(settings, 1))
    expected = package.recommend(histories, 4)
    assert here["item_ids"].tolist() == [[item_id for item_id, _ in row] for row in expected]
    assert not set(here["item_ids"][0]) & set(histories[0])
    assert len(model.predict(asked)["item_ids"][1]) == 10
    nobody = model.predict(pd.DataFrame({"history": [[], ["never heard of it"]]}))
    assert nobody["item_ids"].tolist() == nobody["scores"].tolist() == [[], []]
    with_history = model.predict(asked, params={"k": 60, "filter_history": False})
    assert set(histories[0]) <= set(with_history["item_ids"][0])
    # Elsewhere: the path of this checkout is hidden, so `hllm` comes out of the model itself.
    argv = ["-S", "-c", _without(Path(register_module.__file__).parents[2]) + ASK]
    argv += [settings.mlflow.tracking_uri, "models:/hllm/1", json.dumps(histories)]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "type hint" not in done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert there["answer"]["item_ids"] == here["item_ids"].tolist()
    for row, scores in enumerate(there["answer"]["scores"]):
        assert scores == pytest.approx(list(here["scores"][row]), abs=1e-5)
    assert "/code/hllm/" in there["hllm"]


def _without(checkout: Path) -> str:
    """Site packages by hand: an editable installation of `hllm` must not be seen."""
    folders = [path for path in sys.path if path.endswith("site-packages")]
    return f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(checkout)!r}] + {folders!r}\n"


def test_nothing_in_the_model_is_a_pickle(pipeline: Callable[..., Settings]) -> None:
    settings = pipeline()
    register(settings)
    folder = versions.download_package(settings, 1).parents[1]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "MLmodel" in files
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".pyc"}, path
        assert not path.read_bytes().startswith(b"\x80"), path  # how a binary pickle begins
    requirements = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("torch==") for line in requirements)
    assert all("==" in line for line in requirements)


def test_registering_twice_keeps_one_version(
    pipeline: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = pipeline()
    first = register(settings)
    capsys.readouterr()
    assert register(settings) == first
    assert "reused, hllm version 1, gate passed, waiting for a decision" in capsys.readouterr().out
    assert len(versions.all_versions(settings)) == 1


KILLED = """
import os, sys
from hllm.registry import register
from hllm.settings import Settings
real = getattr(register, sys.argv[2])
def then_die(*args, **named):
    real(*args, **named)
    os.kill(os.getpid(), 9)
setattr(register, sys.argv[2], then_die)
register.register(Settings.model_validate_json(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "last",
    [
        "log_package",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("_create", "_point_candidate", "_keep_record")
        ),
    ],
)
def test_a_registration_that_was_killed_is_completed_by_the_next(
    pipeline: Callable[..., Settings], last: str
) -> None:
    settings = pipeline()
    argv = [sys.executable, "-c", KILLED, settings.model_dump_json(), last]
    assert subprocess.run(argv, timeout=180, check=False, stdout=subprocess.DEVNULL).returncode == -9
    assert register(settings).version == 1
    info = versions.registered_version(settings)
    assert info.aliases == ("candidate",)
    assert "judged" in info.tags
    assert len(versions.all_versions(settings)) == 1
    client = server.client(settings)
    models = client.search_logged_models([client.get_run(info.run_id).info.experiment_id])
    assert len(models) == 1
    children = runs(settings, "register")
    assert [run.info.status for run in children] == (
        ["FINISHED"] if last == "_keep_record" else ["KILLED", "FINISHED"]
    )
    assert client.get_run(info.run_id).info.status == "FINISHED"


def runs(settings: Settings, step: str) -> list[Any]:
    client = server.client(settings)
    experiment = client.get_experiment_by_name(settings.run.name)
    assert experiment is not None
    return list(
        client.search_runs(
            [experiment.experiment_id], f"tags.`hllm.step` = '{step}'", order_by=["attributes.start_time ASC"]
        )
    )


def test_everything_after_the_evaluation_is_a_run_of_the_pipeline_and_in_the_plan(
    pipeline: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hllm.features.publish import publish as publish_for_real
    from hllm.features.verify import verify

    def states() -> dict[str, str]:
        capsys.readouterr()
        plan(settings)
        lines = capsys.readouterr().out.splitlines()
        found = {line.split()[0]: line for line in lines if line.split()}
        return {name: " ".join(found[name].split()[1:-2]) for name in RELEASE}

    settings = pipeline(**{"feast.verify_sample": 60})
    assert states() == {name: f"after {before}" for name, before in RELEASE.items()}
    info = register(settings)
    assert states()["register"] == "done: version 1, gate passed"
    assert states()["publish"] == "after approval"
    publish_for_real(settings)
    assert (states()["publish"], states()["verify"]) == ("done", "to do")
    verify(settings)
    assert (states()["verify"], states()["promote"]) == ("done", "to do")
    promote(settings, by="ada")
    assert states()["promote"] == "done: it serves"
    client = server.client(settings)
    for step in RELEASE:
        (run,) = runs(settings, step)
        assert run.data.tags["mlflow.parentRunId"] == info.run_id
        assert run.info.status == "FINISHED"
    assert runs(settings, "publish")[0].data.metrics["rows.users"] == 40
    assert "40 users and 60 items bit for bit" in runs(settings, "verify")[0].data.tags["hllm.checked"]
    assert runs(settings, "promote")[0].data.params["decided_by"] == "ada"
    assert client.get_run(info.run_id).info.status == "FINISHED"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    plan(settings)
    said = capsys.readouterr().out
    assert said.count("unknown") == 5
    assert "unknown: http://127.0.0.1" in said
    assert "MLflow does not answer" in said


def test_a_failed_gate_is_an_error_after_the_version_stands_and_says_why(
    pipeline: Callable[..., Settings],
) -> None:
    settings = pipeline(**{"gate.min_vs.popular": 1000.0})
    for _ in range(2):
        with pytest.raises(GateError, match="version 1 did not pass") as error:
            register(settings)
        assert error.value.exit_code == 66
    info = versions.registered_version(settings)
    assert info.tags["gate"] == "failed"
    assert "1000 x most popular" in info.tags["gate_reasons"]
    assert "Gate FAILED" in info.description
    assert info.aliases == ()
    # Another threshold is another judgement of the same version.
    assert register(pipeline()).passed
    info = versions.registered_version(settings)
    assert (info.version, info.tags["gate"], info.aliases) == (1, "passed", ("candidate",))


def test_a_later_candidate_is_compared_with_the_champion_on_its_own_events(
    pipeline: Callable[..., Settings],
) -> None:
    first = pipeline()
    publish(first, register(first).version)
    promote(first, "1", by="ada")
    second = pipeline(**{"run.seed": 18, "gate.min_vs_champion": 0.01})
    assert register(second).version == 2
    info = versions.registered_version(second)
    assert "| champion (version 1) |" in info.description
    report = Store(second.run.root).folder("register", info.tags["pipeline"]) / "report.html"
    assert "of the first ten recommendations" in report.read_text()
    assert "Nearest to well-known items" in report.read_text()
    assert "0.01 x the champion" in info.tags["gate_reasons"]
    strict = pipeline(**{"run.seed": 18, "gate.min_vs_champion": 1000.0})
    with pytest.raises(GateError, match="champion"):
        register(strict)
    assert versions.registered_version(strict, "2").aliases == ()
    champion = versions.champion(first)
    assert champion is not None
    assert champion.version == 1


def test_a_decided_version_is_left_alone(pipeline: Callable[..., Settings]) -> None:
    settings = pipeline()
    publish(settings, register(settings).version)
    promote(settings, "1", by="ada")
    before = versions.registered_version(settings)
    assert register(pipeline(**{"gate.min_vs.popular": 1000.0})).passed
    assert versions.registered_version(settings) == before


def test_a_pipeline_that_is_not_evaluated_cannot_be_registered(pipeline: Callable[..., Settings]) -> None:
    with pytest.raises(DataError, match="has no finished output"):
        register(pipeline(**{"run.seed": 99}))


@pytest.mark.slow
def test_a_server_keeps_the_model_and_hands_it_out(
    pipeline: Callable[..., Settings], mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pipeline()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    registered = register(settings)
    package = versions.download_package(settings, registered.version)
    assert (package / "user.safetensors").is_file()
    assert package.is_relative_to(settings.run.root)
    assert versions.download_package(settings, registered.version) == package
