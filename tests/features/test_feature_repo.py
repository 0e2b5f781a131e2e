"""What ranking engineers run: the example, the checked-in feature_store.yaml, Feast's own command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hllm.features.publish import publication_folder, publish
from hllm.features.request import request_table
from hllm.features.store import describe
from hllm.features.verify import verify
from hllm.settings import Settings, load
from tests.features.world import online, register, settings_for, write_export

REPO = Path(__file__).parents[2] / "feature_repo"


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """Version 1 is champion, version 2 is registered only."""
    from hllm.registry.promote import promote

    folder = tmp_path_factory.mktemp("serving")
    settings = settings_for(folder)
    version = str(register(settings, write_export(folder / "root" / "embed-hllm-3" / "one")))
    publish(settings, version)
    verify(settings, version)
    promote(settings, version, by="a test")
    register(settings, write_export(folder / "root" / "embed-hllm-3" / "two", seed=5))
    return settings


def test_the_example_reads_online_and_point_in_time(serving):
    text = _read_features(serving, "--user", "u50", "--items", "i30", "unheard of")
    now, then = text.split("offline, hllm_v1:")
    assert "online, hllm_v1:" in now
    assert any(line.split()[1:3] == ["u50", "i30"] and "None" not in line for line in now.splitlines())
    assert any("unheard of" in line and "None" in line for line in now.splitlines())
    assert [line.count("None") for line in then.splitlines() if "u50" in line] == [0, 4]


def test_the_example_ignores_a_champion_whose_vectors_are_not_there(serving, monkeypatch):
    """Somebody moves the alias in the MLflow page."""
    import importlib.util

    from hllm.features.store import open_store
    from hllm.work.mlflow import client

    monkeypatch.syspath_prepend(REPO)
    spec = importlib.util.spec_from_file_location("read_features", REPO / "read_features.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    store = open_store(serving, mlflow=True)
    client(serving).set_registered_model_alias("hllm", "champion", "2")
    assert example.serving_service(store, "hllm") == "hllm_v1"
    client(serving).delete_registered_model_alias("hllm", "champion")
    assert example.serving_service(store, "hllm") == "hllm_v1"
    with pytest.raises(SystemExit, match="No version of unheard_of serves yet"):
        example.serving_service(store, "unheard_of")


def test_the_example_says_what_to_do_when_nothing_serves(tmp_path):
    settings = settings_for(tmp_path)
    version = register(settings, write_export(tmp_path / "root" / "embed-hllm-3" / "key"))
    publish(settings, str(version))
    done = _run_example(settings, "--user", "u50", "--items", "i30")
    assert done.returncode == 1
    assert done.stderr == "No version of hllm serves yet: approve one in Airflow, or run `hllm promote`.\n"


def test_the_example_says_so_when_the_folder_holds_no_store(tmp_path):
    command = [sys.executable, REPO / "read_features.py", "--repo", tmp_path, "--user", "u", "--items", "i"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"--repo {tmp_path}: no feature_store.yaml there" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_shipped_configuration_has_a_model_and_stores_of_its_own():
    """Otherwise a candidate is compared with the champion of another data set."""
    configs = REPO.parent / "configs"  # below them lie comparison files, each on top of one of these
    paths = [*configs.glob("*.toml"), *(configs / "experiments").glob("*.toml")]
    found = [load(path, environ={}) for path in sorted(paths)]
    assert len(found) >= 3
    for setting in (
        "mlflow.model_name",
        "feast.project",
        "feast.online_url",
        "feast.offline_path",
        "run.root",
    ):
        assert len({settings.at(setting) for settings in found}) == len(found), setting


def test_the_example_is_short():
    assert len((REPO / "read_features.py").read_text().splitlines()) <= 64


def test_a_request_is_shown_with_its_model_version(serving):
    table = request_table(serving, 1, "u50", ["i30", "unheard of"]).splitlines()
    assert table[0].split()[:2] == ["user", "item"]
    assert table[2].split()[-2:] == ["1", "1"]
    assert table[3].split()[-3:] == ["null", "1", "null"]


def test_the_checked_in_store_is_the_one_of_the_default_settings(monkeypatch):
    monkeypatch.chdir(REPO.parent)
    here = yaml.safe_load((REPO / "feature_store.yaml").read_text())
    ours = describe(Settings(), "")
    assert str((REPO / here["registry"].pop("path")).resolve()) == ours["registry"].pop("path")
    assert str((REPO / here["online_store"].pop("path")).resolve()) == ours["online_store"].pop("path")
    ours["mlflow"].pop("tracking_uri")
    assert here == ours


def test_feast_apply_deletes_nothing_that_was_published(serving):
    from feast.protos.feast.core.Registry_pb2 import Registry

    path = publication_folder(serving, 1) / "feature_store.yaml"
    command = [Path(sys.executable).parent / "feast", "--feature-store-yaml", path, "apply"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "No changes to registry" in done.stdout
    assert online(serving, 1, [("u50", "i30")])["user_vector"][0] is not None
    registry = Registry.FromString(Path(serving.feast.registry).read_bytes())
    assert [view.spec.name for view in registry.on_demand_feature_views] == ["hllm_affinity_v1"]


def _read_features(settings, *arguments: str) -> str:
    done = _run_example(settings, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def _run_example(settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        REPO / "read_features.py",
        "--repo",
        publication_folder(settings, 1),
        *arguments,
    ]
    quiet = {**os.environ, "FEAST_USAGE": "False"}
    return subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=120)
