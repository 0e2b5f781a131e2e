"""`hllm prune` removes what nobody needs and nothing else: in a folder and in S3, with a real MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hllm.errors import ConfigError, DataError
from hllm.features.refresh import refresh
from hllm.features.refreshed import refreshed
from hllm.features.verify import verify
from hllm.pipeline import PRUNED, execute, keys, pipeline_key
from hllm.prune import prune
from hllm.registry.register import _keep_record
from hllm.registry.versions import registered_version
from hllm.settings import Settings
from hllm.work import mlflow as server
from hllm.work import tracking
from hllm.work.artifacts import Manifest, Store, digest_of, file_digests
from hllm.work.objects import is_s3, list_objects, write_object
from tests.conftest import S3
from tests.features.refreshing import catalogue, go_on, serve
from tests.test_cli import HLLM, apart
from tests.world import toml, write_tiny_source

KEEP = 14


@pytest.fixture(params=["folder", "s3"])
def settings(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    migrated: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    sets = {}
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        sets["run.root"] = s3.bucket(f"prune-{digest_of(str(tmp_path))}")
    return tiny_settings(**sets)


def output(settings: Settings, step: str, key: str, days: float = 40, run: str = "") -> tuple[str, str]:
    """A finished output, made so many days ago."""
    store = Store(settings.run.root)
    folder = store.folder(step, key)
    folder.mkdir(parents=True)
    (folder / "interactions.parquet").write_bytes(b"x" * 1000)
    files = file_digests(folder)
    made = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    facts = {"run": run} if run else {}
    store.finish(Manifest(step, key, "", "0", made, 1.0, digest_of(files), {}, facts, files))
    return step, key


def settings_of_another_source(settings: Settings, folder: Path) -> Settings:
    """The same, of another log; under the same root and in the same MLflow."""
    other = write_tiny_source(folder / "other", seed=6)
    changed = {"items": str(other.items), "interactions": str(other.interactions)}
    return settings.model_copy(update={"data": settings.data.model_copy(update=changed)})


def left(settings: Settings) -> set[tuple[str, str]]:
    store = Store(settings.run.root)
    return {(step, one.key) for step in (*PRUNED, "train-hllm-1") for one in store.finished(step)}


def bytes_left(settings: Settings, step: str, key: str) -> int:
    """Whatever is there under its name, with or without a manifest, here and in S3."""
    store = Store(settings.run.root)
    here = list(store.folder(step, key).rglob("*"))
    there = list_objects(f"{store.location(step, key)}/") if is_s3(settings.run.root) else []
    return len(here) + len(there)


def pipeline(
    settings: Settings, name: str, outputs: dict[str, str], days: float = 40, runs: bool = False
) -> str:
    """A pipeline in MLflow with one step, which began so many days ago, and ended then or still runs."""
    client = server.client(settings)
    parent = tracking.parent_run(client, settings, name)
    tracking.log_tags(client, parent, {f"{tracking.OUTPUT_TAG}{step}": key for step, key in outputs.items()})
    experiment = client.get_run(parent).info.experiment_id
    at = int((datetime.now(UTC) - timedelta(days=days)).timestamp() * 1000)
    tags = {tracking.PARENT_TAG: parent, "hllm.step": "train-hllm-1"}
    run = client.create_run(experiment, start_time=at, tags=tags).info.run_id
    if not runs:
        client.set_terminated(run, "FINISHED", end_time=at)
    return parent


def register(settings: Settings, run_id: str, name: str, model: str = "hllm") -> int:
    """What `hllm register` leaves of a pipeline."""
    client, store = server.client(settings), Store(settings.run.root)
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    export = store.location("embed-hllm-3", f"export-of-{name}")
    tags = {"export": export, "pipeline": name, "report": "runs:/report.html"}
    version = client.create_model_version(model, source=export, run_id=run_id, tags=tags).version
    if model == settings.mlflow.model_name:
        _keep_record(settings, store, registered_version(settings, str(version)))
    return int(version)


def test_what_nobody_needs_goes_and_all_else_stays(settings: Settings, capsys: pytest.CaptureFixture[str]):
    own = keys(settings)
    kept = {
        output(settings, "ingest", own["ingest"]),
        output(settings, "ingest", "young", days=KEEP - 1),
        output(settings, "ingest", "newest", days=0),
        output(settings, "validate", "newest-of-the-shop", days=30, run="shop"),
        output(settings, "validate", "newest-of-the-books", days=35, run="books"),
        output(settings, "prepare", "of-the-champion"),
        output(settings, "validate", "of-the-champion", run="shop"),
        output(settings, "prepare", "of-a-retired-version-of-another-model"),
        output(settings, "prepare", "of-a-training-that-runs"),
        output(settings, "prepare", "of-an-evaluation-of-yesterday"),
        output(settings, "prepare", "newest", days=20),
        output(settings, "train-hllm-1", "of-nobody"),
    }
    champion = {"validate": "of-the-champion", "prepare": "of-the-champion"}
    register(settings, pipeline(settings, "one", champion), "one")
    retired = {"prepare": "of-a-retired-version-of-another-model"}
    register(settings, pipeline(settings, "two", retired), "two", model="films")
    pipeline(settings, "three", {"prepare": "of-a-training-that-runs"}, runs=True)
    pipeline(settings, "four", {"prepare": "of-an-evaluation-of-yesterday"}, days=1)
    pipeline(settings, "five", {"prepare": "of-a-pipeline-long-ago"})
    gone = {
        output(settings, "ingest", "hour-1"),
        output(settings, "ingest", "hour-2"),
        output(settings, "validate", "hour-1-of-the-shop", run="shop"),
        output(settings, "prepare", "of-a-pipeline-long-ago"),
    }

    assert {(one.step, one.key) for one in prune(settings, KEEP, dry_run=True)} == gone
    said = capsys.readouterr().out
    assert "would free 0.0 MB, 4 outputs" in said
    assert "hour-1-of-the-shop" in said
    assert left(settings) == kept | gone

    assert {(one.step, one.key) for one in prune(settings, KEEP)} == gone
    said = capsys.readouterr().out
    assert "kept 11: " in said
    for reason in ("3 of registered versions", "2 of pipelines at work", "1 of these settings", "1 younger"):
        assert reason in said
    assert left(settings) == kept
    assert [bytes_left(settings, *one) for one in gone] == [0] * len(gone)
    assert prune(settings, KEEP) == []


def test_what_is_being_written_is_left_alone(settings: Settings, capsys: pytest.CaptureFixture[str]):
    output(settings, "ingest", "old")
    output(settings, "ingest", "written-anew")
    output(settings, "ingest", "newest", days=30)
    pipeline(settings, "long-ago", {"ingest": "old"})
    hold = (
        "import sys; from hllm.work.artifacts import Store\n"
        "with Store(sys.argv[1]).lock('ingest', 'written-anew'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", hold, settings.run.root]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert [one.key for one in prune(settings, KEEP)] == ["old"]
    finally:
        holder.communicate("")
    assert "left alone: " in capsys.readouterr().err
    assert left(settings) == {("ingest", "written-anew"), ("ingest", "newest")}


def test_runs_of_killed_processes_that_nobody_repeats_are_ended(settings: Settings):
    """So that `hllm watch` does not stay red for ever, and what they read goes one day."""
    client, store = server.client(settings), Store(settings.run.root)
    elsewhere = settings.model_copy(update={"run": settings.run.model_copy(update={"root": "/elsewhere"})})
    parents = {
        "lost": pipeline(settings, "lost", {"train-hllm-1": "lost"}, runs=True),
        "at work": pipeline(settings, "at work", {"train-hllm-1": "held"}, runs=True),
        "young": pipeline(settings, "young", {"train-hllm-1": "young"}, days=3, runs=True),
        "of others": pipeline(elsewhere, "of others", {"train-hllm-1": "theirs"}, runs=True),
    }

    def running() -> set[str]:
        experiments = [each.experiment_id for each in client.search_experiments()]
        children = client.search_runs(experiments, "tags.`hllm.step` LIKE '%' AND status = 'RUNNING'")
        of = {run.data.tags[tracking.PARENT_TAG] for run in children}
        return {name for name, parent in parents.items() if parent in of}

    prune(settings, KEEP, dry_run=True)
    assert running() == parents.keys()
    with store.lock("train-hllm-1", "held"):
        prune(settings, KEEP)
    assert running() == parents.keys() - {"lost"}
    assert client.get_run(parents["lost"]).info.status == "KILLED"
    assert client.get_run(parents["at work"]).info.status == "RUNNING"


def test_a_full_disk_gets_room(tmp_path: Path, tiny_settings: Callable[..., Settings], migrated: Path):
    """Outputs and MLflow's database on one disk, on which nothing can be written any more."""
    full, start = tmp_path / "full", tmp_path / "start"
    settings = tiny_settings(**{"run.root": str(start / "runs")})
    output(settings, "ingest", "old")
    output(settings, "ingest", "newest", days=30)
    shutil.copy(migrated, start / "mlflow.db")
    moved = {"run.root": str(full / "runs"), "mlflow.tracking_uri": f"sqlite:///{full}/mlflow.db"}
    before = moved | {"mlflow.tracking_uri": f"sqlite:///{start}/mlflow.db"}
    pipeline(tiny_settings(**before), "long-ago", {"ingest": "old"})
    (tmp_path / "hllm.toml").write_text(toml(tiny_settings(**moved).model_dump(mode="json")))
    script = (
        'mount -t tmpfs -o size=8m none "$1" && cp -r "$2"/. "$1" && cat /dev/zero 2>/dev/null >"$1/rest"\n'
        '"$3" prune --config "$4" && ls "$1/runs/ingest"'
    )
    done = apart(full, script, str(full), str(start), HLLM, str(tmp_path / "hllm.toml"))
    assert "freed 0.0 MB, 1 outputs" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "newest"


