"""What is documented is what there is: commands, settings and the files that ship with them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from hllm.cli import app
from hllm.settings import Settings, describe, load
from hllm.settings.keys import all_keys, section_at

REPOSITORY = Path(__file__).parents[1]
CONFIGS = sorted({*(REPOSITORY / "configs").glob("*.toml"), *(REPOSITORY / "configs").glob("*/*.toml")})
"""Settings files; deeper down lie comparisons (tests/comparison/test_file.py)."""
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "k8s/*.md", "benchmarks/*.md", "containers/*/*.md")
    for path in REPOSITORY.glob(pattern)
)
SOURCES = sorted(
    path
    for folder in ("hllm", "dags", "feature_repo", "configs", "k8s", "containers", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*")
    if path.suffix in (".py", ".toml", ".yaml", ".html")
)
"""Where commands are named in docstrings, comments and error messages."""
GROUP = typer.main.get_group(app)
COMMANDS = sorted(GROUP.commands)  # type: ignore[attr-defined]
SETTINGS = sorted(
    dotted for dotted in all_keys(Settings) if section_at(dotted) is None
)


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str):
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert re.search(rf"\bhllm {command}\b", readme), f"README.md does not mention `hllm {command}`"


def commands(text: str) -> list[tuple[str, str]]:
    """Command and what follows it, of `hllm ...` between backticks, at the start of a line, after another."""
    quoted = re.findall(r"`hllm ([a-z]+)\b([^`]*)`", text)
    text = text.replace("\\\n", " ")
    lines = re.findall(r"(?:^(?:[ #$]|\w+=\S+ )*|&& |: )hllm ([a-z]+)\b(.*)", text, re.MULTILINE)
    return quoted + [(name, re.split(r" # | && |[;|`]", rest)[0]) for name, rest in lines]


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=relative)
def test_commands_and_their_options_are_named_as_they_are(path: Path):
    for name, rest in commands(path.read_text("utf-8")):
        command = GROUP.commands.get(name)  # type: ignore[attr-defined]
        assert command, f"there is no `hllm {name}`"
        known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
        unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) - known
        assert not unknown, f"`hllm {name}` has no {', '.join(unknown)}"
        for dotted in re.findall(r"--set ([\w.]+)=", rest):
            assert dotted in SETTINGS, f"{dotted} is no setting"


def test_commands_are_found_where_they_are_named():
    found = [each for path in (*DOCUMENTS, *SOURCES) for each in commands(path.read_text("utf-8"))]
    assert {name for name, _ in found} == set(COMMANDS)
    assert any("--seed" in rest for _, rest in found)
    assert any("--set data.path" in rest for _, rest in found)


NO_SETTINGS = {"feast.feature_service", "hllm.output.STEP", "hllm.serving_version", "hllm.families"}
"""Named like settings: tags in MLflow, one of which Feast's integration with it reads; a group of entry
points."""


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=relative)
def test_documents_name_no_setting_that_there_is_not(path: Path):
    """Dotted names between backticks that begin with a section, and variables of the environment."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    sections = "|".join(Settings.model_fields)
    for quoted in re.findall(r"`([^`]+)`", text):
        for dotted in re.findall(rf"(?<![\w/.*-])(?:{sections})(?:\.[\w*-]+)+", quoted):
            file = re.search(r"\.(?:py|md|toml|json|txt|html)$|^hllm\.\w+\.\w+\.[A-Z]", dotted)
            if not file and "*" not in dotted and dotted not in NO_SETTINGS:
                assert dotted in SETTINGS or section_at(dotted), f"{dotted} is no setting"
    for variable in re.findall(r"HLLM__(\w+)", path.read_text("utf-8")):
        assert variable.lower().replace("__", ".") in SETTINGS, f"HLLM__{variable} is no setting"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            name, _, heading = target.partition("#")
            file = path.parent / name if name else path
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE) if heading else ()
            anchors = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert not heading or heading in anchors, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_scripts_and_make_targets_of_documents_are_there(path: Path):
    text = path.read_text("utf-8")
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, f"make {target}"
    for script in re.findall(r"\b(?:python|pytest)3? (?:-\S+ )*([\w/.-]+\.py)\b", text):
        assert (REPOSITORY / script).exists(), script


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str):
    described = GROUP.commands[command].help  # type: ignore[attr-defined]
    assert described
    assert described.strip().endswith(".")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_says_something(path: Path):
    settings = load(path, environ={})
    assert settings.run.name != Settings().run.name
    for dotted, value in _values(tomllib.loads(path.read_text("utf-8"))):
        wanted = tuple(value) if isinstance(value, list) else value
        assert settings.at(dotted) == wanted, f"{path.name}: {dotted}"


def test_there_is_a_configuration_to_start_from():
    assert REPOSITORY / "configs" / "demo.toml" in CONFIGS


@pytest.mark.parametrize("dotted", SETTINGS)
def test_every_setting_has_a_docstring(dotted: str):
    described = describe(dotted)
    assert len(described) > 10, f"{dotted} has no docstring under it"
    assert described.endswith((".", ")", "?")), f"the docstring of {dotted} is not a sentence: {described}"


def test_the_page_about_the_papers_names_what_there_is():
    """Paths, functions and settings of docs/paper.md, whoever renames them."""
    page = (REPOSITORY / "docs" / "paper.md").read_text("utf-8")
    source = "\n".join(path.read_text("utf-8") for path in (REPOSITORY / "hllm").rglob("*.py"))
    names = re.findall(r"`([^`\n]+)`", page)
    paths = [name for name in names if re.fullmatch(r"[\w/.-]+\.(?:py|md|toml)", name) and "/" in name]
    assert len(paths) > 25
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    dotted_keys = set(all_keys(Settings))
    keys = dotted_keys | {dotted.split(".")[-1] for dotted in dotted_keys}
    for row in re.findall(r"^\| (?!part|stage).*\|$", page, re.MULTILINE):
        cells = row.strip("|").split("|")
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", cells[1]):
            last = name.split(".")[-1]
            known = last in ("py", "toml") or re.search(rf"(?:def|class) {last}\b|self\.{last}\b", source)
            assert known, f"docs/paper.md: {name}"
        for name in re.findall(r"`([a-z][\w.*]*)(?: = [^`]*)?`", cells[2] if len(cells) > 2 else ""):
            found = name in keys or section_at(name) or name.replace("*", "stage1") in keys
            assert found or name.startswith("hllm"), f"docs/paper.md: {name} is no setting"


def _values(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:  # type: ignore[type-arg]
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
