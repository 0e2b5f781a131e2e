"""Odd settings: each is refused when it is read, with its name and a remedy, or it works."""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path

import pytest

from hllm.errors import ConfigError
from hllm.settings import Settings, load
from hllm.settings.keys import all_keys, section_at

LEAVES = sorted(dotted for dotted in all_keys(Settings) if section_at(dotted) is None)
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "99999999999999999999999999",
    '"text"',
    "[]",
    "2024-01-01",
)
TEXTS = ('"a\\u0000b"', "5", "[1]", "{a = 1}", "2024-01-01", "true")


def annotation(dotted: str) -> object:
    section, _, name = dotted.rpartition(".")
    model = section_at(section)
    assert model
    return typing.get_type_hints(model)[name]


def odd() -> list[tuple[str, str]]:
    """Every setting with values that its type cannot mean, or that no file, database or machine takes."""
    found = []
    for dotted in LEAVES:
        kind = annotation(dotted)
        values = NUMBERS if kind in (int, float) else TEXTS
        found += [(dotted, value) for value in values]
    return found


def test_no_odd_value_is_anything_but_refused_or_taken():
    said: list[tuple[bool, str, str, str]] = []
    for dotted, value in odd():
        try:
            load(None, [f"{dotted}={value}"], {})
        except ConfigError as error:
            said.append((dotted.split(".")[0] in str(error), dotted, value, str(error)))
    assert len(odd()) > 280
    assert len(said) > 280
    assert [each for each in said if not each[0]] == []


REFUSED = {
    "run.root=s3://": "names no bucket",
    "run.root=S3://b/k": "scheme unknown here",
    "run.root=gs://b/k": "scheme unknown here",
    "run.root=file:///tmp/x": "scheme unknown here",
    "run.root=$HOME/x": "environment variable",
    "run.root=s3://buck/a//b": "empty part",
    "run.root=s3://buck/../x": "empty part",
    "run.root=": "is empty",
    "run.root=~ada/x": "another user",
    "run.name= ": "run.name: is empty",
    "run.processes=1000": "At most",
    "run.threads=-1": "greater than or equal to 0",
    "data.interactions=https://x/y": "scheme unknown here",
    "data.columns.user_id=": "names no column",
    "data.columns.label=item_id": "named for two things",
    "prepare.split=temporal": "needs the day",
    "prepare.split=random": "leave_one_out",
    "model.family=hlm": "Did you mean hllm",
    "model.family=popular": "is not trained",
    'model.baselines=["sasrc"]': "Did you mean sasrec",
    'model.baselines=["sasrec", "sasrec"]': "there twice",
    "model.stages=3": "has 2 stages",
    "hllm.item_llm.heads=3": "do not divide",
    "hllm.user_llm.width=6": "is not even",
    "sasrec.heads=5": "do not divide",
    "hllm.stage1.lr=nan": "finite",
    "hllm.stage1.batchsize=8": "Did you mean hllm.stage1.batch_size",
    "evaluation.cutoffs=[]": "evaluation.cutoffs",
    "evaluation.cutoffs=[5, 5]": "evaluation.cutoffs",
    "evaluation.cutoffs=[0]": "evaluation.cutoffs",
    "gate.metric=ndcg@7": "is not measured",
    "gate.metric=auc": "is not measured",
    "gate.min_vs.sasrc=1.0": "Did you mean sasrec",
    "gate.min_vs.sasrec=1.0": "is not trained beside",
    "ranking.test_from=2024-01-01": "temporal",
    "validation.not_before=soon": "is no day",
    "mlflow.model_name=a.b": "no name of a registered model",
    "mlflow.model_name=a/b": "no name of a registered model",
    "mlflow.tracking_uri=redis://x": "no store of MLflow",
    "mlflow.tracking_uri=http://": "no address of a server",
    "feast.project=my-team": "no name of a Feast project",
    "feast.project=": "no name of a Feast project",
    "feast.online=redis": "no address of a Redis",
    "feast.online=postgres": "does not name a PostgreSQL database",
    "feast.offline=postgres": "does not name a PostgreSQL database",
    "feast.registry=mongodb://x": "no registry known here",
    "runner.steps.trian.gpus=1": "is not a step",
    "runner.steps.train-hlm-1.gpus=1": "Did you mean runner.steps.train-hllm-1",
    "runner.steps.ingest.nodes=2": "only one pod",
    "runner.pod.memory=lots": "pattern",
    "release.approved_by=": "release.approved_by",
    "hllm=5": "is a section",
    "run.seed.x=1": "seed",
    "train.stage1.lr=1": "is called hllm.stage1.lr now",
    "gate.min_vs_sasrec=1": "is called gate.min_vs.sasrec now",
    "a": "section.key=value",
    "=b": "section.key=value",
    "nosuch.x=1": "is not a setting",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_settings_alone_decide_is_refused_when_they_are_read(given: str):
    with pytest.raises(ConfigError) as error:
        load(None, [given], {})
    assert REFUSED[given] in str(error.value), str(error.value)


def test_text_that_looks_like_a_number_is_text_where_text_is_meant():
    assert load(None, ["run.name=5", "feast.project=2024"], {}).run.name == "5"
    assert load(None, (), {"HLLM__RUN__NAME": "007"}).run.name == "007"


def test_a_home_is_written_out():
    assert load(None, ["run.root=~/runs"], {}).run.root == str(Path.home() / "runs")


FILES = {
    "byte order mark": (b'\xef\xbb\xbf[run]\nname = "a"\n', ""),
    "carriage returns": (b'[run]\r\nname = "a"\r\n', ""),
    "UTF-16": ('[run]\nname = "a"\n'.encode("utf-16"), "is not UTF-8"),
    "NUL": (b'[run]\nname = "a\x00"\n', "is not valid TOML"),
    "a key twice": (b'[run]\nname = "a"\nname = "b"\n', "is not valid TOML"),
    "a number for a text": (b"[run]\nname = 5\n", "Write it in quotes"),
    "a date for a text": (b"[prepare]\ntest_from = 2024-01-01\n", "Write it in quotes"),
    "deep": (b"a = " + b"[" * 5000 + b"]" * 5000, "is not"),
    "half": (b"[run\n", "is not valid TOML"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_read_or_refused_by_name(tmp_path: Path, kind: str):
    content, says = FILES[kind]
    path = tmp_path / "hllm.toml"
    path.write_bytes(content)
    if not says:
        assert load(path, (), {}).run.name == "a"
        return
    with pytest.raises(ConfigError) as error:
        load(path, (), {})
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / "no", "no such"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(path, (), {})


def test_values_survive_the_environment():
    assert load(None, (), {"HLLM__EVALUATION__CUTOFFS": json.dumps([3, 10])}).evaluation.cutoffs == (3, 10)