def test_an_mlflow_that_does_not_know_the_versions_of_these_outputs_is_refused(
    settings: Settings, migrated: Path, tmp_path: Path
):
    there = {output(settings, "prepare", "of-version-1"), output(settings, "prepare", "newest", days=20)}
    run = pipeline(settings, "one", {"prepare": "of-version-1"})
    version = register(settings, run, "one")
    pipeline(settings, "two", {"prepare": "newest"})

    other = tmp_path / "other.db"
    shutil.copy(migrated, other)
    wrong = settings.mlflow.model_copy(update={"tracking_uri": f"sqlite:///{other}"})
    with pytest.raises(ConfigError, match="does not know what hllm version 1 was made from"):
        prune(settings.model_copy(update={"mlflow": wrong}), KEEP)
    assert left(settings) == there

    client = server.client(settings)
    client.delete_model_version("hllm", str(version))
    assert prune(settings, KEEP) == []  # its run is still there, and says what it was made from
    client.delete_run(run)
    assert [one.key for one in prune(settings, KEEP)] == ["of-version-1"]


def test_an_mlflow_that_knows_none_of_these_outputs_is_refused(
    settings: Settings, migrated: Path, tmp_path: Path
):
    """Such as the new, empty one of a cron job that was not told of the server; nothing is registered yet."""
    there = {output(settings, "prepare", "read-now"), output(settings, "prepare", "newest", days=20)}
    pipeline(settings, "training", {"prepare": "read-now"}, runs=True)

    shutil.copy(migrated, tmp_path / "other.db")
    wrong = settings.mlflow.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/other.db"})
    asked = settings.model_copy(update={"mlflow": wrong})
    for _ in ("an empty one", "one of another root with the same source"):
        for dry_run in (True, False):
            with pytest.raises(ConfigError, match="no pipeline in it has made any of the outputs"):
                prune(asked, KEEP, dry_run)
        run = asked.run.model_copy(update={"root": str(tmp_path / "another")})
        pipeline(asked.model_copy(update={"run": run}), "training", {"prepare": "read-now"})
    assert left(settings) == there

    assert prune(settings, KEEP) == []
    assert left(settings) == there


