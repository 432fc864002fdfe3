"""The folder that a case breaks one thing in, and what must be said of it.

A case takes a recipe, a data file and a model folder that work, breaks one thing, and runs one command line. What is
held to: the exit code, one line of at most 200 characters that names the place and the way out, no traceback, nothing
written or deleted, and whether a weight had been loaded by then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from trainkit.cli import run
from trainkit.model.loading import LoadedModel, load_model

Said = pytest.CaptureFixture[str]
LONGEST_LINE = 200
POSITIONS = 256  # of the tiny model
OUTPUT = "run"  # output_dir of the recipe


def conversation(number: int, answer: str = "the lazy dog") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{number}: what is it?"},
            {"role": "assistant", "content": answer},
        ]
    }


GOOD_LINES = [json.dumps(conversation(number)) for number in range(12)]


@dataclass
class Room:
    """A folder with `recipe.yaml` (from `recipe`), `train.jsonl` and `model/`, all of which work until broken."""

    folder: Path
    recipe: dict[str, Any]
    monkeypatch: pytest.MonkeyPatch
    _written: str = ""

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def set(self, key: str, value: Any) -> None:
        *sections, name = key.split(".")
        target = self.recipe
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value

    def take_out(self, key: str) -> None:
        *sections, name = key.split(".")
        target = self.recipe
        for section in sections:
            target = target[section]
        del target[name]

    def write_lines(self, *lines: str | dict[str, Any]) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.data.write_text("\n".join(texts) + "\n")

    def edit_json(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the model; None takes one out."""
        path = self.model / name
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})

    def shard(self) -> None:
        """Cut the weights into two shards with an index."""
        tensors = load_file(self.weights)
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, self.model / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        self.weights.unlink()

    def template(self, text: str) -> None:
        (self.folder / "chat.jinja").write_text(text)
        self.set("data.chat_template", "chat.jinja")

    def without_package(self, name: str) -> None:
        there = importlib.util.find_spec
        self.monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda asked, package=None: None if asked == name else there(asked, package),
        )

    def write_recipe(self) -> Path:
        """`recipe.yaml` as `recipe` says, unless a case has written one itself."""
        path = self.folder / "recipe.yaml"
        if not path.exists() or (path.is_file() and path.read_bytes() == self._written.encode()):
            self._written = yaml.safe_dump(self.recipe)
            path.write_text(self._written)
        return path

    def append_to_recipe(self, text: str) -> None:
        """Add lines that no dictionary can hold."""
        path = self.write_recipe()
        path.write_text(path.read_text() + text)

    def replace_in_recipe(self, old: str, new: str) -> None:
        """Change the recipe's text."""
        path = self.write_recipe()
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    def fine_tune(self, *arguments: str) -> int:
        return run(["fine-tune", self.write_recipe().name, *arguments])


def content_of(folder: Path) -> dict[str, str]:
    """Everything below `folder`: relative path → kind, time of change and content.

    The time of output_dir itself is left out: a file is made and deleted there to see whether that can be done.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        name = str(path.relative_to(folder))
        found[name] = content if name == OUTPUT else f"{path.lstat().st_mtime_ns} {content}"
    return found


def error_lines(capfd: Said, folder: Path) -> list[str]:
    """What stands behind `error: `, without the length of this machine's paths."""
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    lines = said.err.replace(f"{folder}/", "").replace(str(folder), ".").splitlines()
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


FINE_TUNE = ("fine-tune", "recipe.yaml")
AT = r"^recipe\.yaml:\d+:\d+: "


@dataclass(frozen=True)
class Case:
    """One thing that is broken, and what must be said of it. `in_weights`: it can only be found by loading them."""

    name: str
    break_it: Callable[[Room], object]
    code: int
    says: str
    in_weights: bool = False
    command: tuple[str, ...] = FINE_TUNE


def added(lines: str) -> Callable[[Room], object]:
    return lambda room: room.append_to_recipe(lines)


def given(key: str, value: object) -> Callable[[Room], object]:
    return lambda room: room.set(key, value)


def instead(old: str, new: str) -> Callable[[Room], object]:
    return lambda room: room.replace_in_recipe(old, new)


def both(*changes: Callable[[Room], object]) -> Callable[[Room], object]:
    """One change after the other."""

    def make(room: Room) -> None:
        for change in changes:
            change(room)

    return make


def check_refused(case: Case, room: Room, capfd: Said) -> None:
    case.break_it(room)
    room.write_recipe()
    loads = []

    def noted(*arguments: Any) -> LoadedModel:
        loads.append(arguments)
        return load_model(*arguments)

    room.monkeypatch.setattr("trainkit.training.assembly.load_model", noted)
    before = content_of(room.folder)
    capfd.readouterr()

    code = run(case.command)

    lines = error_lines(capfd, room.folder)
    assert (code, len(lines)) == (case.code, 1), lines
    (line,) = lines
    assert re.search(case.says, line), line
    assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line}"
    assert content_of(room.folder) == before
    assert bool(loads) == case.in_weights


def named(cases: list[Case]) -> list[Any]:
    """The cases as parameters of a test, each by its name."""
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]
