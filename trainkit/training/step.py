"""One optimizer update. The only place that divides the loss, and the only caller of ``optimizer.step()``.

Order: accumulate → normalise → unscale → clip → check finite → step → zero. The loss of every micro-batch is divided by
the number of trained tokens of the whole step over all processes, so how the rows were cut into micro-batches or shared
out over devices does not change the gradient.

Shape legend: R rows, T tokens in a row.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from trainkit.errors import DataError, DivergedError
from trainkit.model.sharding import whole
from trainkit.training.optimizer import set_learning_rate
from trainkit.training.processes import sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from accelerate import Accelerator

    from trainkit.data.batches import Batch

SMALLEST_LOSS_SCALE = 2.0**-14  # below it, fp16's own smallest normal number, scaling has stopped helping


class StopRequested(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to stop between two micro-batches; the weights are as they were before the step."""


@dataclass(frozen=True)
class StepResult:
    """What one step did. ``loss`` is the mean over the trained tokens of the whole step, before the update.

    ``grad_norm`` is NaN where no gradient was looked at. ``skipped`` means that the weights did not move: fp16
    gradients overflowed and the loss scale was halved, the step came out not finite, or it was to be left out.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    learning_rate: float
    seconds: float
    skipped: bool
    loss_scale: float | None


class NotFiniteError(DivergedError):
    """A number of a step is not finite; the weights are as they were before it.

    ``quantity`` says which one, and ``value`` what it is; ``result`` is the step as far as it came, without an update.
    """

    def __init__(
        self, quantity: Literal["learning rate", "loss", "gradient's norm"], value: float, result: StepResult
    ) -> None:
        super().__init__(f"the {quantity} is {value}")
        self.quantity = quantity
        self.result = result


class HalfUpdatedError(RuntimeError):
    """The optimizer failed in the middle of an update: some weights have moved and others have not.

    What it failed of is its ``__cause__``.
    """


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
    leave_out: Callable[[float], bool] = lambda _loss: False,
) -> StepResult:
    """Forward, backward and update over the micro-batches of one step.

    Every process has the same number of micro-batches, and all return the same.
    ``describe_rows`` names the documents of the step and is called only when something went wrong. Before the update
    it raises NotFiniteError when the learning rate, the loss or the gradient is not finite, DivergedError when fp16
    overflows at every loss scale, DataError when the step has no trained token, and StopRequested when ``should_stop``
    says so between micro-batches; gradients are then the caller's to drop. HalfUpdatedError says that the update
    itself failed, DivergedError that a number in it is too large for fp32. Where ``leave_out`` says so of the loss,
    there is no update, and the gradients are dropped.
    """
    started = time.perf_counter()
    trained_tokens, tokens = _counts_over_all_processes(run.accelerator, micro_batches)
    if trained_tokens == 0:
        raise DataError(f"no trained token in a whole step (rows: {describe_rows()}); nothing would be learned from it")

    def result(loss: float, grad_norm: float, *, skipped: bool) -> StepResult:
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

    if not math.isfinite(learning_rate):
        raise NotFiniteError("learning rate", learning_rate, result(math.nan, math.nan, skipped=True))
    loss = _accumulate(run, micro_batches, trained_tokens, should_stop)
    if not math.isfinite(loss):
        raise NotFiniteError("loss", loss, result(loss, math.nan, skipped=True))
    if leave_out(loss):
        run.optimizer.zero_grad(set_to_none=True)
        return result(loss, math.nan, skipped=True)
    grad_norm = _clip(run)
    overflowed = not math.isfinite(grad_norm)
    if overflowed and run.scaler is None:
        raise NotFiniteError("gradient's norm", grad_norm, result(loss, grad_norm, skipped=True))
    set_learning_rate(run.optimizer, learning_rate)
    _update(run, describe_rows)
    return result(loss, grad_norm, skipped=overflowed)


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
    for left, batch in zip(range(len(micro_batches) - 1, -1, -1), micro_batches, strict=True):
        if should_stop():
            raise StopRequested
        with _gradients_kept_here(run) if left else nullcontext():
            loss_sum, _ = run.loss_model(*batch_on(device, batch))
            loss = loss_sum * share
            (loss if run.scaler is None else run.scaler.scale(loss)).backward()
        total += loss_sum.detach().double().cpu()
    return sums(run.accelerator, [float(total)])[0] / trained_tokens


def _gradients_kept_here(run: Stepper) -> AbstractContextManager[Any]:
    """With whole models in several processes, add gradients up here: they are exchanged once, in the last backward."""
    from torch.nn.parallel import DistributedDataParallel

    return run.loss_model.no_sync() if isinstance(run.loss_model, DistributedDataParallel) else nullcontext()


def _clip(run: Stepper) -> float:
    """Unscale and clip the gradients; returns their norm over all weights before clipping."""
    parameters = [p for p in run.loss_model.parameters() if p.grad is not None]
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    limit = math.inf if run.max_grad_norm is None else run.max_grad_norm
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))


def _update(run: Stepper, describe_rows: Callable[[], str]) -> None:
    """Move the weights and drop the gradients; with fp16, only where no gradient overflowed."""
    try:
        if run.scaler is None:
            run.optimizer.step()
        else:
            run.scaler.step(run.optimizer)  # does nothing when unscale_ found a number that is not finite
    except (RuntimeError, MemoryError) as error:
        if "without overflow" in str(error):  # as torch says of a number of ours that is too large for the weights
            raise DivergedError(
                "a number of the update is too large for fp32; lower training.learning_rate or training.weight_decay"
            ) from error
        raise HalfUpdatedError(str(error)) from error
    if run.scaler is not None:
        run.scaler.update()
        if run.scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise DivergedError(
                f"fp16 gradients overflow at every loss scale down to {run.scaler.get_scale():g}; "
                f"rows: {describe_rows()}. Use precision: bf16 or fp32"
            )
    run.optimizer.zero_grad(set_to_none=True)