def test_versions_of_others_in_the_same_mlflow_are_no_matter(settings: Settings):
    output(settings, "prepare", "old")
    output(settings, "prepare", "newest", days=20)
    pipeline(settings, "long-ago", {"prepare": "old"})
    client = server.client(settings)
    client.create_registered_model("theirs")
    theirs = client.create_run(client.create_experiment("theirs")).info.run_id
    elsewhere = {"export": "s3://elsewhere/embed-hllm-3/k", "pipeline": "p"}
    for tags in ({"export": "onnx"}, {"export": f"{settings.run.root}/theirs/k"}, elsewhere):
        client.create_model_version("theirs", source="s3://x/y", run_id=theirs, tags=tags)
        client.create_model_version("theirs", source="s3://x/y", tags=tags)
    assert [one.key for one in prune(settings, KEEP, dry_run=True)] == ["old"]

    # One of these outputs whose run does not say what it was made from, as of an earlier release.
    version = register(settings, theirs, "films", model="films")
    with pytest.raises(ConfigError, match="does not know what films version 1 was made from"):
        prune(settings, KEEP)
    client.delete_model_version("films", str(version))
    version = register(settings, theirs, "one")
    with pytest.raises(ConfigError, match="does not know what hllm version 1 was made from") as error:
        prune(settings, KEEP)
    assert "delete it in MLflow, and its folder" in str(error.value)
    client.delete_model_version("hllm", str(version))
    with pytest.raises(ConfigError, match="does not know what hllm version 1 was made from"):
        prune(settings, KEEP)  # it is still recorded beside the outputs
    assert len(left(settings)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"model": "hllm"}'])
