"""A training step on tensors without data: the run's own code, watched.

The model's class is built from its config, adapted, wrapped in the run's loss and given the run's optimizer; then
:func:`trainkit.training.step.training_step` does one step with it, in steady state: the optimizer's state is there,
as from the second step on. What happens to memory is written down as an event log. It needs no weights and no GPU.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from trainkit.data.batches import Batch
from trainkit.errors import ModelError, TrainkitError
from trainkit.memory.answers import Answers
from trainkit.memory.device_look import Look, cpu_substitutes, cuda_scratch_bytes, cuda_substitutes
from trainkit.memory.event_log import TRACED, Axis, EventLog, NotPeriodicError, unfold
from trainkit.memory.fake_model import FakeModel, fake_model, period_of, unit_of_tensors
from trainkit.memory.fake_optimizer import make_state, optimizer_of, state_tensors
from trainkit.memory.scenario import AMPERE
from trainkit.memory.sharding import pretended_mesh, pretended_processes
from trainkit.memory.tracker import Tracker
from trainkit.model.adapters import attention_targets
from trainkit.model.loss import CHUNK_TOKENS, HeadPath, LossModel
from trainkit.model.precision import make_scaler, types_of
from trainkit.model.sharding import shard_fully
from trainkit.training.step import training_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from accelerate import Accelerator

    from trainkit.memory.scenario import Scenario

REACH = 2  # layers of a unit under FSDP2, at least: a layer gathers the next one's weights and reduces its gradients
LEARNING_RATE = 1e-4  # some number; it takes no memory
MAX_GRAD_NORM = 1.0
_BF16_ALONE = "Expected inputs of BF16 type"  # what torch's grouped matrix product says of others


@dataclass(frozen=True)
class Trace:
    """A step's event log at the full depth, and the counts of the model's parameters."""

    log: EventLog
    parameters: int
    trainable_parameters: int
    remarks: tuple[str, ...] = ()


@dataclass
class _Run:
    """What :func:`training_step` needs of a run."""

    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    accelerator: Accelerator
    max_grad_norm: float | None = MAX_GRAD_NORM


@dataclass
class _Alone:
    """An accelerator of one process, which has nobody to reduce with."""

    device: torch.device
    num_processes: int = 1

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """The tensor: it is the sum already."""
        assert reduction == "sum"
        return tensor


def trace(scenario: Scenario) -> Trace:
    """Trace the scenario's step, on few layers where they repeat, else on all of them.

    Raises ModelError when the model cannot be built or traced, UsageError for an adapter that does not fit it.
    """
    sharded = scenario.shard == "fsdp2" and scenario.gpus > 1
    with pretended_processes(scenario.gpus) if sharded else nullcontext():
        period = period_of(scenario.config, scenario.place)
        if sharded and period is not None:
            period *= -(-REACH // period)
        if period is not None:
            model = fake_model(scenario, full_depth=False, period=period)
            try:
                log = _traced(scenario, model)
                if model.units > TRACED:
                    log = unfold(log, model.units, period=model.period)
            except NotPeriodicError:
                pass
            else:
                return Trace(log, model.parameters, model.trainable_parameters, _remarks(scenario, model))
        model = fake_model(scenario, full_depth=True)
        log = _traced(scenario, model)
        return Trace(log, model.parameters, model.trainable_parameters, _remarks(scenario, model))


def _remarks(scenario: Scenario, model: FakeModel) -> tuple[str, ...]:
    """What a reader would not expect: attention without a fused kernel."""
    text = model.model.config.get_text_config()
    heads, key_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    shares_keys = heads is not None and key_heads is not None and key_heads < heads
    has_kernel = scenario.device.capability >= AMPERE and scenario.precision != "fp32"
    by_document = model.attention.name in {"sdpa", "varlen"}
    if scenario.device.kind == "cuda" and by_document and shares_keys and not has_kernel:
        sentence = (
            "attention: no fused kernel shares key/value heads in this precision on this GPU, so that all "
            "sequence_length x sequence_length scores are kept; memory grows with the square of the length"
        )
        return (sentence,)
    return ()


def _traced(scenario: Scenario, model: FakeModel) -> EventLog:
    try:
        return step_log(scenario, model)
    except TrainkitError:
        raise
    except Exception as error:  # models do what they like; what cannot be traced is said, with the reason
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        name = type(model.model).__name__
        if scenario.adapter is None and reason.startswith(_BF16_ALONE):
            names = ", ".join(attention_targets(model.model))
            raise ModelError(
                f"{name}: its experts' kernel takes bf16 alone, and full fine-tuning keeps fp32 weights; set adapter: "
                f"{{type: lora, target_modules: [{names}]}}"
            ) from error
        raise ModelError(f"{name}: its step cannot be traced: {type(error).__name__}: {reason}") from error


def step_log(
    scenario: Scenario,
    model: FakeModel,
    *,
    chunk_tokens: int | None = None,
    scratch_bytes: Callable[[Any, tuple[Any, ...]], int] | None = None,
) -> EventLog:
    """The log of one step of a fake model, at the depth that it was built with.

    ``chunk_tokens`` and ``scratch_bytes`` take the place of the device's own.
    """
    plain = scenario.loop == "transformers"
    cuda = scenario.device.kind == "cuda"
    scratch_bytes = scratch_bytes or (cuda_scratch_bytes if cuda else _no_scratch)
    chunk_tokens = chunk_tokens or CHUNK_TOKENS[scenario.device.kind]
    with ExitStack() as stack:
        stack.enter_context(model.mode)
        stack.enter_context(_masks_without_values(repeat_heads=plain))
        run = _plain_run(model) if plain else _run(scenario, model, chunk_tokens)
        unit_of = unit_of_tensors(model)  # after sharding, which puts other tensors in their places
        with Answers(None):
            make_state(run.loss_model, run.optimizer)
        if scenario.micro_batches > 1:
            _give_gradients(run.loss_model)
        batch = make_batch_of(scenario)
        tracker = Tracker(scratch_bytes)
        watcher = Watcher(tracker, model, unit_of)
        substitutes = cuda_substitutes(scenario.device.capability) if cuda else cpu_substitutes()
        gc.collect()  # so that nothing of earlier work dies within the step
        with tracker, Answers(run.scaler), Look(substitutes, watcher.after_backward(run.loss_model)):
            watcher.inventory(run.loss_model, state_tensors(run.optimizer), adapted=scenario.adapter is not None)
            with watcher.watching(run.loss_model, model.model, run.optimizer):
                if plain:
                    _plain_step(run, batch)
                else:
                    _own_step(run, batch)
            tracker.moment("optimizer", "end")
    return tracker.log()


class Watcher:
    """Tells the tracker where the step is, from hooks on the model and the optimizer."""

    def __init__(self, tracker: Tracker, model: FakeModel, unit_of_tensor: Mapping[int, int]) -> None:
        self.tracker = tracker
        self.layers = model.layers
        self.unit_of = model.unit_of
        self.unit_of_tensor = unit_of_tensor
        self._chunks_left = 0
        self._backward_through_chunks = False

    def inventory(self, model: torch.nn.Module, state: Any, *, adapted: bool) -> None:
        """Own what is there before the step: weights, gradients, the optimizer's state."""
        self.tracker.moment("start", "model")
        for parameter in model.parameters():
            part = "adapters" if adapted and parameter.requires_grad else "weights"
            self.tracker.own(parameter, part, self.unit_of_tensor.get(id(parameter)))
        for buffer in model.buffers():
            self.tracker.own(buffer, "weights", self.unit_of_tensor.get(id(buffer)))
        for parameter, tensor in state:
            self.tracker.own(tensor, "optimizer state", self.unit_of_tensor.get(id(parameter)))
        self._own_gradients(model)

    def after_backward(self, model: torch.nn.Module) -> Callable[[], None]:
        """What to do when a backward pass is over."""

        def over() -> None:
            self._own_gradients(model)
            self.tracker.moment("optimizer", "clipping")

        return over

    @contextmanager
    def watching(self, loss_model: torch.nn.Module, model: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, every moment of the step is told."""
        hooks: list[Any] = [loss_model.register_forward_pre_hook(self._starts)]
        hooks.append(loss_model.register_forward_hook(self._loss_is_there))
        if (head := model.get_output_embeddings()) is not None:
            hooks.append(head.register_forward_pre_hook(self._chunk_starts))
        for index, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(self._layer_starts(index)))
            hooks.append(layer.register_forward_hook(self._layer_ends(index)))
        hooks.append(model.get_input_embeddings().register_forward_hook(self._embedded))
        hooks.append(optimizer.register_step_pre_hook(lambda *_: self.tracker.moment("optimizer", "update")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _own_gradients(self, model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self.tracker.own(parameter.grad, "gradients", self.unit_of_tensor.get(id(parameter)))

    def _starts(self, *_: object) -> None:
        self.tracker.moment("forward", "embedding")

    def _loss_is_there(self, *_: object) -> None:
        self.tracker.moment("loss", "output head")

    def _chunk_starts(self, *_: object) -> None:
        """The head runs once for each chunk; and again in the backward pass, from the last chunk to the first."""
        if self.tracker.place == "output head" and self._chunks_left:
            self._backward_through_chunks = True
        if self._backward_through_chunks:
            self._chunks_left -= 1
            index = self._chunks_left
        else:
            index = self._chunks_left
            self._chunks_left += 1
        self.tracker.moment("loss", Axis.CHUNK.place(index), Axis.CHUNK.label(index))

    def _layer_starts(self, index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self.tracker.phase == "forward":  # and not when it is recomputed
                self.tracker.moment("forward", Axis.LAYER.place(index), self.unit_of(index))

        return hook

    def _layer_ends(self, index: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            if self.tracker.phase != "forward":
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                place, unit = Axis.LAYER.place(index), self.unit_of(index)
                hidden.register_hook(lambda _: self.tracker.moment("backward", place, unit))
            if index == len(self.layers) - 1:
                self.tracker.moment_at_next_birth("loss", "output head")

        return hook

    def _embedded(self, _module: object, _inputs: object, output: Any) -> None:
        if self.tracker.phase == "forward" and output.requires_grad:
            output.register_hook(lambda _: self.tracker.moment("backward", "embedding"))


# --- the step -----------------------------------------------------------------------------------------------------


def _run(scenario: Scenario, model: FakeModel, chunk_tokens: int) -> _Run:
    precision = types_of(scenario.precision, "")
    head = HeadPath(apart=_head_is_apart(model.model), sentence="")
    loss_model = LossModel(model.model, model.attention, precision, head, chunk_tokens)
    if scenario.shard == "fsdp2" and scenario.gpus > 1:
        shard_fully(loss_model, precision, pretended_mesh(scenario.gpus))
    cpu = torch.device("cpu")
    return _Run(
        loss_model=loss_model,
        optimizer=optimizer_of(loss_model, scenario),
        scaler=make_scaler(precision, cpu),
        accelerator=cast("Accelerator", _Alone(cpu)),
    )


def _own_step(run: _Run, batch: Batch) -> None:
    training_step(run, [batch], LEARNING_RATE, describe_rows=str, should_stop=lambda: False)


def _plain_run(model: FakeModel) -> _Run:
    model.model.enable_input_require_grads()
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, foreach=True)
    return _Run(model.model, optimizer, None, cast("Accelerator", _Alone(torch.device("cpu"))))


def _plain_step(run: _Run, batch: Batch) -> None:
    output = run.loss_model(input_ids=batch.input_ids_RT, labels=batch.labels_RT)
    output.loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def make_batch_of(scenario: Scenario) -> Batch:
    """Full rows, every token trained; a row's documents differ in length, so that they are not one call."""
    rows, length, documents = scenario.micro_batch_size, scenario.sequence_length, scenario.documents_per_row
    short = length // documents
    lengths = [short - 1 if index % 2 else short + 1 for index in range(documents - 1)] if documents > 1 else []
    segments = (*lengths, length - sum(lengths))
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return Batch(ids, ids.clone(), ids.clone(), (segments,) * rows, scenario.tokens, scenario.tokens)


def _give_gradients(model: torch.nn.Module) -> None:
    """As after an earlier micro-batch of the same step."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def _head_is_apart(model: Any) -> bool:
    """Whether the model's logits are its head's output and nothing else, tried on two tokens.

    What :func:`trainkit.model.loss.verify_head` finds from values is found here from who owns the memory.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if head is None:
        return False
    seen: list[Any] = []
    hooks = (
        base.get_decoder().register_forward_hook(lambda _module, _inputs, output: seen.append(output[0])),
        head.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0], output))),
    )
    ids = torch.zeros(1, 2, dtype=torch.int64)
    try:
        with torch.no_grad():
            logits = base(input_ids=ids, position_ids=ids.clone(), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return len(seen) == 3 and _shares_memory(seen[0], seen[1]) and _shares_memory(seen[2], logits)


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)  # noqa: SLF001 - its only identity


@contextmanager
def _masks_without_values(*, repeat_heads: bool) -> Iterator[None]:
    """Keep transformers' mask code from looking at positions, which have no values here.

    It then takes the path of a batch that is not packed; documents are kept apart by the run's own kernels. With
    ``repeat_heads`` its SDPA repeats key/value heads, as its releases before 4.50 did.
    """
    from transformers import masking_utils
    from transformers.integrations import sdpa_attention

    find, shares = masking_utils.find_packed_sequence_indices, sdpa_attention.use_gqa_in_sdpa
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    if repeat_heads:
        sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
        sdpa_attention.use_gqa_in_sdpa = shares


def _no_scratch(_func: Any, _args: Any) -> int:
    return 0
