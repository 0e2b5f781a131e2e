from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hllm.cli import app
from hllm.errors import ConfigError, DataError, InfraError
from hllm.models.family import untrained
from hllm.pipeline import _lead, execute, keys, pipeline_key, steps
from hllm.plan import plan
from hllm.settings import Settings
from hllm.work.artifacts import Manifest, Store, digest_of
from hllm.work.lease import claimed
from hllm.work.objects import list_objects, write_object
from hllm.work.ranks import Place
from hllm.work.step import settings_of
from tests.conftest import S3
from tests.world import TinySource, run_steps, write_tiny_source

TinySettings = Callable[..., Settings]


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_every_step_comes_after_what_it_needs() -> None:
    for family in ("hllm", "sasrec"):
        seen: set[str] = set()
        for step in steps(Settings.model_validate({"model": {"family": family}})).values():
            assert set(step.needs) <= seen, step.name
            seen.add(step.name)


def test_every_setting_that_decides_a_step_exists() -> None:
    settings = Settings()
    for step in steps(settings).values():
        assert settings_of(step, settings).keys() == set(step.key_settings)


def test_a_setting_changes_the_keys_of_what_depends_on_it_and_of_nothing_else(
    tiny_settings: TinySettings,
) -> None:
    before = keys(tiny_settings())
    assert keys(tiny_settings()) == before
    assert changed(before, keys(tiny_settings(**{"gate.min_vs.popular": 0.5}))) == set()
    assert changed(before, keys(tiny_settings(**{"evaluation.bootstrap": 30}))) == {"evaluate"}
    prepare = changed(before, keys(tiny_settings(**{"prepare.max_tokens": 40})))
    assert prepare == set(before) - {"ingest", "validate"}
    stage2 = changed(before, keys(tiny_settings(**{"hllm.stage2.lr": 0.5})))
    assert {"train-hllm-2", "embed-hllm-3", "evaluate"} == stage2
    assert changed(before, keys(tiny_settings(**{"data.positive_rating": 3.5}))) == set(before)
    # Who fears for a machine saves more often, and goes on from what was saved.
    frugal = {"hllm.stage1.checkpoint_minutes": 0.5, "sasrec.stage1.keep_checkpoints": 1}
    frugal |= {"data.batch_rows": 9}
    assert changed(before, keys(tiny_settings(**frugal))) == set()
    longer = {"embed.max_history": 33}
    assert changed(before, keys(tiny_settings(**longer))) == {"embed-hllm-3", "evaluate"}


def test_a_family_may_stop_after_its_first_stage(tmp_path: Path, tiny_source: TinySource) -> None:
    from tests.world import tiny_settings

    settings = tiny_settings(tmp_path, tiny_source, **{"model.stages": 1})
    found = steps(settings)
    assert "train-hllm-2" not in found
    assert found["embed-hllm-3"].needs == ("prepare", "train-hllm-1", "embed-hllm-1")
    assert found["evaluate"].needs == (
        "prepare", "train-hllm-1", "embed-hllm-1", "train-sasrec-1", "embed-sasrec-1"
    )  # fmt: skip
    evaluated = run_steps(settings, *found)
    metrics = json.loads((evaluated / "metrics.json").read_text("utf-8"))
    assert metrics["candidate"] == "hllm-1"
    assert metrics["models"].keys() == {"hllm-1", "sasrec-1", *(each.name for each in untrained())}


def test_a_share_of_the_users_changes_training_and_nothing_before_it(tiny_settings: TinySettings) -> None:
    before, after = keys(tiny_settings()), keys(tiny_settings(**{"train.share": 0.5}))
    assert set(before) - changed(before, after) == {"ingest", "validate", "prepare"}


def test_the_history_that_validation_reads_belongs_to_the_model_it_chooses(
    tiny_settings: TinySettings,
) -> None:
    chosen = {"hllm.stage2.evaluate_every": 2}
    before = keys(tiny_settings(**chosen))
    after = keys(tiny_settings(**chosen, **{"embed.max_history": 33}))
    assert changed(before, after) == {"train-hllm-2", "embed-hllm-3", "evaluate"}
    # SASRec never reads more than it learned from.
    chosen = {"sasrec.stage1.evaluate_every": 2, "sasrec.stage1.history_length": 8}
    before, most, fewer = (
        keys(tiny_settings(**chosen, **{"embed.max_history": longest})) for longest in (33, 8, 7)
    )
    assert changed(before, most) == {"embed-hllm-3", "evaluate"}
    assert "train-sasrec-1" in changed(most, fewer)


def test_other_data_changes_every_key(tiny_settings: TinySettings, tmp_path: Path) -> None:
    one = write_tiny_source(tmp_path / "one")
    sets = {"data.items": str(one.items), "data.interactions": str(one.interactions)}
    before = keys(tiny_settings(**sets))
    one.interactions.write_text(one.interactions.read_text() + "late,item9,1600800000\n")
    after = keys(tiny_settings(**sets))
    assert changed(before, after) == set(before)
    assert pipeline_key(before) != pipeline_key(after)


def test_a_step_runs_once_and_is_reused(tiny_settings: TinySettings, tiny_source: TinySource) -> None:
    settings = tiny_settings()
    first, second = execute("ingest", settings), execute("ingest", settings)
    assert (first.reused, second.reused) == (False, True)
    assert first.manifest == second.manifest
    assert first.manifest.rows == {"items": 60, "interactions": len(tiny_source.events)}
    assert first.manifest.schema["interactions.parquet"]["timestamp"] == "int64"
    again = execute("ingest", settings, force=True)
    assert not again.reused
    assert again.manifest.digest == first.manifest.digest


