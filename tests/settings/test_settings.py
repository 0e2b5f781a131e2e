from __future__ import annotations

from pathlib import Path

import pytest

from hllm import settings
from hllm.errors import ConfigError
from hllm.settings import keys

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted({*FOLDER.glob("*.toml"), *FOLDER.glob("*/*.toml")})


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "hllm.toml"
    path.write_text("[hllm.stage1]\nbatch_size = 8\n[run]\nname = 'from the file'\n")
    return path


def test_a_partly_written_section_keeps_its_own_defaults(toml: Path) -> None:
    loaded = settings.load(toml, environ={})
    assert (loaded.hllm.stage1.batch_size, loaded.hllm.stage1.history_length) == (8, 10)
    assert loaded.hllm.stage2.history_length == 200


def test_the_environment_wins_over_the_file_and_set_over_both(toml: Path) -> None:
    environ = {"HLLM__HLLM__STAGE1__BATCH_SIZE": "16", "HLLM__RUN__NAME": "from the environment"}
    assert settings.load(toml, environ=environ).hllm.stage1.batch_size == 16
    loaded = settings.load(toml, ["hllm.stage1.batch_size=32"], environ)
    assert (loaded.hllm.stage1.batch_size, loaded.run.name) == (32, "from the environment")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name=two words", "two words"),
        ("run.name=a=b", "a=b"),
        ('run.name="007"', "007"),
    ],
)
def test_text_needs_no_quotes(override: str, value: str) -> None:
    assert settings.load(None, [override], {}).run.name == value


def test_lists_and_truth_values_are_written_as_in_toml() -> None:
    given = ["evaluation.cutoffs=[5, 20]", "evaluation.filter_history=false", "gate.metric=ndcg@5"]
    loaded = settings.load(None, given, {})
    assert (loaded.evaluation.cutoffs, loaded.evaluation.filter_history) == ((5, 20), False)


def test_a_misspelt_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "hllm.toml"
    path.write_text("[hllm.stage1]\nbatchsize = 8\n")
    with pytest.raises(ConfigError) as error:
        settings.load(path, environ={})
    assert error.value.exit_code == 64
    assert error.value.first_line == (
        f"{path}: hllm.stage1.batchsize is not a setting. Did you mean hllm.stage1.batch_size?"
    )


def test_a_misspelt_name_counts_for_more_than_its_section() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean hllm\.stage1\.batch_size\?"):
        settings.load(None, ["hllm.batchsize=8"], {})
    with pytest.raises(ConfigError, match=r"mandolin is not a setting\.\n"):
        settings.load(None, ["mandolin=8"], {})


def test_a_misspelt_key_is_blamed_on_where_it_was_typed() -> None:
    with pytest.raises(
        ConfigError, match=r"^--set run\.nmae=x: run\.nmae is not a setting\. Did you mean run\.name"
    ):
        settings.load(None, ["run.nmae=x"], {})
    with pytest.raises(ConfigError, match=r"^HLLM__RUN__NMAE: run\.nmae is not a setting"):
        settings.load(None, environ={"HLLM__RUN__NMAE": "x"})


def test_a_value_that_does_not_fit_says_what_the_setting_is(toml: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings.load(toml, ["hllm.stage1.batch_size=0"], {})
    assert "hllm.stage1.batch_size" in error.value.first_line
    assert "got 0" in error.value.first_line
    assert "Windows per step." in str(error.value)


@pytest.mark.parametrize("override", ["run", "=3"])
def test_an_override_of_another_form(override: str) -> None:
    with pytest.raises(ConfigError):
        settings.load(None, [override], {})


@pytest.mark.parametrize("content", [b"[run", b"\xff\xfe"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hllm.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not (valid TOML|UTF-8)"):
        settings.load(path, environ={})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file"):
        settings.load(tmp_path / "none.toml", environ={})


def test_every_setting_has_its_docstring() -> None:
    undocumented = [
        dotted
        for dotted in keys.all_keys(settings.Settings)
        if keys.section_at(dotted) is None and not settings.describe(dotted)
    ]
    assert undocumented == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configs_load(path: Path) -> None:
    settings.load(path, environ={})
