"""One optimizer update. The only place that divides the loss, and the only caller of ``optimizer.step()``.

Order: accumulate → normalise → unscale → clip → check finite → step → zero. The loss of every micro-batch is divided by
the number of trained tokens of the whole step over all processes, so how the rows were cut into micro-batches or shared
out over devices does not change the gradient.

Shape legend: R rows, T tokens in a row.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from trainkit.errors import DataError, DivergedError
from trainkit.training.optimizer import set_learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator

    from trainkit.data.batches import Batch

SMALLEST_LOSS_SCALE = 2.0**-14  # below it, fp16's own smallest normal number, scaling has stopped helping


class StopRequested(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to stop between two micro-batches; the weights are as they were before the step."""


@dataclass(frozen=True)
class StepResult:
    """What one step did. ``loss`` is the mean over the trained tokens of the whole step, before the update.

    ``skipped`` means that fp16 gradients overflowed: the weights did not move and the loss scale was halved.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    learning_rate: float
    seconds: float
    skipped: bool
    loss_scale: float | None


class Stepper(Protocol):
    """What a step needs of the run; see :class:`trainkit.training.loop.Trainer`."""

    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    accelerator: Accelerator
    max_grad_norm: float | None


def training_step(
    run: Stepper,
    micro_batches: Sequence[Batch],
    learning_rate: float,
    *,
    describe_rows: Callable[[], str],
    should_stop: Callable[[], bool],
) -> StepResult:
    """Forward, backward and update over the micro-batches of one step.

    ``describe_rows`` names the documents of the step and is called only when something went wrong. Raises DivergedError
    before the update when the loss or the gradient is not finite, DataError when the step has no trained token, and
    StopRequested when ``should_stop`` says so between micro-batches; gradients are then the caller's to drop.
    """
    started = time.perf_counter()
    trained_tokens, tokens = _counts_over_all_processes(run.accelerator, micro_batches)
    if trained_tokens == 0:
        raise DataError(f"no trained token in a whole step (rows: {describe_rows()}); nothing would be learned from it")
    loss = _accumulate(run, micro_batches, trained_tokens, should_stop)
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at learning rate {learning_rate:.2g}, before the update; lower "
            f"training.learning_rate, or look at the examples: {describe_rows()}"
        )
    set_learning_rate(run.optimizer, learning_rate)
    grad_norm, skipped = _update(run, describe_rows)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        trained_tokens=trained_tokens,
        tokens=tokens,
        learning_rate=learning_rate,
        seconds=time.perf_counter() - started,
        skipped=skipped,
        loss_scale=None if run.scaler is None else run.scaler.get_scale(),
    )


def batch_on(
    device: torch.device, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[tuple[int, ...], ...]]:
    """The arguments of the loss model for ``batch``, on ``device``."""
    return (
        batch.input_ids_RT.to(device),
        batch.labels_RT.to(device),
        batch.position_ids_RT.to(device),
        batch.segment_lengths,
    )


def _counts_over_all_processes(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> tuple[int, int]:
    counts = torch.tensor(
        [sum(batch.trained_tokens for batch in micro_batches), sum(batch.tokens for batch in micro_batches)],
        device=accelerator.device,
    )
    trained_tokens, tokens = accelerator.reduce(counts, reduction="sum").tolist()
    return trained_tokens, tokens


def _accumulate(
    run: Stepper, micro_batches: Sequence[Batch], trained_tokens: int, should_stop: Callable[[], bool]
) -> float:
    """Add up gradients of loss_sum / trained_tokens; returns the mean loss over all processes."""
    device = run.accelerator.device
    total = torch.zeros((), dtype=torch.float64)
    # DistributedDataParallel averages gradients over processes; a sum is wanted.
    share = run.accelerator.num_processes / trained_tokens
    for batch in micro_batches:
        if should_stop():
            raise StopRequested
        loss_sum, _ = run.loss_model(*batch_on(device, batch))
        loss = loss_sum * share
        (loss if run.scaler is None else run.scaler.scale(loss)).backward()
        total += loss_sum.detach().double().cpu()
    if run.accelerator.num_processes > 1:
        total = run.accelerator.reduce(total.to(device), reduction="sum")
    return float(total) / trained_tokens


def _update(run: Stepper, describe_rows: Callable[[], str]) -> tuple[float, bool]:
    """Unscale, clip, check, step, zero; returns the gradient norm before clipping, and whether it was skipped."""
    parameters = [p for p in run.loss_model.parameters() if p.grad is not None]
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    limit = math.inf if run.max_grad_norm is None else run.max_grad_norm
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    finite = math.isfinite(grad_norm)
    if not finite and run.scaler is None:
        raise DivergedError(
            f"the gradient's norm is {grad_norm}, before the update; lower "
            f"training.learning_rate, or look at the examples: {describe_rows()}"
        )
    if run.scaler is None:
        run.optimizer.step()
    else:
        run.scaler.step(run.optimizer)  # does nothing when unscale_ found a number that is not finite
        run.scaler.update()
        if run.scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise DivergedError(
                f"fp16 gradients overflow at every loss scale down to {run.scaler.get_scale():g}; "
                f"rows: {describe_rows()}. Use precision: bf16 or fp32"
            )
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm, not finite
