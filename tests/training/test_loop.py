from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.ledger import Ledger
from trainkit.recipe.schema import Training
from trainkit.training.loop import Counters, check_against_ledger, rows_of_step
from trainkit.training.plan import Plan, make_plan


def plan_of(rows: int, rows_per_step: int, epochs: int) -> Plan:
    training = Training(epochs=epochs, tokens_per_step=rows_per_step * 8)
    return make_plan(training, rows=rows, sequence_length=8, micro_batch_size=1)


@given(rows=st.integers(1, 60), rows_per_step=st.integers(1, 20), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_epoch_visits_every_row_once(rows: int, rows_per_step: int, epochs: int, seed: int) -> None:
    plan = plan_of(rows, rows_per_step, epochs)
    visited = [row for step in range(plan.steps) for row in rows_of_step(plan, seed, step)]
    for epoch in range(epochs):
        assert sorted(visited[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_another_seed_and_another_epoch_have_another_order() -> None:
    plan = plan_of(50, 50, 2)
    first = rows_of_step(plan, 1, 0)
    assert first != rows_of_step(plan, 2, 0)
    assert first != rows_of_step(plan, 1, 1)
    assert first == rows_of_step(plan, 1, 0)


LEDGER = Ledger(
    read=14, trained=6, masked=8, rows=2, sequence_length=8, padding=2, documents=2, pieces=2, examples_read=2
)


def test_whole_epochs_must_come_out_at_the_ledger() -> None:
    plan = plan_of(2, 1, 3)
    check_against_ledger(Counters(step=4, tokens=28, trained_tokens=12), plan, LEDGER)
    with pytest.raises(AssertionError, match="2 epochs saw 28 tokens and trained 11; the ledger has 14 and 6"):
        check_against_ledger(Counters(step=4, tokens=28, trained_tokens=11), plan, LEDGER)


def test_a_part_of_an_epoch_cannot_be_compared() -> None:
    check_against_ledger(Counters(step=3, tokens=1, trained_tokens=1), plan_of(2, 1, 3), LEDGER)


def test_evaluations_are_remembered() -> None:
    counters = Counters()
    for step, loss in ((0, 3.0), (5, 1.0), (9, 2.0)):
        counters.step = step
        counters.note_evaluation(loss)
    assert vars(counters) | {} == vars(
        Counters(step=9, eval_loss_before=3.0, eval_loss=2.0, best_eval_loss=1.0, best_step=5, evaluated_step=9)
    )


@pytest.mark.parametrize("packing", [{"strategy": "best-fit"}, {"strategy": "none"}], ids=str)
def test_a_run_of_whole_epochs_trains_what_the_ledger_says(fine_tune: Any, packing: dict[str, str]) -> None:
    run = fine_tune({"training": {"steps": None, "epochs": 2}, "packing": packing, "data": {"eval": None}})
    ledger = run.summary["ledger"]
    assert run.summary["trained_tokens"] == 2 * ledger["trained_targets"]
    assert sum(line["tokens"] for line in run.lines("loss")) == 2 * ledger["tokens"]


def test_a_number_of_the_update_that_is_too_large_for_fp32_is_no_bug(
    fine_tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its bounds a learning rate may still be multiplied with something, as the 8-bit AdamW does."""

    def step(self: torch.optim.SGD) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data.add_(weight.grad, alpha=-1e39)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    says = (
        "error: step 1: a number of the update is too large for fp32; lower training.learning_rate or "
        "training.weight_decay. No checkpoint was saved yet"
    )
    with pytest.raises(AssertionError, match=re.escape(says)):
        fine_tune({"training": {"optimizer": "sgd"}})
