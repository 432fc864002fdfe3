from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import UsageError
from trainkit.recipe.schema import Training
from trainkit.training.plan import Plan, learning_rate_at, make_plan, position_of


def plan_of(**training: object) -> Plan:
    recipe = Training(**{"epochs": 1, "tokens_per_step": 2048, **training})  # type: ignore[arg-type]
    return make_plan(recipe, rows=100, sequence_length=256, micro_batch_size=2)


def test_epochs_become_steps_and_the_last_step_of_an_epoch_may_be_short() -> None:
    plan = plan_of(epochs=3)
    assert (plan.rows_per_step, plan.steps_per_epoch, plan.steps) == (8, 13, 39)
    assert plan.epochs == 3


def test_steps_are_taken_as_given() -> None:
    plan = plan_of(epochs=None, steps=20)
    assert plan.steps == 20
    assert position_of(plan, 14) == (1, 1)


def test_a_fraction_of_an_epoch() -> None:
    assert plan_of(epochs=0.5).steps == 7


def test_fewer_rows_than_processes_is_refused() -> None:
    with pytest.raises(UsageError, match="give at least 4096"):
        make_plan(
            Training(epochs=1, tokens_per_step=2048), rows=9, sequence_length=256, micro_batch_size=1, processes=16
        )


def test_micro_batch_is_cut_to_what_a_process_has() -> None:
    recipe = Training(epochs=1, tokens_per_step=2048)
    plan = make_plan(recipe, rows=100, sequence_length=256, micro_batch_size=64, processes=2)
    assert (plan.micro_batch_size, plan.micro_batches_per_step) == (4, 1)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "wsd"])
def test_schedule_starts_above_zero_peaks_once_warm_and_never_rises_after(scheduler: str) -> None:
    plan = plan_of(epochs=None, steps=100, lr_scheduler=scheduler, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate_at(plan, update) for update in range(plan.steps)]
    assert 0 < rates[0] < rates[9] < rates[10] == 2.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert all(rate > 0 for rate in rates)
    end = {"constant": 2.0, "linear": 2 / 90, "cosine": 1 - math.cos(math.pi / 90), "wsd": 2 / 90 / 0.2}
    assert rates[-1] == pytest.approx(end[scheduler])


def test_wsd_is_stable_until_its_last_fifth() -> None:
    plan = plan_of(epochs=None, steps=100, lr_scheduler="wsd", warmup_steps=0, learning_rate=1.0)
    assert learning_rate_at(plan, 80) == pytest.approx(1.0)
    assert learning_rate_at(plan, 90) == pytest.approx(0.5)


@given(rows=st.integers(1, 500), per_step=st.integers(1, 64), micro=st.integers(1, 64), epochs=st.integers(1, 4))
def test_every_row_is_in_exactly_one_step_of_an_epoch(rows: int, per_step: int, micro: int, epochs: int) -> None:
    recipe = Training(epochs=epochs, tokens_per_step=per_step * 32)
    plan = make_plan(recipe, rows=rows, sequence_length=32, micro_batch_size=micro)
    assert (plan.steps_per_epoch - 1) * plan.rows_per_step < rows <= plan.steps_per_epoch * plan.rows_per_step
    assert plan.steps == epochs * plan.steps_per_epoch
    assert plan.micro_batches_per_step * plan.micro_batch_size >= plan.rows_per_step
