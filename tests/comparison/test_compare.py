"""A comparison from its file to its page, through the real commands."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hllm.comparison.compare import compare
from hllm.comparison.file import read
from hllm.comparison.work import jobs, pipelines
from hllm.errors import DataError
from hllm.models.family import untrained
from hllm.work.mlflow import client
from tests.world import TinySource, run_steps, tiny_settings, toml

HLLM = str(Path(sys.executable).parent / "hllm")
COMPARISON = """
config = "base.toml"
title = "Item vectors of a tiny world"
seeds = [1, 2]
metrics = ["ndcg@10", "recall@5", "loss", "item:long_tail recall@10"]
axis = "train.share"

[budget]
model.stages = 1
model.family = "sasrec"

[models.half]
train.share = 0.5

[models.all]
train.share = 1.0
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_source: TinySource) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    settings = tiny_settings(folder, tiny_source, **{"sasrec.stage1.steps": 30})
    (folder / "base.toml").write_text(toml(settings.model_dump(mode="json")))
    path = folder / "tiny.toml"
    path.write_text(COMPARISON)
    return path


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_where_it_was(file: Path, tmp_path: Path):
    root = f"run.root={tmp_path}/runs"
    found = pipelines(read(file, (root,)))
    command = [HLLM, "compare", str(file), "--set", root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while found[0].manifest("train-sasrec-1") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert not (tmp_path / "runs" / "compare").exists()
    trained = found[0].finished("train-sasrec-1")

    folder = compare(file, (root,))
    assert folder is not None
    assert (folder / "index.html").exists()
    assert all(manifest for _, manifest in jobs(found))
    assert found[0].finished("train-sasrec-1") == trained


def test_a_finished_comparison_is_a_table_a_page_and_runs(file: Path):
    found = pipelines(read(file))
    for job, manifest in jobs(found):
        if manifest is None:
            run_steps(job.pipeline.settings, job.step)
    folder = compare(file)
    assert folder is not None
    numbers = json.loads((folder / "results.json").read_text("utf-8"))
    assert numbers["models"].keys() == {"half", "all", *(each.title for each in untrained())}
    for name in ("half", "all"):
        own = [one for one in found if one.entry.name == name]
        metrics = [json.loads((one.folder("evaluate") / "metrics.json").read_text("utf-8")) for one in own]
        values = [one["models"]["sasrec-1"]["overall"]["filtered"]["ndcg@10"]["value"] for one in metrics]
        assert numbers["models"][name]["ndcg@10"]["value"] == pytest.approx(sum(values) / 2)
        assert numbers["efforts"][name]["steps"] == [30]
    assert [law["places"] for law in numbers["laws"]] == [[0.5, 1.0]] * len(numbers["laws"])
    assert {law["metric"] for law in numbers["laws"]} >= {"ndcg@10", "loss"}

    page = (folder / "index.html").read_text("utf-8")
    assert "Item vectors of a tiny world" in page
    assert page.count("<svg") == 4 + len(numbers["laws"])
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is loaded from anywhere
    names = re.findall("<th>(.*?)</th>", page.split("</thead>")[0])
    for model in ("half", "all", "Most popular"):  # on a phone each cell stands beside the name of its column
        row = page.split(f"<td>{model}</td>")[1].split("</tr>")[0]
        assert re.findall('data-label="(.*?)"', row) == names[1:]
    assert "| half" in (folder / "table.md").read_text("utf-8")

    settings = found[0].settings
    mlflow = client(settings)
    experiment = mlflow.get_experiment_by_name(settings.run.name).experiment_id
    runs = {run.info.run_name: run for run in mlflow.search_runs([experiment])}
    assert {artifact.path for artifact in mlflow.list_artifacts(runs["compare tiny"].info.run_id)} == {
        "index.html", "results.json", "table.md"
    }  # fmt: skip
    for name in ("half", "all"):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["compare tiny"].info.run_id
        logged = runs[name].data.metrics
        assert logged["ndcg_at_10"] == pytest.approx(numbers["models"][name]["ndcg@10"]["value"])
        assert logged["parameters"] > 0

    before = len(runs)
    assert compare(file) == folder  # everything is there: nothing runs, no second record
    assert len(mlflow.search_runs([experiment])) == before


def test_a_dry_run_starts_nothing(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare(file, (f"run.root={tmp_path}/other",), dry_run=True) is None
    said = capsys.readouterr().out
    assert "2 models, 2 seeds" in said
    assert said.count("to do") == 3 + 2 * 2 * 3
    assert [path.name for path in (tmp_path / "other").rglob("*")] in ([], [".digests.jsonl"])


def test_a_step_that_fails_is_named_with_its_model(file: Path):
    run_steps(pipelines(read(file))[0].settings, "ingest", "validate")
    with pytest.raises(DataError) as error:
        compare(file, ("prepare.k_core=99",))
    assert "half, seed 1: prepare" in str(error.value)
    assert "no events are left" in str(error.value)
