"""What is found when numbers are not finite, and how often it may be left at that."""

from __future__ import annotations

import math

import pytest
import torch

from trainkit.errors import DivergedError
from trainkit.training.faults import Fault, check_may_skip, first_not_finite
from trainkit.training.loop import Counters

IN_ONE_ROW = Fault("loss", "the loss is nan", (7,), (5, 7), "train.jsonl:3")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_element_is_enough(value: float, dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(3, 5, dtype=dtype) for name in ("first", "second", "third")}
    assert first_not_finite(tensors) is None
    tensors["second"][2, 4] = value
    assert first_not_finite(tensors) == "second"


def test_what_cannot_be_infinite_is_passed_over() -> None:
    assert first_not_finite({"packed": torch.zeros(4, dtype=torch.uint8), "none": torch.zeros(0)}) is None
    assert first_not_finite({}) is None


def test_the_largest_numbers_are_finite() -> None:
    assert first_not_finite({"weight": torch.full((64,), torch.finfo(torch.float32).max)}) is None


def test_ten_steps_one_after_another_are_too_many() -> None:
    counters = Counters(step=500, left_out=9, left_out_in_a_row=8)
    check_may_skip(counters, 1000, IN_ONE_ROW, policy="skip")
    counters.left_out_in_a_row = 9
    with pytest.raises(DivergedError, match=r"^step 501: .* row 7 \(train\.jsonl:3\); no update in 10 steps one after"):
        check_may_skip(counters, 1000, IN_ONE_ROW, policy="skip")


def test_more_than_a_twentieth_of_the_steps_are_too_many() -> None:
    counters = Counters(step=900, left_out=49)
    check_may_skip(counters, 1000, IN_ONE_ROW, policy="skip")
    counters.left_out = 50
    with pytest.raises(DivergedError, match="51 of 1000 steps without an update, 50 may be"):
        check_may_skip(counters, 1000, IN_ONE_ROW, policy="skip")


def test_a_learning_rate_that_is_not_finite_is_never_passed_over() -> None:
    fault = Fault("learning rate", "the learning rate is inf", (), (5, 7), "")
    with pytest.raises(DivergedError, match=r"^step 1: the learning rate is inf; lower training\.learning_rate$"):
        check_may_skip(Counters(), 1000, fault, policy="skip")