def test_a_damaged_record_of_a_version_is_named_and_nothing_goes(settings: Settings, content: str):
    output(settings, "prepare", "old")
    output(settings, "prepare", "newest", days=20)
    pipeline(settings, "long-ago", {"prepare": "old"})
    store = Store(settings.run.root)
    if store.remote:
        write_object(f"{store.root}/register/p/registered.json", content.encode())
    else:
        (store.local / "register" / "p").mkdir(parents=True)
        (store.local / "register" / "p" / "registered.json").write_text(content)
    with pytest.raises(DataError, match=r"register/p/registered\.json: is damaged"):
        prune(settings, KEEP)
    assert len(left(settings)) == 2


def test_what_a_pipeline_has_only_reused_stays(settings: Settings, tmp_path: Path):
    """Its first steps found all done, so MLflow knows of no run; its training waits in a queue."""
    first = settings_of_another_source(settings, tmp_path)
    own = [output(first, step, keys(first)[step]) for step in PRUNED]
    newer = [output(settings, step, "newest", days=30) for step in PRUNED]
    pipeline(settings, "long-ago", {"ingest": "newest"})
    assert len(prune(settings, KEEP, dry_run=True)) == 3
    assert all(execute(step, first).reused for step in PRUNED)
    assert prune(settings, KEEP) == []
    assert left(settings) == {*own, *newer}


