"""The room of the cases: a folder in which everything works until it is broken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_input.room import GOOD_LINES, Room


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data of all cases: most of them have the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def room(
    tmp_path: Path, tiny_model_folder: Path, small_recipe: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Room:
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRAINKIT_CACHE", str(cache))
    shutil.copytree(tiny_model_folder, folder / "model")
    small_recipe["model"]["name"] = "model"
    small_recipe["data"] = {"train": "train.jsonl", "eval": 0.3}
    small_recipe["output_dir"] = "run"
    small_recipe["training"] |= {"steps": 2, "tokens_per_step": 512}
    small_recipe["evaluation"] = {"every_steps": 1, "samples": 0}
    made = Room(folder, small_recipe, monkeypatch)
    made.write_lines(*GOOD_LINES)
    return made
