"""The loop: a generator of step reports. Evaluating, saving and stopping are plain statements of its caller."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from trainkit.data.batches import attention_work, empty_batch, epoch_order, make_batch, share_out
from trainkit.errors import CheckpointError, DataError, DivergedError, first_line
from trainkit.model.sharding import give_back, is_shard, local_part, part_like, rows_of_part
from trainkit.training.checkpoint import Share, TrainingState, leaves
from trainkit.training.faults import (
    Fault,
    check_may_leave_out,
    check_may_skip,
    describe_rows,
    find_fault,
    first_not_finite,
)
from trainkit.training.movement import UPDATES, Movement
from trainkit.training.plan import Plan, learning_rate_at, position_of
from trainkit.training.processes import gathered, sums
from trainkit.training.random_state import RandomState, capture_random_state, restore_random_state, seed_everything
from trainkit.training.spikes import WINDOW, spike_score
from trainkit.training.step import NotFiniteError, StepResult, StopRequested, batch_on, training_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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

    ``step`` counts steps done; ``updates`` those of them that moved the weights (an fp16 overflow and a step that is
    left out have none, and the learning rate follows ``updates``). ``tokens`` are without padding;
    of those to train, ``trained_tokens`` are in an update and ``skipped_tokens`` in a step that had none.
    ``left_out`` counts the steps that `training.not_finite: skip` or `training.loss_spike: skip` left without an
    update. ``recent_losses`` is what a loss spike is told from, oldest first. ``evaluation_missing``: the run was
    stopped in the evaluation after its last step, which is made up for even where the run has become longer since.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped_tokens: int = 0
    left_out: int = 0
    left_out_in_a_row: int = 0
    spikes: int = 0
    in_spike: bool = False
    recent_losses: list[float] = field(default_factory=list)
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None
    evaluation_missing: bool = False

    def note_evaluation(self, loss: float) -> None:
        """Remember an evaluation at the current step; the first one is the loss before training."""
        if self.eval_loss_before is None:
            self.eval_loss_before = loss
        self.eval_loss = loss
        self.evaluated_step = self.step
        self.evaluation_missing = False
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.best_step = loss, self.step

    def note_step(self, result: StepResult, *, left_out: bool) -> None:
        """Count a step that is done; ``left_out``: it has no update, and that is not fp16's doing."""
        self.step += 1
        self.tokens += result.tokens
        self.left_out += left_out
        self.left_out_in_a_row = self.left_out_in_a_row + 1 if left_out else 0
        if result.skipped:
            self.skipped_tokens += result.trained_tokens
        else:
            self.updates += 1
            self.trained_tokens += result.trained_tokens

    def note_loss(self, loss: float) -> tuple[float | None, bool]:
        """Compare a loss with those before it; returns its score where it is a spike, and whether a spike begins."""
        score = spike_score(loss, self.recent_losses)
        begins = score is not None and not self.in_spike
        self.spikes += begins
        self.in_spike = score is not None
        self.recent_losses = [*self.recent_losses, loss][-WINDOW:]
        return score, begins


