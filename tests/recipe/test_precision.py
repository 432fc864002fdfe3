"""What a recipe's precision comes to on each device; `tests/model/test_precision.py` has what torch adds to it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trainkit.errors import MachineError
from trainkit.recipe.precision import chosen_precision


@pytest.mark.parametrize(
    ("device_type", "capability", "expected"),
    [
        ("cuda", (9, 0), "bf16"),
        ("cuda", (8, 0), "bf16"),
        ("cuda", (7, 5), "fp16"),
        ("cuda", (5, 3), "fp16"),
        ("cuda", (5, 0), "fp32"),
        ("cpu", (0, 0), "fp32"),
        ("mps", (0, 0), "fp32"),
    ],
)
def test_auto_is_never_what_the_device_would_refuse(
    device_type: str, capability: tuple[int, int], expected: Any
) -> None:
    name, reason = chosen_precision("auto", device_type, capability)
    assert name == expected
    assert reason.startswith("chosen: ")
    assert chosen_precision(name, device_type, capability) == (expected, "as the recipe says")


@pytest.mark.parametrize(
    ("requested", "device_type", "capability", "line"),
    [
        ("bf16", "cuda", (7, 5), "precision: a card has no bf16 arithmetic; set precision: fp16"),
        ("bf16", "cuda", (5, 0), "precision: a card has no bf16 arithmetic; set precision: fp32"),
        ("fp16", "cuda", (5, 2), "precision: a card has no fp16 arithmetic; set precision: fp32"),
        ("fp16", "mps", (0, 0), "precision: fp16 is not supported on mps; set precision: fp32"),
    ],
)
def test_a_refusal_names_what_the_device_can_do(
    requested: Any, device_type: str, capability: tuple[int, int], line: str
) -> None:
    with pytest.raises(MachineError, match=f"^{re.escape(line)}$"):
        chosen_precision(requested, device_type, capability, "a card")


def test_a_processor_computes_in_every_type() -> None:
    assert [chosen_precision(name, "cpu")[0] for name in ("fp32", "fp16", "bf16")] == ["fp32", "fp16", "bf16"]
