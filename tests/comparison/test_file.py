"""Comparison files: what they may say, what they mean, and that every shipped one can be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hllm.comparison.file import read
from hllm.comparison.work import jobs, pipelines
from hllm.errors import ConfigError
from tests.world import TinySource

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiments"
SHIPPED = sorted(EXPERIMENTS.glob("*/*.toml"))


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "base.toml").write_text('[hllm.stage1]\nlr = 0.5\n[prepare]\nprompt = "of the file"\n')

    def act(content: str) -> Path:
        path = tmp_path / "comparison.toml"
        path.write_text('config = "base.toml"\n' + content)
        return path

    return act


TWO = """
[budget]
hllm.stage1.steps = 7

[models."first: a=b"]
hllm.item_vector = "mean"
evaluation.cutoffs = [10, 50]

[models.second]
model.family = "sasrec"
sasrec.stage1.lr = 2e-3
"""


def test_a_model_is_the_file_then_its_own_settings_then_the_budget_then_the_command_line(write):
    comparison = read(write(TWO), ("hllm.stage1.negatives=3", "evaluation.cutoffs=[10, 50]"))
    first, second = comparison.entries
    settings = comparison.settings(first, 18)
    assert (settings.hllm.stage1.lr, settings.prepare.prompt) == (0.5, "of the file")
    assert (settings.hllm.item_vector, settings.evaluation.cutoffs) == ("mean", (10, 50))
    assert (settings.hllm.stage1.steps, settings.hllm.stage1.negatives, settings.run.seed) == (7, 3, 18)
    assert comparison.settings(second, 17).sasrec.stage1.lr == 2e-3
    assert comparison.settings(second, 17).hllm.stage1.steps == 7
    assert (first.label, second.label, comparison.reference) == ("hllm-2", "sasrec-1", "first: a=b")
    assert (comparison.seeds, read(write(TWO), seeds=(5,)).seeds) == ((17, 18, 19), (5,))
    assert settings.model.baselines == ()  # each family is a model of its own
    assert "hllm.stage1.steps=7" not in read(write(TWO), ("hllm.stage1.steps=9",)).entries[0].sets


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seeds = [1]\n", "models: field required"),
        ("seedz = [1]\n[models.a]\n", "seedz: extra inputs are not permitted"),
        ("seeds = [1, 1]\n[models.a]\n", "a seed is there twice"),
        ('reference = "b"\n[models.a]\n', "the reference b is none of the models"),
        ("[budget]\nrun.threads = 1\n[models.a]\nrun.threads = 2\n", "the model a changes the budget"),
        ('[models.a]\nlabel = "hstu-1"\n', "the model a has no hstu-1"),
        ("[models.a]\nhllm.stage1.lrr = 1\n", "hllm.stage1.lrr is not a setting"),
        ('metrics = ["ndcg@11"]\n[models.a]\n', "a is not evaluated by these metrics"),
        ('metrics = ["item:tepid ndcg@10"]\n[models.a]\n', "a is not evaluated by these metrics"),
        ('axis = "train.shares"\n[models.a]\n', "axis = train.shares is not a setting"),
        ('axis = "run.name"\n[models.a]\n', "axis = run.name is not a number"),
    ],
)
def test_a_file_that_means_nothing_is_refused_with_the_reason(write, content: str, said: str):
    with pytest.raises(ConfigError) as error:
        read(write(content))
    assert said in str(error.value)
    assert error.value.exit_code == 64


def test_what_models_have_in_common_is_one_step(tmp_path: Path, tiny_source: TinySource):
    (tmp_path / "base.toml").write_text(
        f'[run]\nroot = "{tmp_path}/runs"\n[data]\nitems = "{tiny_source.items}"\n'
        f'interactions = "{tiny_source.interactions}"\n'
    )
    path = tmp_path / "comparison.toml"
    path.write_text(
        'config = "base.toml"\nseeds = [1, 2]\n[models.both]\n[models.one]\nmodel.stages = 1\n'
        '[models.sasrec]\nmodel.family = "sasrec"\n'
    )
    steps = [job.step for job, manifest in jobs(pipelines(read(path))) if manifest is None]
    counts = {step: steps.count(step) for step in steps}
    assert counts == {
        "ingest": 1,
        "validate": 1,
        "prepare": 1,
        "train-hllm-1": 2,  # `one` is the first stage of `both`
        "embed-hllm-1": 2,
        "train-hllm-2": 2,
        "train-sasrec-1": 2,
        "embed-sasrec-1": 2,
        "evaluate": 6,
    }


def test_experiments_are_shipped_for_both_data_sets():
    assert {path.parent.name for path in SHIPPED} == {"scientific", "movielens-100k"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_experiment_loads_and_plans(path: Path, tmp_path: Path):
    sets = [f"run.root={tmp_path}"]
    if path.parent.name == "scientific":  # not shipped: a stand-in with the two files
        for name in ("Scientific.inter.json", "Scientific.item.json"):
            (tmp_path / name).write_text("{}")
        sets.append(f"data.path={tmp_path}")
    comparison = read(path, tuple(sets))
    found = pipelines(comparison)
    made = {(one.entry.label, *sorted(one.keys.items())) for one in found}
    assert len(made) == len(found), "two models are the same"
    assert len(comparison.title) > len(path.stem)
    planned = [job.step for job, _ in jobs(found)]
    assert planned[:3] == ["ingest", "validate", "prepare"]
    assert planned.count("evaluate") == len({one.keys["evaluate"] for one in found})
