"""The documents keep up with the program: commands parse, recipes read, names of files and links are real."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from trainkit.cli import app
from trainkit.recipe.reader import read_recipe
from trainkit.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
DOCUMENTS = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    """The code blocks of the README in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The command lines of the README's bash blocks, without their comments."""
    lines = "".join(blocks("bash")).splitlines()
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()))


def test_the_readme_has_the_two_commands() -> None:
    assert {"scripts/quickstart", "scripts/test"} <= set(commands())


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("trainkit ")])
def test_a_command_of_the_readme_parses(line: str) -> None:
    group: Any = typer.main.get_command(app)
    with group.make_context("trainkit", [], resilient_parsing=True) as context:
        name, command, arguments = group.resolve_command(context, shlex.split(line)[1:])
        assert command.make_context(name, arguments, parent=context).params


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("scripts/")])
def test_a_script_of_the_readme_can_be_run(line: str) -> None:
    script = REPOSITORY / shlex.split(line)[0]
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/usr/bin/env ")


def test_the_readmes_recipe_is_one(tmp_path: Path) -> None:
    [block] = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(block)
    read = read_recipe(str(tmp_path / "recipe.yaml"))
    assert read.warnings == ()
    assert read.recipe.output_dir == yaml.safe_load(block)["output_dir"]


def test_the_readmes_python_is_python() -> None:
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_map_names_what_is_there() -> None:
    rows = re.search(r"^## Map of the house\n(.*?)^## ", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert rows is not None
    first_cells = re.findall(r"^\| (`.*?) \|", rows.group(1), flags=re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(named) > 10
    for name in named:
        assert (REPOSITORY / name).exists(), name


def test_every_file_of_a_run_is_explained() -> None:
    text = (REPOSITORY / "docs" / "run_folder.md").read_text()
    properties = [name for name, member in vars(RunFolder).items() if isinstance(member, property)]
    assert len(properties) > 10
    for name in properties:
        assert f"`{getattr(RunFolder(Path()), name).name}" in text, name