def test_a_step_that_another_machine_finishes_meanwhile_is_reused(
    tiny_settings: TinySettings,
    s3: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two DAGs start the same step in the same minute."""
    monkeypatch.setattr("hllm.work.lease.BEAT_SECONDS", 10.0)
    settings = tiny_settings(**{"run.root": s3.bucket("steps-meanwhile")})
    key = keys(settings)["ingest"]
    other = Store(settings.run.root, cache=tmp_path / "elsewhere")
    made = Manifest("ingest", key, "s", "0", "2026-01-01T00:00:00", 1.0, digest_of({}))
    with ThreadPoolExecutor(1) as pool:
        with claimed(f"{settings.run.root}/ingest/.{key}.lock", "process 7 on another machine"):
            late = pool.submit(execute, "ingest", settings)
            while "waiting to see" not in capsys.readouterr().err:  # it has looked, and found no output
                assert not late.done()
                time.sleep(0.05)
            other.folder("ingest", key).mkdir(parents=True)
            other.finish(made)
        outcome = late.result(30)
    assert outcome.reused
    assert outcome.manifest == made
    assert other.used("ingest", key), "`hllm prune` would not know that this pipeline goes on from it"


def test_what_was_removed_from_s3_is_made_again_and_no_old_copy_is_taken_for_it_meanwhile(
    tiny_settings: TinySettings, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(**{"run.root": s3.bucket("steps-removed")})
    store, key = Store(settings.run.root), keys(settings)["ingest"]
    made = execute("ingest", settings).manifest
    Store(settings.run.root, cache=tmp_path / "elsewhere").forget("ingest", key)
    with monkeypatch.context() as patch:
        patch.setattr("hllm.pipeline.load_function", lambda _: lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute("ingest", settings)
    with pytest.raises(DataError, match="ingest has no finished output"):
        store.fetch("ingest", key)
    again = execute("ingest", settings)
    assert not again.reused
    assert again.manifest.files == made.files
    assert execute("ingest", settings).reused


def test_several_processes_that_come_too_late_end_and_try_again(
    tiny_settings: TinySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first alone cannot leave: the others are computing already."""
    settings = tiny_settings()
    run_steps(settings, "ingest")
    monkeypatch.setattr("hllm.work.ranks._place", Place(rank=0, size=2))
    with pytest.raises(InfraError, match="another process has finished this output meanwhile"):
        _lead(steps(settings)["ingest"], settings, Store(settings.run.root), keys(settings), force=False)


def test_checkpoints_that_outlived_their_step_go_when_it_is_reused(
    tiny_settings: TinySettings, s3: S3
) -> None:
    settings = tiny_settings(**{"run.root": s3.bucket("steps-tidy")})
    key, store = keys(settings)["train-hllm-1"], Store(settings.run.root)
    store.folder("train-hllm-1", key).mkdir(parents=True)
    store.finish(Manifest("train-hllm-1", key, "s", "0", "2026-01-01T00:00:00", 1.0, digest_of({})))
    left = f"{store.work_location('train-hllm-1', key)}/step-9/numbers.json"
    write_object(left, b"{}")
    assert execute("train-hllm-1", settings).reused
    assert left not in list_objects(f"{settings.run.root}/")
    assert store.manifest("train-hllm-1", key)


def test_a_step_without_its_input_says_what_to_run(tiny_settings: TinySettings) -> None:
    with pytest.raises(DataError) as error:
        execute("validate", tiny_settings())
    assert "needs the output of ingest" in error.value.first_line
    assert "`hllm ingest`" in str(error.value)


def test_a_place_where_nothing_can_be_written_is_a_settings_error(
    tiny_settings: TinySettings, tiny_source: TinySource
) -> None:
    settings = tiny_settings(**{"run.root": f"{tiny_source.items}/runs"})
    with pytest.raises(ConfigError, match=r"cannot be written there: Not a directory(.|\n)*run\.root"):
        execute("ingest", settings)


def test_a_step_that_does_not_exist(tiny_settings: TinySettings) -> None:
    with pytest.raises(ConfigError, match="no step fly"):
        execute("fly", tiny_settings())


def test_the_plan_shows_what_is_done(tiny_settings: TinySettings, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings()
    run_steps(settings, "ingest")
    capsys.readouterr()
    plan(settings)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "done" in lines["ingest"]
    for name in ("validate", "train-hllm-1", "evaluate"):
        assert "to do" in lines[name]
    assert keys(settings)["prepare"] in lines["prepare"]
    assert {"register", "publish", "verify", "promote"} <= lines.keys()


def test_a_bad_source_ends_the_command_with_65_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HLLM_TERMINATION_LOG", str(tmp_path / "termination-log"))
    sets = [
        f"run.root={tmp_path}",
        f"data.items={tmp_path}/none.csv",
        f"data.interactions={tmp_path}/none.csv",
    ]
    result = CliRunner().invoke(app, ["ingest", *(part for value in sets for part in ("--set", value))])
    assert result.exit_code == 65
    assert "none.csv: no such file" in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "termination-log").read_text() == f"{tmp_path}/none.csv: no such file\n"


def test_a_misspelt_setting_ends_the_command_with_64() -> None:
    result = CliRunner().invoke(app, ["plan", "--set", "run.nmae=x"])
    assert result.exit_code == 64
    assert "Did you mean run.name?" in result.output
    assert Store("unused").manifest("ingest", "k") is None