def test_inputs_stay_while_a_step_fetches_them(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is not in MLflow yet."""
    first = settings_of_another_source(settings, tmp_path)
    output(first, "ingest", keys(first)["ingest"])
    output(settings, "ingest", "newest", days=30)
    pipeline(settings, "long-ago", {"ingest": "newest"})
    assert len(prune(settings, KEEP, dry_run=True)) == 1

    class Fetching(Exception):
        pass

    def fetch(*_: object) -> None:
        assert prune(settings, KEEP) == []
        raise Fetching

    monkeypatch.setattr("hllm.pipeline._fetch", fetch)
    with pytest.raises(Fetching):
        execute("validate", first)


def test_each_is_looked_at_again_before_it_goes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for key in ("old", "needed", "made-anew"):
        output(settings, "ingest", key)
    output(settings, "ingest", "newest", days=30)
    pipeline(settings, "long-ago", {"ingest": "old"})
    store = Store(settings.run.root)

    def meanwhile(*_: object) -> None:
        store.use("ingest", "needed")
        store.forget("ingest", "made-anew")
        output(settings, "ingest", "made-anew", days=0)

    monkeypatch.setattr("hllm.prune.require_known", meanwhile)
    assert [one.key for one in prune(settings, KEEP)] == ["old"]
    assert left(settings) == {("ingest", key) for key in ("needed", "made-anew", "newest")}
    said = capsys.readouterr().err
    assert "ingest/needed: a step has come to need it meanwhile" in said
    assert "ingest/made-anew: it was made anew, or removed, meanwhile" in said


def test_a_link_is_left_alone(
    tmp_path: Path,
    tiny_settings: Callable[..., Settings],
    migrated: Path,
    capsys: pytest.CaptureFixture[str],
):
    settings = tiny_settings()
    shutil.copy(migrated, tmp_path / "mlflow.db")
    there = {output(settings, "ingest", "elsewhere"), output(settings, "ingest", "newest", days=30)}
    pipeline(settings, "long-ago", {"ingest": "elsewhere"})
    folder = Store(settings.run.root).folder("ingest", "elsewhere")
    shutil.move(folder, tmp_path / "big")
    folder.symlink_to(tmp_path / "big")
    assert prune(settings, KEEP) == []
    assert left(settings) == there
    assert "left alone: " in capsys.readouterr().err


def test_what_may_not_be_removed_is_left_alone_whole(
    tmp_path: Path, tiny_settings: Callable[..., Settings], migrated: Path
):
    """A folder in it that cannot be written, as one of another user."""
    apart_at = tmp_path / "apart"
    settings = tiny_settings()
    shutil.copy(migrated, tmp_path / "mlflow.db")
    for key in ("theirs", "whole"):
        output(settings, "ingest", key)
    output(settings, "ingest", "newest", days=30)
    pipeline(settings, "long-ago", {"ingest": "whole"})
    inside = Store(settings.run.root).folder("ingest", "theirs") / "parts"
    inside.mkdir()
    (inside / "part").write_bytes(b"x")
    (tmp_path / "hllm.toml").write_text(toml(settings.model_dump(mode="json")))
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" prune --config "$3"'
    done = apart(apart_at, script, str(inside), HLLM, str(tmp_path / "hllm.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "theirs: not all of it may be removed by this user" in done.stderr
    assert left(settings) == {("ingest", "theirs"), ("ingest", "newest")}


def test_a_copy_on_another_machine_is_not_taken_for_what_was_removed(s3: S3, tmp_path: Path):
    root = s3.bucket("prune-elsewhere")
    here, elsewhere = (Store(root, cache=tmp_path / name) for name in ("here", "elsewhere"))
    folder = elsewhere.folder("prepare", "k")
    folder.mkdir(parents=True)
    elsewhere.finish(Manifest("prepare", "k", "", "0", "2026-01-01T00:00:00", 1.0, digest_of({})))
    assert elsewhere.manifest("prepare", "k")
    with here.lock("prepare", "k"):
        here.forget("prepare", "k")
    assert elsewhere.manifest("prepare", "k") is None


def test_a_pipelines_run_names_its_outputs_from_its_first_step_on(settings: Settings):
    execute("ingest", settings)
    client = server.client(settings)
    parent = tracking.find_parent(client, settings, pipeline_key(keys(settings)))
    assert parent
    tags = client.get_run(parent).data.tags
    named = {name.removeprefix(tracking.OUTPUT_TAG): tags[name] for name in tags if "hllm.output." in name}
    assert named == keys(settings)


def test_after_it_what_serves_is_refreshed_from_what_it_was_made_from(trained, tiny_source, tmp_path: Path):
    """All of it is old: the training, two days that were read since, and today."""
    root = shutil.copytree(trained.settings.run.root, tmp_path / "root")
    run = trained.settings.run.model_copy(update={"root": str(root)})
    copied = replace(trained, settings=trained.settings.model_copy(update={"run": run}))
    served = serve(copied, tmp_path)
    columns, events = catalogue(tiny_source), list(tiny_source.events)
    days = []
    for day in ("monday", "tuesday", "today"):
        for name, value in (("item_id", day), ("title", f"New on {day}"), ("genre", None)):
            columns[name].append(value)
        events.append(("u3", day, 1_700_000_000 + len(days)))
        days.append(go_on(served, tmp_path / day, events, **columns))
    for path in root.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        long_ago = datetime.fromisoformat(manifest["created_at"]) - timedelta(days=40)
        path.write_text(json.dumps(manifest | {"created_at": long_ago.isoformat()}))
    for path in root.glob("*/*/.used"):
        os.utime(path, (0, 0))

    gone = {(step, keys(day)[step]) for day in days[:2] for step in ("ingest", "validate")}
    assert {(one.step, one.key) for one in prune(days[2], 1)} == gone
    refresh(days[2], "items")
    refresh(days[2], "users")
    done = [one.manifest.rows for one in refreshed(days[2], 1)]
    assert done == [{"items": 3}, {"users": 1}]
    verify(days[2], "1")
    assert prune(days[2], 1) == []
