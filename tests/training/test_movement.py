"""Weights that should have moved, and did or did not."""

from __future__ import annotations

import pytest
import torch

from trainkit.errors import DivergedError
from trainkit.training.movement import UPDATES, Movement, fingerprint


def weights() -> dict[str, torch.Tensor]:
    return {f"layers.0.lora_{factor}.default.weight": torch.randn(40, 50) for factor in "AB"}


def after(weights: dict[str, torch.Tensor], *moved: str, updates: int = UPDATES) -> tuple[str, ...]:
    movement = Movement(weights)
    for name in weights:
        if name.split(".")[2] in moved:
            weights[name] += 1e-3
    for _ in range(updates):
        assert not movement.is_due(warming_up=False, at_the_end=False)
        movement.note_update(1e-3, 1.0)
    assert movement.is_due(warming_up=False, at_the_end=True)
    return movement.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [7, 8])
def test_the_smallest_change_of_one_element_shows(dtype: torch.dtype, columns: int) -> None:
    tensor = torch.randn(31, columns, dtype=dtype)
    before = fingerprint(tensor)
    tensor[3, 2] = torch.nextafter(tensor[3, 2], torch.tensor(9.0, dtype=dtype))
    assert fingerprint(tensor) != before
    assert fingerprint(tensor) == fingerprint(tensor.clone())


def test_all_that_moved_is_well_and_asked_once() -> None:
    assert after(weights(), "lora_A", "lora_B") == ()
    movement = Movement(weights())
    movement.note_update(1.0, 1.0)
    with pytest.raises(DivergedError):
        movement.check()
    assert not movement.is_due(warming_up=False, at_the_end=True)


def test_what_stood_still_is_named() -> None:
    assert after(weights(), "lora_B") == ("layers.0.lora_A.default.weight",)


def test_an_adapter_whose_second_factors_stay_does_nothing() -> None:
    with pytest.raises(DivergedError, match=r"none of the adapter's second factors changed in 5 updates .*lora_B"):
        after(weights(), "lora_A")


def test_a_few_elements_are_no_training() -> None:
    matrix = {"weight": torch.randn(100, 100)}
    movement = Movement(matrix)
    matrix["weight"][0, :2] += 1.0
    movement.note_update(1e-9, 1.0)
    with pytest.raises(DivergedError, match=r"^\d\.\d% of the trained weights changed in 1 update at .* up to 1e-09; "):
        movement.check()


def test_a_warm_up_is_waited_for_but_not_the_end() -> None:
    movement = Movement(weights())
    assert not movement.is_due(warming_up=False, at_the_end=True)  # no update: nothing to judge
    for _ in range(UPDATES):
        movement.note_update(1e-9, 1.0)
    assert not movement.is_due(warming_up=True, at_the_end=False)
    assert movement.is_due(warming_up=True, at_the_end=True)
    assert movement.is_due(warming_up=False, at_the_end=False)
