from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from trainkit.cli import run
from trainkit.memory.machine import is_out_of_memory

if TYPE_CHECKING:
    from pathlib import Path

BEYOND_EVERY_ADDRESS = 2**50


def take_too_much(*_: object) -> None:
    torch.empty(BEYOND_EVERY_ADDRESS)


def test_what_torch_says_on_the_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        take_too_much()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_run_that_does_not_fit_says_what_to_set(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainkit.commands.fine_tune.rehearse", take_too_much)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe))
    assert run(["fine-tune", str(tmp_path / "recipe.yaml")]) == 5
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(
        r"^error: after step 0 of 6: 4 rows of 128 tokens do not fit in the memory of cpu, which held [\d.,]+ [MG]iB "
        r"resident; a step was estimated at [\d.]+ MiB, with micro_batch_size: [12] it takes [\d.]+ MiB\. "
        r"No checkpoint was saved yet$",
        last,
    ), last
