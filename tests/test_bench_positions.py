"""`scripts/bench positions`: what it measures where that is certain, and all of it at its smallest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import positions_identity
from benchmarks.command import main
from benchmarks.positions import plot


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_rope_does_not_see_a_shift_and_learned_positions_do(precision: str, bound: float) -> None:
    lines = {
        (line["model"], line["precision"]): line
        for line in positions_identity.shifted_documents(None, only=("RoPE", "learned (GPT-2)"))
    }
    rope, learned = lines["RoPE", precision], lines["learned (GPT-2)", precision]
    assert max(rope["moved"][offset] for offset in (100, 1_000, 10_000)) < bound
    assert learned["moved"][100] > 0.1
    assert learned["moved"][10_000] is None, "it has 2,048 positions"


def test_rope_that_is_scaled_by_the_largest_position_sees_it() -> None:
    lines = positions_identity.shifted_documents(None, only=("RoPE, longrope", "RoPE, dynamic"))
    for line in lines:
        if line["precision"] == "fp32":
            assert line["moved"][100] < 1e-5
            assert line["moved"][1_000] > 1e-3, "beyond the original positions"


def test_alibi_is_refused_and_its_bias_depends_on_the_shift_in_16_bit_alone() -> None:
    refused = {
        line["model"]: line.get("refusal") for line in positions_identity.shifted_documents(None, only=("ALiBi",))
    }
    assert len(refused) == 3
    assert all(refused.values())
    exact, rounded = positions_identity.shifted_biases()
    assert exact["moved"][10_000] < 1e-2
    assert rounded["moved"][10_000] > 0.1


@pytest.mark.long
def test_every_way_to_pack_is_trained_and_evaluated_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRAINKIT_MATERIAL", str(tmp_path / "nothing"))
    assert main(["positions", "--quick", "--part", "training", "--json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["training"]
    summary: dict[str, dict[str, Any]] = {one["arm"]: one for one in case["summary"]}
    before = {run["curve"][0][1] for run in case["runs"]}
    assert len(before) == 1, "untrained, all are the same model on the same documents"
    assert abs(summary["packed, isolated"]["against_reference"]) < 1e-4
    assert abs(summary["packed, separator only"]["against_reference"]) > 1e-4
    a_step = [one["trained_tokens_per_step"] for one in summary.values()]
    assert max(a_step) < 1.1 * min(a_step)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.positions_training import ARMS

    runs = [{"arm": arm, "seed": 0, "curve": [(0, 3.0), (100, 2.0)]} for arm in ARMS]
    file = tmp_path / "curves.svg"
    plot([{"case": "a case", "runs": runs}], file)
    assert "<svg" in file.read_text()
    first = file.read_bytes()
    plot([{"case": "a case", "runs": runs}], file)
    assert file.read_bytes() == first, "the same numbers are the same picture"
