"""What is documented is what there is: commands, settings and the files that ship with them."""

from __future__ import annotations

import ast
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
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = sorted(typer.main.get_group(app).commands)  # type: ignore[attr-defined]
SETTINGS = sorted(
    dotted for dotted in all_keys(Settings) if section_at(dotted) is None
)


def documents() -> str:
    return "\n".join(path.read_text("utf-8") for path in DOCUMENTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str):
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert re.search(rf"\bhllm {command}\b", readme), f"README.md does not mention `hllm {command}`"


def test_documents_mention_no_command_that_there_is_not():
    """In code, that is: between backticks, or at the start of a line of a code block."""
    mentioned = set(re.findall(r"(?:`|^\s*(?:\$ )?)hllm ([a-z]+)\b", documents(), re.MULTILINE))
    assert mentioned <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str):
    described = typer.main.get_group(app).commands[command].help  # type: ignore[attr-defined]
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


def tree() -> dict[str, str]:
    """The README's tree: path -> what its line says. Folders end in a slash."""
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    found: dict[str, str] = {}
    above: list[str] = []
    for line in readme.split("## The tree\n\n```\n")[1].split("```")[0].splitlines():
        name, _, said = line.strip().partition(" ")
        if name:
            del above[(len(line) - len(line.lstrip())) // 2 :]
            path = "".join(above) + name
            assert path not in found, f"README's tree has {path} twice"
            found[path] = said.strip()
            above.append(name)
    return found


def test_the_readmes_tree_has_one_line_for_every_file():
    """Or one for its folder, where nothing of it is listed by itself."""
    named = tree()
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    assert [path for path, said in named.items() if not said] == []
    parents = {f"{parent}/" for path in named for parent in Path(path).parents}
    whole = tuple(path for path in named if path.endswith("/") and path not in parents)
    top = {path.split("/")[0] for path in named}
    assert {"hllm", "dags", "Makefile", "pyproject.toml", "constraints.txt", "requirements-data.txt"} <= top
    for path in (path for folder in sorted(top) for path in (REPOSITORY / folder).rglob("*")):
        name = path.relative_to(REPOSITORY).as_posix()
        if path.is_file() and "__pycache__" not in name and not name.startswith(whole):
            empty = path.name == "__init__.py" and not path.read_bytes()
            assert name in named or empty, f"README's tree does not have {name}"


def test_the_readmes_tree_says_of_code_what_its_docstring_says():
    for path, said in tree().items():
        if path.endswith(".py"):
            docstring = ast.get_docstring(ast.parse((REPOSITORY / path).read_text("utf-8"))) or ""
            assert " ".join(docstring.split()).startswith(said.removesuffix(".")), f"README's tree: {path}"


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
