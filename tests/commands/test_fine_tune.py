"""What a run says of its memory, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from trainkit.cli import run

KEYS = {"memory_predicted_bytes", "memory_measured_bytes"}


def test_the_second_step_stands_beside_its_prediction(fine_tune: Any) -> None:
    finished = fine_tune({"training": {"steps": 3}})
    lines = {line["step"]: line for line in finished.lines("loss")}
    assert [bool(KEYS & lines[step].keys()) for step in (1, 2, 3)] == [False, True, False]
    predicted = finished.summary["peak_memory_predicted_bytes"]
    saved = finished.folder / "checkpoints" / "step-000003"
    tensors = [load_file(saved / f"{kind}.safetensors") for kind in ("weights", "optimizer")]
    copied = sum(tensor.nbytes for group in tensors for tensor in group.values())
    assert lines[2]["memory_predicted_bytes"] + copied == predicted  # the copy that is saved beside training
    assert 0 < lines[2]["memory_measured_bytes"] <= finished.summary["peak_memory_measured_bytes"]
    assert predicted > 0


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_read(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def never(*_given: object, **_named: object) -> None:
        raise AssertionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainkit.memory.fit.available_memory_bytes", lambda _device: 2**20)
    monkeypatch.setattr("trainkit.training.assembly.load_model", never)
    (tmp_path / "recipe.yaml").write_text(json.dumps(small_recipe))
    assert run(["fine-tune", "recipe.yaml"]) == 5
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: memory: a step with 4 rows of 128 tokens takes ")
    assert "cpu has 1.0 MiB free" in line
