"""The image definitions, as far as they can be judged without building them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CONTAINERS = REPOSITORY / "containers"
IMAGES = ("hllm", "airflow")
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Line:
    """One instruction of a Dockerfile, its continued lines joined."""

    word: str
    text: str


def instructions(image: str) -> list[Line]:
    text = (CONTAINERS / image / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [
        Line(word, " ".join(rest.split()))
        for word, _, rest in (each.partition(" ") for each in lines)
        if word
    ]


def last_stage(image: str) -> list[Line]:
    lines = instructions(image)
    start = max(index for index, line in enumerate(lines) if line.word == "FROM")
    return lines[start:]


def of(lines: list[Line], word: str) -> list[str]:
    return [line.text for line in lines if line.word == word]


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").split()
    return {canonical(line): line.partition("==")[2] for line in lines if "==" in line}


@pytest.mark.parametrize("image", IMAGES)
def test_the_linter_finds_nothing(image: str):
    command = [str(BIN / "hadolint"), "--no-color", str(CONTAINERS / image / "Dockerfile")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_runs_as_a_user_by_number(image: str):
    stage = last_stage(image)
    assert of(stage, "USER") == ["10001:10001"]
    assert "useradd --uid 10001" in " ".join(of(stage, "RUN"))


@pytest.mark.parametrize("image", IMAGES)
def test_names_no_registry(image: str):
    assert of(instructions(image), "ARG")[0] == "PYTHON_IMAGE=python:3.11-slim-bookworm"
    assert {text.split()[0] for text in of(instructions(image), "FROM")} == {"${PYTHON_IMAGE}"}


@pytest.mark.parametrize("image", IMAGES)
def test_holds_no_secret_and_fetches_nothing_but_packages(image: str):
    lines = instructions(image)
    for name in of(lines, "ARG") + of(lines, "ENV"):
        assert not re.search("PASSWORD|SECRET|TOKEN|KEY", name)
    assert not of(lines, "ADD")
    assert not re.search(r"\b(curl|wget|git|apt-get)\b|https?://", " ".join(of(lines, "RUN")))


@pytest.mark.parametrize("image", IMAGES)
def test_installs_only_pinned_packages(image: str):
    for run in of(instructions(image), "RUN"):
        for command in re.findall(r"pip (?:install|wheel) [^&]*", run):
            assert "--no-cache-dir" in command
            assert re.search(r"--constraint|--no-deps|--requirement /opt/hllm/torch.txt", command), command


@pytest.mark.parametrize("image", IMAGES)
def test_our_code_comes_after_every_package(image: str):
    """So a change of it leaves the layers with torch, or with Airflow, as they are."""
    stage = last_stage(image)
    packages = [index for index, line in enumerate(stage) if "--requirement" in line.text]
    code = [
        index
        for index, line in enumerate(stage)
        if "from=wheel" in line.text or re.match(r"(dags|configs|feature_repo) ", line.text)
    ]
    assert max(packages) < min(code)


@pytest.mark.parametrize("image", IMAGES)
def test_says_what_it_is_and_how_it_is(image: str):
    stage = last_stage(image)
    (labels,) = of(stage, "LABEL")
    for label in ("title", "description", "licenses", "version"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert len(of(stage, "HEALTHCHECK")) == 1


@pytest.mark.parametrize("image", IMAGES)
def test_everything_copied_is_in_the_build_context(image: str):
    ignored = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    rules = [rule for rule in ignored if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    for text in of(instructions(image), "COPY"):
        if not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert f"!{source.split('/')[0]}" in rules, f"{source} is not in the build context"


@pytest.mark.parametrize("image", IMAGES)
def test_pid_1_hands_sigterm_to_the_command(image: str):
    (text,) = of(last_stage(image), "ENTRYPOINT")
    program, *rest = json.loads(text)
    command = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    argv = [str(BIN / program), *rest, sys.executable, "-c", command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143


def test_hllm_installs_torch_first_and_what_the_project_asks_for(tmp_path: Path):
    for path in (
        REPOSITORY / "pyproject.toml",
        REPOSITORY / "constraints.txt",
        CONTAINERS / "hllm" / "lists.py",
    ):
        shutil.copy(path, tmp_path)
    subprocess.run([sys.executable, "lists.py"], cwd=tmp_path, check=True)
    assert (tmp_path / "torch.txt").read_text() == f"torch=={pinned()['torch']}\n"
    wanted = {canonical(line) for line in (tmp_path / "requirements.txt").read_text().split("\n") if line}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert wanted == {canonical(each) for each in project["dependencies"]} | {"dumb-init", "setuptools"}
    assert {*wanted, "deepspeed"} <= set(pinned())


def test_airflow_installs_what_the_dags_need_without_torch():
    lines = (CONTAINERS / "airflow" / "requirements.txt").read_text("utf-8").splitlines()
    wanted = {canonical(line) for line in lines if not line.startswith("#")}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert wanted >= {canonical(each) for each in project["optional-dependencies"]["airflow"]}
    assert wanted <= set(pinned())
    assert not wanted & {"torch", "deepspeed", "hllm"}


def test_dags_parse_without_the_packages_that_the_airflow_image_leaves_out(tmp_path: Path):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    of_airflow = {"jinja2", "markupsafe", "psutil", "psycopg", "pydantic", "tabulate", "typer"}
    absent = sorted({canonical(each).replace("-", "_") for each in project["dependencies"]} - of_airflow)
    absent.append("ibis")  # of ibis-framework
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'dags')!r})\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None: importing it fails
        "import hllm_release, hllm_train\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "AIRFLOW_HOME": str(tmp_path), "HLLM__RUNNER__KIND": "kubernetes"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