@dataclass(frozen=True)
class StepReport:
    """What happened in one step; ``step`` counts from 1.

    ``spike`` is how far its loss stands above those before it, where that is far; ``spike_begins`` in the first such
    step of several. ``left_out``: a policy of the recipe left out its update, because of ``fault`` where there is one,
    else because of ``spike``. ``rows`` and ``documents`` are those of a fault or a spike. ``unmoved`` are weights that
    the first updates did not change.
    """

    step: int
    epoch: int
    result: StepResult
    fault: Fault | None = None
    left_out: bool = False
    spike: float | None = None
    spike_begins: bool = False
    rows: tuple[int, ...] = ()
    documents: str = ""
    unmoved: tuple[str, ...] = ()


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
    not_finite: Literal["stop", "skip"]
    loss_spike: Literal["report", "skip"]
    counters: Counters

    @property
    def model(self) -> Any:
        """The language model itself, adapter included, without the wrappers of loss and device."""
        return self.accelerator.unwrap_model(self.loss_model).model

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are shared out over the processes (FSDP2)."""
        return any(is_shard(weight) for weight in self.trained_weights().values())

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """The weights that train, by their name in the unwrapped model; shards, where they are shared out."""
        model = self.accelerator.unwrap_model(self.loss_model)
        give_back(model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def local_weights(self) -> dict[str, torch.Tensor]:
        """What of the weights that train lies in this process."""
        return {name: local_part(weight) for name, weight in self.trained_weights().items()}

    def state(self, log_bytes: Mapping[str, int]) -> TrainingState:
        """Everything a checkpoint needs, as it stands between two steps.

        Raises DivergedError when a weight or a number of the optimizer is not finite: such a state is never saved.
        """
        weights = {name: weight.detach() for name, weight in self.trained_weights().items()}
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{name}": value
            for index, entry in optimizer["state"].items()
            for name, value in leaves(entry)
            if isinstance(value, torch.Tensor)
        }
        local = {name: local_part(weight) for name, weight in weights.items()}
        named = {f"{name} in the optimizer's state": local_part(value) for name, value in moments.items()}
        spoiled = first_not_finite(local | named)
        if spoiled is not None:
            raise DivergedError(
                f"after step {self.counters.step}: `{spoiled}` is not finite, so this state was not saved; "
                "lower training.learning_rate"
            )
        return TrainingState(
            step=self.counters.step,
            weights=local,
            optimizer={
                **optimizer,
                "state": {
                    index: {name: _local(value) for name, value in entry.items()}
                    for index, entry in optimizer["state"].items()
                },
            },
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            random=tuple(
                RandomState.from_bytes(own) for own in gathered(self.accelerator, capture_random_state().to_bytes())
            ),
            counters=asdict(self.counters),
            log_bytes=log_bytes,
            share=self._share(weights, moments),
        )

    def _share(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> Share:
        def rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
            cut = {name: tensor for name, tensor in tensors.items() if is_shard(tensor)}
            return {name: (rows_of_part(tensor)[0], tensor.shape[0]) for name, tensor in cut.items()}

        if not rows(weights):
            return Share()
        return Share(self.accelerator.process_index, self.accelerator.num_processes, rows(weights), rows(moments))

    def restore(self, state: SavedState) -> None:
        """Continue from ``state``. Raises CheckpointError when its weights are not those that train here."""
        weights = self.trained_weights()
        if set(weights) != set(state.weights):
            differing = sorted(set(weights) ^ set(state.weights))
            raise CheckpointError(
                f"the checkpoint of step {state.step} trains other weights (first of {len(differing)}: "
                f"{differing[0]}); give the recipe that it was made with, or --fresh"
            )
        try:
            for name, weight in weights.items():
                saved = state.weights.read(name, *rows_of_part(weight)) if is_shard(weight) else state.weights[name]
                local_part(weight.data).copy_(saved)
            self.optimizer.load_state_dict(state.optimizer_state(self._moment_reader(state)))
        except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {state.step} does not fit this run: {first_line(error)}; --fresh begins anew"
            ) from error
        if self.scaler is not None and state.scaler is not None:
            self.scaler.load_state_dict(dict(state.scaler))
        known = {field.name for field in fields(Counters)}
        self.counters = Counters(**{name: value for name, value in state.counters.items() if name in known})
        rank = self.accelerator.process_index
        if rank < len(state.random):
            restore_random_state(state.random[rank])
        else:  # it was saved by fewer processes
            seed_everything(self.seed + state.step, rank)

    def _moment_reader(self, state: SavedState) -> Callable[[str], torch.Tensor]:
        """How a tensor of the optimizer is read: with the rows of its weight, where that is shared out."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def read(key: str) -> torch.Tensor:
            weight = parameters[int(key.partition(".")[0])]
            if not is_shard(weight) or state.optimizer.rows(key) != weight.shape[0]:
                return state.optimizer[key]
            return part_like(state.optimizer.read(key, *rows_of_part(weight)), weight)

        return read


def _local(value: Any) -> Any:
    """What an optimizer keeps for a parameter, with the part of each tensor that lies here."""
    if isinstance(value, dict):
        return {name: _local(part) for name, part in value.items()}
    return local_part(value) if isinstance(value, torch.Tensor) else value


