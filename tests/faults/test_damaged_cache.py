"""Packed data that was damaged after it was looked at: the run stops in one line, and the next one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainkit.cli import run
from trainkit.data import preparation


def test_a_run_never_trains_on_damage_and_the_next_one_makes_the_data_anew(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparation, "COMPARED_AT_ONCE", 0)  # as if the store were too large to be compared at once
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe))
    assert run(["pack-data", str(recipe), "--json"]) == 0
    (flags,) = (tmp_path / "cache").glob("*/trained.bin")
    content = bytearray(flags.read_bytes())
    content[len(content) // 2] ^= 1
    flags.write_bytes(content)

    capfd.readouterr()
    assert run(["fine-tune", str(recipe)]) == 3
    said = capfd.readouterr().err
    (error,) = [line for line in said.splitlines() if "error" in line]
    assert error.startswith(f"error: {flags.parent}: trained.bin has changed since it was written")
    assert error.endswith("; run again, and it is made anew. No checkpoint was saved yet")
    assert "Traceback" not in said

    assert run(["fine-tune", str(recipe)]) == 0
    assert "it was found to be damaged; made anew" in "".join(capfd.readouterr())
    assert run(["pack-data", str(recipe)]) == 0
