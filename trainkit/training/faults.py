"""Where a number that is not finite comes from: a weight, or the rows of a step, found by running them one by one.

It is looked for only when a step has failed, from the weights and the random state that the step began with, so that a
run which goes well pays nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainkit.data.batches import make_batch
from trainkit.errors import DivergedError
from trainkit.training.random_state import restore_random_state
from trainkit.training.step import batch_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trainkit.data.packed_store import PackedRows
    from trainkit.training.loop import Counters, Trainer
    from trainkit.training.random_state import RandomState
    from trainkit.training.step import NotFiniteError

MOST_IN_A_ROW = 10  # updates left out one after another: then it is no longer the rows
MOST_SHARE = 0.05  # of all steps of the run that may go without an update; one may in any run


@dataclass(frozen=True)
class Fault:
    """What made a step come out not finite.

    ``rows`` are those that do so by themselves, of the ``rows_of_step`` that the step has; none where it takes several
    together. ``weight`` names a weight that was not finite before the step began, whatever the rows.
    """

    quantity: str
    what: str
    rows: tuple[int, ...]
    rows_of_step: tuple[int, ...]
    documents: str
    weight: str | None = None

    @property
    def of_the_rows(self) -> bool:
        """Whether other rows of the same step were well, so that it says something about these."""
        return 0 < len(self.rows) < len(self.rows_of_step)

    @property
    def named_rows(self) -> tuple[int, ...]:
        """The rows to look at: those at fault, or all of the step where no single one is."""
        return self.rows or self.rows_of_step

    def sentence(self) -> str:
        """What is not finite and where, without what to do about it."""
        if self.weight is not None:
            return f"{self.what}, and so is the weight `{self.weight}` since an earlier update"
        if self.quantity == "learning rate":
            return self.what
        count, of = len(self.rows), len(self.rows_of_step)
        if self.of_the_rows:
            which = f"in row {self.rows[0]}" if count == 1 else f"in {count} of its {of} rows"
        elif count:
            which = f"in each of its {of} rows" if of > 1 else f"in its only row, {self.rows[0]}"
        else:
            which = f"in no single one of its {of} rows, only in all together"
        return f"{self.what} before the update, {which} ({self.documents})"


def find_fault(trainer: Trainer, rows: Sequence[int], before: RandomState, error: NotFiniteError) -> Fault:
    """Look for what makes the step over ``rows`` fail with ``error``; draws random numbers, leaves no gradient.

    Every process looks at all rows of the step, so that all come to the same answer without talking.
    """
    what = str(error)
    weight = first_not_finite(trainer.local_weights())
    if weight is not None or error.quantity == "learning rate":
        return Fault(error.quantity, what, (), tuple(rows), "", weight)
    found = []
    for row in rows:
        restore_random_state(before)
        # Where weights are shared out, gradients of a single row cannot be had beside those of the step.
        backward = error.quantity != "loss" and not trainer.is_sharded
        loss, grad_norm = _alone(trainer, row, error.result.trained_tokens, backward=backward)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            found.append(row)
    return Fault(error.quantity, what, tuple(found), tuple(rows), describe_rows(trainer.rows, found or rows))


def _alone(trainer: Trainer, row: int, trained_tokens: int, *, backward: bool) -> tuple[float, float]:
    """The share of one row in the loss of its step, and the norm of its share in the gradient (0 without backward)."""
    model = trainer.accelerator.unwrap_model(trainer.loss_model)
    batch = make_batch([trainer.rows.row(row)], trainer.packing, trainer.pad_id)
    with torch.set_grad_enabled(backward):
        loss_sum, _ = model(*batch_on(trainer.accelerator.device, batch))
        loss = loss_sum / trained_tokens
    if not backward or not loss.requires_grad:
        return float(loss), 0.0
    # Not backward(): what waits for gradients of the whole step (DistributedDataParallel) must not hear of these.
    gradients = torch.autograd.grad(loss, list(trainer.trained_weights().values()), allow_unused=True)
    return float(loss.detach()), float(torch.nn.utils.get_total_norm([one for one in gradients if one is not None]))


def describe_rows(rows: PackedRows, indices: Iterable[int], most: int = 3) -> str:
    """Where the documents of these rows came from, for a message: the first few places and how many more."""
    places: list[str] = []
    for index in indices:
        places += rows.documents_of(index)
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity. One pass over each, one wait for the device."""
    floats = {name: one for name, one in tensors.items() if one.is_floating_point() and one.numel()}
    if not floats:
        return None
    # Smallest or largest is NaN or infinite exactly where an element is. One shared AVX2 core, 50 million fp32 numbers:
    # 8 to 21 ms; isfinite().all() takes 230 ms and more, and a second tensor. AdamW's update takes 88 ms.
    ends = [torch.stack(torch.aminmax(one.detach())).float() for one in floats.values()]
    finite = torch.isfinite(torch.stack([one.to(ends[0].device) for one in ends])).all(dim=1).tolist()
    return next((name for name, good in zip(floats, finite, strict=True) if not good), None)


def check_may_skip(counters: Counters, steps: int, fault: Fault, *, policy: str) -> None:
    """Raise DivergedError unless the update that ``fault`` spoiled may be left out and the run may go on.

    ``counters`` stand before the step. A weight that is not finite would spoil every later step as well, and a
    learning rate that is not finite is no property of the rows: those are never left out.
    """
    where = f"step {counters.step + 1}: {fault.sentence()}"
    lower = "lower training.learning_rate"
    if fault.weight is not None or fault.quantity == "learning rate":
        raise DivergedError(f"{where}; {lower}")
    if policy == "stop":
        advice = "look at them, or set training.not_finite: skip" if fault.of_the_rows else lower
        raise DivergedError(f"{where}; {advice}")
    check_may_leave_out(counters, steps, where)


def check_may_leave_out(counters: Counters, steps: int, what: str) -> None:
    """Raise DivergedError, which begins with ``what``, where too many updates have been left out before this step."""
    lower = "lower training.learning_rate"
    if counters.left_out_in_a_row + 1 >= MOST_IN_A_ROW:
        raise DivergedError(f"{what}; no update in {MOST_IN_A_ROW} steps one after another; {lower}")
    without, allowed = counters.left_out + 1, most_without_update(steps)
    if without > allowed:
        raise DivergedError(f"{what}; {without} of {steps} steps without an update, {allowed} may be; {lower}")


def most_without_update(steps: int) -> int:
    """How many of a run's steps a policy of the recipe may leave without an update.

    >>> [most_without_update(steps) for steps in (1, 39, 40, 1000)]
    [1, 1, 2, 50]
    """
    return max(1, int(MOST_SHARE * steps))