def rows_of_step(plan: Plan, seed: int, step: int) -> list[int]:
    """Indices of the rows that the step after ``step`` finished ones trains on, over all processes.

    A function of its arguments alone: nothing is replayed on resume, and the number of processes does not matter.
    """
    epoch, index = position_of(plan, step)
    order = epoch_order(plan.rows, seed, epoch)
    return [int(row) for row in order[index * plan.rows_per_step : (index + 1) * plan.rows_per_step]]


def micro_batches(trainer: Trainer, rows: Sequence[int]) -> list[Batch]:
    """The share of ``rows`` that this process has, as micro-batches; as many in every process.

    Rows are shared out so that all have about the same attention to compute.
    """
    size, processes = trainer.plan.micro_batch_size, trainer.accelerator.num_processes
    read = [trainer.rows.row(row) for row in rows]
    own = list(range(len(rows)))
    if processes > 1:
        work = [attention_work(row, trainer.packing.isolate_documents) for row in read]
        own = share_out(work, processes)[trainer.accelerator.process_index]
    batches = [
        make_batch([read[index] for index in own[start : start + size]], trainer.packing, trainer.pad_id)
        for start in range(0, len(own), size)
    ]
    most = ceil(ceil(len(rows) / processes) / size)
    return batches + [empty_batch(trainer.pad_id)] * (most - len(batches))


