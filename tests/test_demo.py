"""`make demo` and `make ui`: the processes they start and end, what they print, and (slow) all of it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hllm.demo import services, summary
from hllm.demo.services import end_leftovers, free_port, processes, running_airflow
from hllm.errors import ConfigError, InfraError
from hllm.settings import Release, Settings

FAMILY = """
import subprocess, time
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""


def wait_for(what: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def child_of(log: Path) -> int:
    return int(wait_for(lambda: log.exists() and log.read_text().strip()))


def test_children_and_their_children_end_with_the_block(tmp_path: Path) -> None:
    with processes(tmp_path) as group:
        head = group.start("family", [sys.executable, "-c", FAMILY], dict(os.environ))
        grandchild = child_of(tmp_path / "family.log")
        assert alive(grandchild)
    assert not alive(head.pid)
    assert not alive(grandchild)
    assert list(tmp_path.glob("*.json")) == []


def test_a_process_that_ends_by_itself_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with processes(tmp_path) as group:
        group.start(
            "scheduler",
            [sys.executable, "-c", "print('no space left'); raise SystemExit(3)"],
            dict(os.environ),
        )
        with pytest.raises(InfraError, match=r"scheduler ended with 3\n  no space left"):
            group.wait_for("Airflow", lambda: False, seconds=20)


def test_sigterm_ends_everything_and_what_kill_9_leaves_the_next_run_ends(tmp_path: Path) -> None:
    code = f"""
import sys, os, time
from pathlib import Path
from hllm.demo.services import processes
with processes(Path({str(tmp_path)!r})) as group:
    group.start("family", [sys.executable, "-c", {FAMILY!r}], dict(os.environ))
    time.sleep(60)
"""
    for number, leftovers in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        owner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        grandchild = child_of(tmp_path / "family.log")
        assert end_leftovers(tmp_path) == 0  # its owner lives
        owner.send_signal(number)
        owner.wait(30)
        assert alive(grandchild) == bool(leftovers)
        assert end_leftovers(tmp_path) == leftovers
        assert not alive(grandchild)
        (tmp_path / "family.log").unlink()


def test_an_occupied_port_is_left_to_its_owner() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wish = taken.getsockname()[1]
        assert free_port(wish) > wish


def test_an_airflow_whose_starter_is_gone_is_not_found(tmp_path: Path) -> None:
    assert running_airflow(tmp_path) is None
    (tmp_path / "running.json").write_text(
        json.dumps({"url": "http://127.0.0.1:1", "home": str(tmp_path), "pid": os.getpid(), "started": 1.0})
    )
    assert running_airflow(tmp_path) is None


def test_passwords_are_for_their_owner_only_and_stay_the_same(tmp_path: Path) -> None:
    settings, path = Settings(release=Release(approved_by="make demo")), tmp_path / "passwords.json"
    services._write_passwords(path, settings)
    first = json.loads(path.read_text())
    assert set(first) == {"admin", "make demo"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    services._write_passwords(path, settings)
    assert json.loads(path.read_text()) == first


def test_a_name_that_airflow_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"release.approved_by: must be a name without commas and colons"):
        services._users(Settings(release=Release(approved_by="a,b:admin")))


def test_airflow_is_bound_to_loopback_and_obeys_no_foreign_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "True")
    environment = services.airflow_environment(Settings(), "a.toml", tmp_path, "http://127.0.0.1:8080")
    assert environment["AIRFLOW__CORE__LOAD_EXAMPLES"] == "False"
    assert environment["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:8080/execution/"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_the_comparison_shows_every_model_on_the_same_events() -> None:
    def figures(value: float) -> dict[str, Any]:
        figure = {"value": value, "low": value / 2, "high": value * 2}
        return {"overall": {"filtered": dict.fromkeys(summary.METRICS, figure)}}

    models = {
        "popular": figures(0.04),
        "sasrec-1": figures(0.08),
        "hstu-1": figures(0.07),
        "hllm-1": figures(0.05),
        "hllm-2": figures(0.09),
    }
    asked = {"candidate": "hllm-2", "headline": "filtered", "rows": 943, "catalogue": 1682}
    text = summary.comparison({**asked, "models": models})
    assert "943 held-out events, ranked among all 1,682 items" in text
    assert re.search(r"HLLM stage 2 +0.0900 \[0.0450, 0.1800\]", text)
    assert [line.split("  ")[0] for line in text.splitlines()[3:]] == [
        *("HLLM stage 2", "HLLM stage 1", "SASRec", "HSTU", "Most popular")
    ]


def test_a_user_is_shown_with_what_they_really_chose() -> None:
    items = [{"item_id": str(n), "title": f"Film {n}"} for n in range(5)]
    example = {"user_id": "7", "history": items, "recommended": items, "chosen": items[3], "rank": 1204}
    text = summary.about_user(example)
    assert "user 7" in text
    assert "Film 0; Film 1; Film 2; Film 3; Film 4" in text
    assert text.endswith("really chose  Film 3 (ranked 1,204)")


TINY = """
[run]
name = "tiny demo"
root = "{folder}/runs"
threads = 1
[data]
source = "table"
items = "{source.items}"
interactions = "{source.interactions}"
columns = {{texts = ["title", "genre"]}}
[prepare]
prompt = ""
max_tokens = 64
[model]
baselines = ["sasrec"]
[hllm]
item_llm = {{width = 32, layers = 1}}
user_llm = {{width = 32, layers = 1}}
stage1 = {{steps = 4, batch_size = 8}}
stage2 = {{steps = 4, batch_size = 8}}
[sasrec]
width = 32
layers = 1
stage1 = {{steps = 4, batch_size = 8}}
[gate]
min_vs = {{popular = 0.0}}
[evaluation]
bootstrap = 20
[mlflow]
tracking_uri = "sqlite:///{folder}/mlflow.db"
artifact_root = "{folder}/mlflow"
[feast]
registry = "{folder}/feast/registry.db"
online_url = "{folder}/feast/online.db"
offline_path = "{folder}/feast/offline"
verify_sample = 20
[release]
approve_automatically = true
approved_by = "the demo's test"
"""


def test_the_demo_trains_releases_and_reuses_with_a_real_airflow(tmp_path: Path, tiny_source: Any) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.format(folder=tmp_path, source=tiny_source))
    argv = [sys.executable, "-m", "hllm.demo", "-c", str(config), "--home", str(tmp_path / "airflow")]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("AIRFLOW", "HLLM_", "MLFLOW_"))
    }

    first = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("ingest", "train-hllm-2", "evaluate", "register", "publish", "verify", "promote"):
        assert re.search(rf"^  {name} +[\d.]+ s  ", first.stdout, re.M), first.stdout
    assert 'in the name "the demo\'s test"' in first.stdout
    assert "Most popular" in first.stdout
    assert "really chose" in first.stdout
    assert "ranking request reads from Feast, version 1" in first.stdout
    assert re.search(r"^MLflow +http://127\.0\.0\.1:\d+/#/models/", first.stdout, re.M), first.stdout

    second = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    for name in ("ingest", "train-hllm-1", "train-hllm-2", "evaluate"):
        assert re.search(rf"^  {name} +[\d.]+ s  reused", second.stdout, re.M), second.stdout
    assert "this version serves already" in second.stdout
    assert not [each for each in psutil.process_iter(["environ"]) if _belongs(each, tmp_path)]


def _belongs(process: psutil.Process, folder: Path) -> bool:
    environment = process.info["environ"] or {}
    return str(environment.get("AIRFLOW_HOME", "")) == str(folder / "airflow")
