"""`trainkit show`: every key, its origin and its meaning, as a recipe that can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit.commands.show import show
from trainkit.recipe.reader import read_recipe

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

RECIPE = """\
model: {name: tiny}
data:
  train: [a.jsonl, {path: b.jsonl, format: text}]
  eval: [{path: c.jsonl}]
training: {steps: 10, learning_rate: 1e-4}
output_dir: runs/a
"""


def test_the_output_is_the_same_recipe_with_every_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    read = read_recipe("r.yaml", ["training.seed=7"])
    text = show(read)
    (tmp_path / "shown.yaml").write_text(text)
    assert read_recipe("shown.yaml").recipe == read.recipe
    lines = {line.split(":")[0].strip("- "): line for line in text.splitlines()}
    assert "# r.yaml:5  peak learning rate" in lines["learning_rate"]
    assert "# --set" in lines["seed"]
    assert "# default" in lines["weight_decay"]
    assert "[tokens] length of a row" in lines["sequence_length"]
    assert all("#" in line for line in text.splitlines() if not line.endswith(":"))