def train(trainer: Trainer, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
    """Do the steps that are left, yielding a report after each; return early when ``should_stop`` says so.

    Between two reports, and after an error, the trainer stands exactly at a step boundary: what ends a step in its
    middle drops that step's gradients and puts the random generators back. HalfUpdatedError leaves weights that belong
    to no step, and so does the DivergedError of an update that overflows. Raises what :func:`training_step` raises,
    DivergedError for a step that is not finite and must not or cannot be left out, and when the first updates changed
    nothing.
    """
    counters, plan = trainer.counters, trainer.plan
    movement = Movement(trainer.local_weights(), partial(sums, trainer.accelerator))
    while counters.step < plan.steps and not should_stop():
        rows = rows_of_step(plan, trainer.seed, counters.step)
        done = _step(trainer, rows, should_stop)
        if done is None:
            return
        result, fault = done
        epoch, _ = position_of(plan, counters.step)
        spike, begins = counters.note_loss(result.loss) if fault is None else (None, False)
        left_out = fault is not None or (spike is not None and trainer.loss_spike == "skip")
        counters.note_step(result, left_out=left_out)
        if not result.skipped:
            movement.note_update(result.learning_rate, result.grad_norm)
        yield StepReport(
            step=counters.step,
            epoch=epoch,
            result=result,
            fault=fault,
            left_out=left_out,
            spike=spike,
            spike_begins=begins,
            rows=fault.named_rows if fault else tuple(rows) if spike else (),
            documents=fault.documents if fault else describe_rows(trainer.rows, rows) if spike else "",
            unmoved=_unmoved(movement, counters, plan),
        )


def _step(
    trainer: Trainer, rows: Sequence[int], should_stop: Callable[[], bool]
) -> tuple[StepResult, Fault | None] | None:
    """One step, and why its update was left out if it was; None when it was broken off because of ``should_stop``."""
    counters, plan = trainer.counters, trainer.plan
    before = capture_random_state()
    trainer.loss_model.train()
    try:
        result = training_step(
            trainer,
            micro_batches(trainer, rows),
            learning_rate_at(plan, counters.updates),
            describe_rows=lambda: describe_rows(trainer.rows, rows),
            should_stop=should_stop,
            leave_out=partial(_is_left_out, trainer, rows),
        )
    except StopRequested:
        _back_to_the_boundary(trainer, before)
        return None
    except NotFiniteError as error:
        trainer.optimizer.zero_grad(set_to_none=True)  # room for the search
        try:
            fault = find_fault(trainer, rows, before, error)
        finally:
            _back_to_the_boundary(trainer, before)
        check_may_skip(counters, plan.steps, fault, policy=trainer.not_finite)
        return error.result, fault
    except (DivergedError, DataError) as error:
        _back_to_the_boundary(trainer, before)
        raise type(error)(f"step {counters.step + 1}: {error}") from error
    except BaseException:
        _back_to_the_boundary(trainer, before)
        raise
    return result, None


def _is_left_out(trainer: Trainer, rows: Sequence[int], loss: float) -> bool:
    """Whether a step with this loss has no update. Raises DivergedError where too many had none."""
    score = spike_score(loss, trainer.counters.recent_losses) if trainer.loss_spike == "skip" else None
    if score is None:
        return False
    what = f"{_jumped(loss, score)} (rows: {describe_rows(trainer.rows, rows)})"
    check_may_leave_out(trainer.counters, trainer.plan.steps, what)
    return True


def _jumped(loss: float, score: float) -> str:
    return f"the loss jumped to {loss:.4g}, {score:.1f} standard deviations above the last ones"


def _back_to_the_boundary(trainer: Trainer, before: RandomState) -> None:
    """As it was before the step began, weights apart, which nothing but an update moves."""
    trainer.optimizer.zero_grad(set_to_none=True)
    restore_random_state(before)


def _unmoved(movement: Movement, counters: Counters, plan: Plan) -> tuple[str, ...]:
    """The weights that should have changed by now; looked at once. Raises DivergedError when nothing changed."""
    warming_up, at_the_end = counters.updates <= plan.warmup_steps, counters.step == plan.steps
    if at_the_end and counters.updates == 0:
        raise DivergedError(f"step {counters.step}: the run ends without a single update; nothing was trained")
    if not movement.is_due(warming_up=warming_up, at_the_end=at_the_end):
        return ()
    try:
        return movement.check()
    except DivergedError as error:
        raise DivergedError(f"step {counters.step}: {error}") from error


def rehearse(trainer: Trainer) -> None:
    """One forward and backward pass over the longest rows, discarded: what does not fit fails here, before step 1."""
    before = capture_random_state()
    trainer.loss_model.train()
    longest = trainer.rows.longest(trainer.plan.micro_batch_size)
    batch = make_batch([trainer.rows.row(row) for row in longest], trainer.packing, trainer.pad_id)
    try:
        loss_sum, _ = trainer.loss_model(*batch_on(trainer.accelerator.device, batch))
        loss_sum.backward()
    finally:
        _back_to_the_boundary(trainer, before)


def check_against_ledger(counters: Counters, plan: Plan, ledger: Ledger) -> None:
    """Raise AssertionError, a bug of trainkit, unless whole epochs trained exactly the tokens of the ledger.

    What was counted on its way through the model is held against what was counted when the rows were made; the tokens
    of a step without an update were seen, but not trained.
    """
    epochs, rest = divmod(counters.step, plan.steps_per_epoch)
    seen = (counters.tokens, counters.trained_tokens + counters.skipped_tokens)
    expected = (ledger.tokens, ledger.trained_targets)
    if rest == 0 and seen != (epochs * expected[0], epochs * expected[1]):
        raise AssertionError(
            f"{epochs} epochs saw {seen[0]} tokens and trained {seen[1]}; the ledger has {expected[0]} and "
            f"{expected[1]} for each"
        )


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
    if report.left_out:
        line |= {"skipped": True}
    if report.fault is not None:
        line |= {"fault": report.fault.sentence()}
    if report.spike is not None:
        line |= {"spike": report.spike}
    if report.rows:
        line |= {"rows": list(report.rows), "documents": report.documents}
    return line


def remarks(report: StepReport) -> list[str]:
    """What a person should hear of a step, a line each; nothing where it went as steps go."""
    result, said = report.result, []
    if report.fault is not None:
        said.append(f"{report.fault.sentence()}; no update (training.not_finite: skip)")
    elif result.skipped and not report.left_out:
        said.append(f"fp16 gradients overflowed; no update, loss scale now {result.loss_scale:g}")
    if report.spike is not None and (report.spike_begins or report.left_out):
        end = "; no update (training.loss_spike: skip)" if report.left_out else ""
        said.append(f"{_jumped(result.loss, report.spike)}; rows: {report.documents}{end}")
    if report.unmoved:
        said.append(
            f"{len(report.unmoved)} of the trained weights did not change in {UPDATES} updates and more, "
            f"`{report.unmoved[0]}` first; their gradient may be 0"
        )
    return [f"step {report.step}: {sentence}" for sentence in said]
