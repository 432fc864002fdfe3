"""The loop: a generator of step reports. Evaluating, saving and stopping are plain statements of its caller."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from trainkit.data.batches import epoch_order, make_batch
from trainkit.errors import CheckpointError
from trainkit.training.checkpoint import TrainingState
from trainkit.training.plan import Plan, learning_rate_at, position_of
from trainkit.training.random_state import capture_random_state, restore_random_state
from trainkit.training.step import StepResult, StopRequested, batch_on, training_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from accelerate import Accelerator

    from trainkit.data.batches import Batch
    from trainkit.data.ledger import Ledger
    from trainkit.data.packed_store import PackedRows
    from trainkit.model.precision import PrecisionPlan
    from trainkit.recipe.schema import Packing
    from trainkit.training.checkpoint import SavedState


@dataclass
class Counters:
    """The plain numbers of a run that a checkpoint keeps.

    ``step`` counts steps done; ``updates`` those of them that moved the weights (an fp16 overflow skips the update, and
    the learning rate follows ``updates``). ``tokens`` and ``trained_tokens`` are without padding.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None

    def note_evaluation(self, loss: float) -> None:
        """Remember an evaluation at the current step; the first one is the loss before training."""
        if self.eval_loss_before is None:
            self.eval_loss_before = loss
        self.eval_loss = loss
        self.evaluated_step = self.step
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.best_step = loss, self.step


@dataclass(frozen=True)
class StepReport:
    """What happened in one step; ``step`` counts from 1."""

    step: int
    epoch: int
    result: StepResult


@dataclass
class Trainer:
    """Everything a step touches. ``loss_model`` may be wrapped by Accelerate; ``rows`` are the training rows."""

    plan: Plan
    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    accelerator: Accelerator
    precision: PrecisionPlan
    rows: PackedRows
    packing: Packing
    pad_id: int
    seed: int
    max_grad_norm: float | None
    counters: Counters

    @property
    def model(self) -> Any:
        """The language model itself, adapter included, without the wrappers of loss and device."""
        return self.accelerator.unwrap_model(self.loss_model).model

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """The weights that train, by their name in the unwrapped model."""
        model = self.accelerator.unwrap_model(self.loss_model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def state(self, log_bytes: Mapping[str, int]) -> TrainingState:
        """Everything a checkpoint needs, as it stands between two steps."""
        return TrainingState(
            step=self.counters.step,
            weights={name: weight.detach() for name, weight in self.trained_weights().items()},
            optimizer=self.optimizer.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            random=(capture_random_state(),),
            counters=asdict(self.counters),
            log_bytes=log_bytes,
        )

    def restore(self, state: SavedState) -> None:
        """Continue from ``state``. Raises CheckpointError when its weights are not those that train here."""
        weights = self.trained_weights()
        if set(weights) != set(state.weights):
            differing = sorted(set(weights) ^ set(state.weights))
            raise CheckpointError(
                f"the checkpoint of step {state.step} trains other weights (first of {len(differing)}: "
                f"{differing[0]}); give the recipe that it was made with, or --fresh"
            )
        for name, weight in weights.items():
            weight.data.copy_(state.weights[name])
        self.optimizer.load_state_dict(state.optimizer_state())
        if self.scaler is not None and state.scaler is not None:
            self.scaler.load_state_dict(dict(state.scaler))
        known = {field.name for field in fields(Counters)}
        self.counters = Counters(**{name: value for name, value in state.counters.items() if name in known})
        restore_random_state(state.random[0])


def rows_of_step(plan: Plan, seed: int, step: int) -> list[int]:
    """Indices of the rows that the step after ``step`` finished ones trains on, over all processes.

    A function of its arguments alone: nothing is replayed on resume, and the number of processes does not matter.
    """
    epoch, index = position_of(plan, step)
    order = epoch_order(plan.rows, seed, epoch)
    return [int(row) for row in order[index * plan.rows_per_step : (index + 1) * plan.rows_per_step]]


def micro_batches(trainer: Trainer, rows: Sequence[int]) -> list[Batch]:
    """The share of ``rows`` that this process has, as micro-batches."""
    own = rows[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
    size = trainer.plan.micro_batch_size
    return [
        make_batch([trainer.rows.row(row) for row in own[start : start + size]], trainer.packing, trainer.pad_id)
        for start in range(0, len(own), size)
    ]


def train(trainer: Trainer, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
    """Do the steps that are left, yielding a report after each; return early when ``should_stop`` says so.

    Between two reports, and after an error, the trainer stands exactly at a step boundary: what ends a step in its
    middle drops that step's gradients and puts the random generators back. Raises what :func:`training_step` raises.
    """
    counters, plan = trainer.counters, trainer.plan
    while counters.step < plan.steps and not should_stop():
        before = capture_random_state()
        rows = rows_of_step(plan, trainer.seed, counters.step)
        trainer.loss_model.train()
        try:
            result = training_step(
                trainer,
                micro_batches(trainer, rows),
                learning_rate_at(plan, counters.updates),
                describe_rows=lambda rows=rows: describe_rows(trainer.rows, rows),  # type: ignore[misc]
                should_stop=should_stop,
            )
        except BaseException as error:
            trainer.optimizer.zero_grad(set_to_none=True)
            restore_random_state(before)
            if isinstance(error, StopRequested):
                return
            raise
        epoch, _ = position_of(plan, counters.step)
        counters.step += 1
        counters.updates += not result.skipped
        counters.tokens += result.tokens
        counters.trained_tokens += result.trained_tokens
        yield StepReport(step=counters.step, epoch=epoch, result=result)


def rehearse(trainer: Trainer) -> None:
    """One forward and backward pass over the longest rows, discarded: what does not fit fails here, before step 1."""
    before = capture_random_state()
    trainer.loss_model.train()
    longest = trainer.rows.longest(trainer.plan.micro_batch_size)
    batch = make_batch([trainer.rows.row(row) for row in longest], trainer.packing, trainer.pad_id)
    loss_sum, _ = trainer.loss_model(*batch_on(trainer.accelerator.device, batch))
    loss_sum.backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    restore_random_state(before)


def check_against_ledger(counters: Counters, plan: Plan, ledger: Ledger) -> None:
    """Raise AssertionError, a bug of trainkit, unless whole epochs trained exactly the tokens of the ledger.

    What was counted on its way through the model is held against what was counted when the rows were made.
    """
    epochs, rest = divmod(counters.step, plan.steps_per_epoch)
    seen, expected = (counters.tokens, counters.trained_tokens), (ledger.tokens, ledger.trained_targets)
    if rest == 0 and seen != (epochs * expected[0], epochs * expected[1]):
        raise AssertionError(
            f"{epochs} epochs saw {seen[0]} tokens and trained {seen[1]}; the ledger has {expected[0]} and "
            f"{expected[1]} for each"
        )


def describe_rows(rows: PackedRows, indices: Sequence[int], most: int = 3) -> str:
    """Where the documents of these rows came from, for a message: the first few places and how many more."""
    places: list[str] = []
    for index in indices:
        places += rows.documents_of(index)
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


def json_numbers(report: StepReport) -> dict[str, Any]:
    """The training line of metrics.jsonl."""
    result = report.result
    line: dict[str, Any] = {
        "step": report.step,
        "epoch": report.epoch,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens / result.seconds,
        "step_seconds": result.seconds,
    }
    if result.loss_scale is not None:
        line |= {"loss_scale": result.loss_scale, "skipped": result.skipped}
    return line
