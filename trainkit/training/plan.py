"""The numbers of a run, fixed before its first step: how many steps, of which rows, at which learning rate.

Pure and torch-free: a recipe, a number of rows and a number of processes go in, a :class:`Plan` comes out. The learning
rate is a function of the number of updates done and of nothing else, so it needs no state in a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainkit.errors import UsageError

if TYPE_CHECKING:
    from trainkit.recipe.schema import Training

DEFAULT_WARMUP_RATIO = 0.03
DECAY_SHARE_OF_WSD = 0.2  # "warmup, stable, decay": the last fifth falls to zero


@dataclass(frozen=True)
class Plan:
    """What a run will do. A step is one optimizer update; an epoch is one pass over the rows.

    ``steps`` counts updates over the whole run; the last step of an epoch may hold fewer rows than the others, since
    no step reaches from one epoch into the next.
    """

    rows: int
    rows_per_step: int
    micro_batch_size: int
    processes: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    learning_rate: float
    lr_scheduler: Literal["constant", "linear", "cosine", "wsd"]

    @property
    def micro_batches_per_step(self) -> int:
        """Forward passes of one process in a full step (gradient accumulation)."""
        return math.ceil(self.rows_per_step / (self.micro_batch_size * self.processes))

    @property
    def epochs(self) -> float:
        """Passes over the rows that the steps amount to."""
        return self.steps / self.steps_per_epoch

    def sentence(self) -> str:
        """The plan in one line."""
        return (
            f"{self.steps} steps of {self.rows_per_step} rows ({self.epochs:.3g} epochs of {self.rows} rows): "
            f"micro-batch {self.micro_batch_size} x accumulation {self.micro_batches_per_step} x "
            f"{self.processes} process{'es' if self.processes > 1 else ''}; learning rate {self.learning_rate:g}, "
            f"{self.lr_scheduler}, {self.warmup_steps} warm-up steps"
        )


def make_plan(
    training: Training, *, rows: int, sequence_length: int, micro_batch_size: int, processes: int = 1
) -> Plan:
    """Turn the recipe's training section into steps.

    ``micro_batch_size`` is the resolved number (the recipe may say ``auto``); more rows than a process has in a step
    are not needed and are cut to that. Raises UsageError when a step has fewer rows than there are processes.

    >>> from trainkit.recipe.schema import Training
    >>> training = Training(epochs=2, tokens_per_step=4096, warmup_ratio=0.1)
    >>> plan = make_plan(training, rows=100, sequence_length=256, micro_batch_size=4)
    >>> plan.rows_per_step, plan.steps_per_epoch, plan.steps, plan.micro_batches_per_step, plan.warmup_steps
    (16, 7, 14, 4, 1)
    """
    rows_per_step = training.tokens_per_step // sequence_length
    if rows_per_step < processes:
        raise UsageError(
            f"training.tokens_per_step: {training.tokens_per_step} tokens are {rows_per_step} rows of "
            f"{sequence_length}, fewer than the {processes} processes; give at least {processes * sequence_length}"
        )
    steps_per_epoch = math.ceil(rows / rows_per_step)
    steps = training.steps if training.steps is not None else math.ceil((training.epochs or 1) * steps_per_epoch)
    return Plan(
        rows=rows,
        rows_per_step=rows_per_step,
        micro_batch_size=min(micro_batch_size, math.ceil(rows_per_step / processes)),
        processes=processes,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=warmup_steps(training, steps),
        learning_rate=training.learning_rate,
        lr_scheduler=training.lr_scheduler,
    )


def warmup_steps(training: Training, steps: int) -> int:
    """Warm-up in steps, from ``warmup_steps`` or ``warmup_ratio`` (rounded down, so that short runs have none)."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    ratio = DEFAULT_WARMUP_RATIO if training.warmup_ratio is None else training.warmup_ratio
    return int(ratio * steps)


def learning_rate_at(plan: Plan, updates: int) -> float:
    """Learning rate of the update that follows ``updates`` finished ones.

    The warm-up is linear and starts above zero, so that no step is wasted: update u of w takes (u + 1) / (w + 1) of
    the peak. After it the shapes are functions of progress p in [0, 1): constant 1, linear 1 - p,
    cosine (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, one cycle, to zero), wsd 1 and then linear over the last
    fifth.

    >>> from trainkit.recipe.schema import Training
    >>> training = Training(steps=10, tokens_per_step=512, learning_rate=1.0, lr_scheduler="linear", warmup_steps=4)
    >>> plan = make_plan(training, rows=100, sequence_length=256, micro_batch_size=1)
    >>> [round(learning_rate_at(plan, update), 3) for update in range(10)]
    [0.2, 0.4, 0.6, 0.8, 1.0, 0.833, 0.667, 0.5, 0.333, 0.167]
    """
    if updates < plan.warmup_steps:
        return plan.learning_rate * (updates + 1) / (plan.warmup_steps + 1)
    progress = (updates - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    if plan.lr_scheduler == "constant":
        factor = 1.0
    elif plan.lr_scheduler == "linear":
        factor = 1.0 - progress
    elif plan.lr_scheduler == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = min(1.0, (1.0 - progress) / DECAY_SHARE_OF_WSD)
    return plan.learning_rate * factor


def position_of(plan: Plan, step: int) -> tuple[int, int]:
    """(epoch, step within the epoch) of the step that follows ``step`` finished ones: O(1), no replay."""
    return divmod(step, plan.steps_per_epoch)
