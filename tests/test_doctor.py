from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from hllm import doctor
from hllm.doctor import examine
from hllm.errors import ConfigError, InfraError
from hllm.features.stores.s3_files import require_reach
from hllm.settings import Settings
from tests.conftest import S3, free_port
from tests.features.conftest import RedisServer

Build = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _no_server_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def find(settings: Settings, what: str) -> doctor.Finding:
    """One check; those after it are not made."""
    return next(finding for finding in examine(settings) if finding.what == what)


def test_a_machine_with_everything_is_told_so(
    tiny_settings: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.doctor(tiny_settings())
    said = capsys.readouterr().out
    assert "everything that these settings need is here" in said
    for what in (
        "Python",
        "packages",
        "memory",
        "disk",
        "CPU",
        "GPU",
        "MLflow",
        "Feast registry",
        "online store",
        "offline store",
    ):
        assert what in said


def test_what_the_settings_lack_is_a_configuration_error(
    tiny_settings: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {
        "data.items": "nowhere.parquet",  # short: a cell that is wrapped splits what it says
        "hllm.user_llm": {"backbone": "package:nosuch/x.gguf"},
    }
    with pytest.raises(ConfigError, match=r"missing: data source, hllm\.user_llm") as error:
        doctor.doctor(tiny_settings(**sets))
    assert error.value.exit_code == 64
    said = capsys.readouterr().out
    assert "package nosuch is not installed" in said
    assert "no such file" in said


def test_services_that_are_away_are_an_error_that_a_retry_helps(
    tiny_settings: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:hunter2@127.0.0.1:{free_port()}")
    monkeypatch.setenv("HLLM_FEAST_PASSWORD", "swordfish")
    sets = {
        "feast.registry": f"postgresql+psycopg://hllm@127.0.0.1:{free_port()}/feast",
        "feast.online": "redis",
        "feast.online_url": f"127.0.0.1:{free_port()}",
    }
    with pytest.raises(InfraError, match="missing: MLflow, Feast registry, online store") as error:
        doctor.doctor(tiny_settings(**sets))
    assert error.value.exit_code == 75
    said = capsys.readouterr().out + str(error.value)
    assert "hunter2" not in said
    assert "swordfish" not in said


def test_s3_is_asked_for_every_bucket_in_the_settings(tiny_settings: Build, s3: S3) -> None:
    there = f"{s3.bucket('models')}/hllm"
    settings = tiny_settings(**{"run.root": there, "mlflow.artifact_root": "s3://forgotten/art"})
    found = {finding.what: finding.state for finding in examine(settings)}
    assert found["s3://models"] == "ok"
    assert found["s3://forgotten"] == "missing"


def test_the_offline_store_is_a_folder_a_bucket_or_a_database_that_answers(
    tiny_settings: Build, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = f"{s3.bucket('vectors')}/offline"
    (tmp_path / "taken").write_text("")
    for path, state, says in (
        (str(tmp_path / "new" / "offline"), "ok", "made at first use"),
        (there, "ok", f"{there} answers"),
        ("s3://forgotten/offline", "missing", "does not exist"),
        (str(tmp_path / "taken"), "missing", "is a file, not a folder"),
        (str(tmp_path / "taken" / "offline"), "missing", "is a file, not a folder"),
    ):
        found = find(tiny_settings(**{"feast.offline_path": path}), "offline store")
        assert (found.state, says in found.found) == (state, True), found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of somebody else")
    with pytest.raises(InfraError, match="pyarrow, by which Feast reads offline files, does not get there"):
        require_reach(there)
    away = {"feast.offline": "postgres", "feast.offline_path": f"hllm@127.0.0.1:{free_port()}/feast"}
    found = find(tiny_settings(**away), "offline store")
    assert (found.state, found.service) == ("missing", True)
    assert "feast.offline_path" in found.remedy


def test_a_redis_that_would_drop_vectors_is_a_setting_to_correct(
    tiny_settings: Build, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
    try:
        settings = tiny_settings(**{"feast.online": "redis", "feast.online_url": server.place})
        found = find(settings, "online store")
        assert (found.state, found.service) == ("missing", False)
        assert "maxmemory-policy is allkeys-lru" in found.found
        assert "noeviction" in found.remedy
        server.client().config_set("maxmemory-policy", "noeviction")
        assert find(settings, "online store").state == "ok"
    finally:
        server.stop()


def test_a_package_that_is_not_installed_is_named(
    tiny_settings: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.version

    def without_duckdb(name: str) -> str:
        if name == "duckdb":
            raise PackageNotFoundError(name)
        return "1.0" if name == "pyarrow" else real(name)

    monkeypatch.setattr(doctor, "version", without_duckdb)
    found = find(tiny_settings(), "packages")
    assert (found.state, found.remedy) == ("missing", "make setup")
    assert "duckdb is not installed" in found.found
    assert "pyarrow 1.0 is not >=25" in found.found


def test_too_little_memory_or_disk_is_said(tiny_settings: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMORY_GIB", 1e6)
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    assert find(tiny_settings(), "disk").state == "missing"
    assert "At least 1e+06 GiB" in find(tiny_settings(), "memory").remedy


def test_more_threads_than_cores_get_a_note(tiny_settings: Build) -> None:
    found = find(tiny_settings(**{"run.threads": 4096}), "CPU")
    assert (found.state, found.remedy) == ("note", "run.threads = 0 uses every core once.")


def test_zero_needs_deepspeed_and_on_a_cpu_a_compiler(
    tiny_settings: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, what = tiny_settings(**{"train.zero": 2}), "DeepSpeed (train.zero = 2)"
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "version", lambda name: "0.19.8")
    assert find(settings, what).state == "missing"
    assert "g++" in find(settings, what).remedy
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert find(settings, what).state == "ok"


@contextmanager
def mlflow_with_permissions(code: int, readable: bool) -> Iterator[str]:
    """What an MLflow behind a login answers: with a code to everything, or only to what changes something."""

    class Answers(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            changes = "delete" in self.path or "set-" in self.path
            status, body = 200, b"{}"
            if changes or not readable:
                status, body = code, b"Permission denied"
            elif "registered-models" in self.path:
                status, body = 404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no model"}'
            elif "get-by-name" in self.path:
                body = b'{"experiment": {"experiment_id": "1", "name": "x", "lifecycle_stage": "active"}}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = do_PATCH = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(("code", "readable"), [(401, False), (403, False), (403, True)])
def test_an_mlflow_that_refuses_says_which_credentials_to_look_at(
    tiny_settings: Build, monkeypatch: pytest.MonkeyPatch, code: int, readable: bool
) -> None:
    """Also where only changes are refused: reading alone is not enough."""
    with mlflow_with_permissions(code, readable) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        finding = find(tiny_settings(), "MLflow")
    assert finding.state == doctor.MISSING
    assert "MLflow refuses access" in finding.found
    assert "MLFLOW_TRACKING_USERNAME" in finding.remedy
    assert not finding.service  # a retry does not help


def test_asking_whether_mlflow_may_be_changed_changes_nothing(tiny_settings: Build) -> None:
    from hllm.work import mlflow as server

    settings = tiny_settings()
    client = server.client(settings)
    client.create_experiment(settings.run.name, tags={"a": "b"})
    client.create_registered_model(settings.mlflow.model_name, tags={"c": "d"})
    assert find(settings, "MLflow").state == doctor.OK
    assert client.get_experiment_by_name(settings.run.name).tags["a"] == "b"
    assert client.get_registered_model(settings.mlflow.model_name).tags == {"c": "d"}
