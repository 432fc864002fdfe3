"""What fits: the largest micro-batch, the longest row, the cheapest changes; each is estimated. Torch-free."""

from __future__ import annotations

import logging
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from trainkit.errors import MachineError, ModelError, UsageError
from trainkit.memory.scenario import BYTES_OF, Scenario
from trainkit.memory.verdict import context_bytes, process_bytes
from trainkit.recipe.schema import Adapter
from trainkit.recipe.written import value_as_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trainkit.memory.estimate import Estimate
    from trainkit.memory.verdict import Capacity


MOST_TOKENS = 2**20  # in a micro-batch, or in a row where the model sets no bound
LENGTH_STEP = 64  # tokens; row lengths are searched in multiples of it
GPU_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)


NOT_ESTIMABLE = (ModelError, UsageError, MachineError)  # what an estimate is refused with

SHARED_PARTS = ("weights", "adapters", "gradients", "optimizer state")  # by FSDP2
STANDING_PARTS = ("weights", "adapters", "optimizer state")  # there all through a step, checkpointed or not
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0, "sgd": 0}  # of the optimizer, at least, a parameter


@dataclass(frozen=True)
class Change:
    """A way to make it fit: what to do, at what cost, as lines of a recipe, and what a step then takes."""

    sentence: str
    lines: tuple[str, ...]
    scenario: Scenario
    estimate: Estimate


@dataclass(frozen=True)
class NotEstimated:
    """A way to make it fit of which nothing can be said: what it is, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """The cheapest changes of each kind that help, the cheapest kind first, and the kinds that cannot be estimated."""

    changes: tuple[Change, ...]
    not_estimated: tuple[NotEstimated, ...] = ()


@dataclass(frozen=True)
class Method:
    """How a model may be trained, for people, and as a change of a scenario."""

    name: str
    adapter: Adapter | None
    activation_checkpointing: bool

    def of(self, scenario: Scenario) -> Scenario:
        """The scenario trained this way."""
        return replace(scenario, adapter=self.adapter, activation_checkpointing=self.activation_checkpointing)


METHODS = tuple(
    Method(name + " + checkpointing" * checkpointing, adapter, checkpointing)
    for name, adapter in (("full", None), ("LoRA", Adapter(type="lora")), ("QLoRA", Adapter(type="qlora")))
    for checkpointing in (False, True)
)
"""In the order in which they give something up: time first, then weights that train, then exact base weights."""


@dataclass(frozen=True)
class Cheapest:
    """The first of :data:`METHODS` with which a step fits, and its estimate; None where none does.

    ``not_estimated`` are the methods before it that may have fitted too.
    """

    method: Method | None
    estimate: Estimate | None
    not_estimated: tuple[NotEstimated, ...] = ()


class Question:
    """What a step takes, asked once for each scenario; all scenarios must be of one model.

    ``allocated`` knows ``peak_allocated_bytes`` alone in no time, or None: what is too much by that is not asked about.
    """

    def __init__(
        self,
        estimate: Callable[[Scenario], Estimate],
        allocated: Callable[[Scenario], int | None] = lambda _scenario: None,
    ) -> None:
        self._estimate = estimate
        self._allocated = allocated
        self._answers: dict[str, Estimate] = {}
        self._standing_bytes: dict[str, int] = {}  # from one step to the next, whatever the rows are

    def __call__(self, scenario: Scenario) -> Estimate:
        """The estimate for a scenario."""
        key = repr(scenario)
        if key not in self._answers:
            with _libraries_silent():
                found = self._answers[key] = self._estimate(scenario)
            self._standing_bytes[_without_rows(scenario)] = sum(found.parts[part] for part in STANDING_PARTS)
        return self._answers[key]

    def answered(self, scenario: Scenario) -> Estimate | None:
        """The estimate where it has been made."""
        return self._answers.get(repr(scenario))

    def floor_bytes(self, scenario: Scenario) -> float:
        """What a scenario takes without its rows: as in an estimate of it with other rows.

        Without one, what its parameters take at the least, once an estimate of any scenario has counted them; 0 before.
        """
        standing = self._standing_bytes.get(_without_rows(scenario))
        if standing is not None:
            return standing + context_bytes(scenario.device)
        shared = scenario.gpus if scenario.shard == "fsdp2" else 1
        counted = next(iter(self._answers.values()), None)
        return 0 if counted is None else _least_bytes(scenario, counted.parameters) / shared

    def least_bytes(self, scenario: Scenario) -> int | None:
        """What the process surely takes: peak allocated and context; None where that is not known in no time."""
        allocated = self._allocated(scenario)
        return None if allocated is None else allocated + context_bytes(scenario.device)


def _without_rows(scenario: Scenario) -> str:
    return repr(replace(scenario, sequence_length=1, micro_batch_size=1, micro_batches=1))


@contextmanager
def _libraries_silent() -> Iterator[None]:
    """What libraries log while a step is traced is about tensors that are not there; what is wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def fitting(scenario: Scenario, capacity: Capacity, ask: Question) -> bool:
    """Whether the verdict on a scenario is "fits"."""
    least = max(ask.least_bytes(scenario) or 0, ask.floor_bytes(scenario))
    if least > capacity.to_fill_bytes:
        return False
    return process_bytes(ask(scenario), scenario.device) <= capacity.to_fill_bytes


def largest_micro_batch(scenario: Scenario, capacity: Capacity, ask: Question, step_tokens: int | None = None) -> int:
    """Rows of the largest micro-batch that fits; 0 where none does. Not searched beyond :data:`MOST_TOKENS` tokens.

    A step stays one of ``step_tokens`` on each device (the scenario's own), or grows to one micro-batch.
    """
    most = max(MOST_TOKENS // scenario.sequence_length, 1)
    tokens = step_tokens or scenario.step_tokens

    def of_rows(rows: int) -> Scenario:
        return scenario.with_rows(rows, scenario.sequence_length, tokens)

    return _largest_of_both(of_rows, most, capacity, ask, min(scenario.micro_batch_size, most))


def longest_row(
    scenario: Scenario, capacity: Capacity, ask: Question, positions: int | None, step_tokens: int | None = None
) -> int:
    """Tokens of the longest row that fits: a multiple of 64, or all ``positions``; or 0.

    The micro-batch has as many rows as before; for ``step_tokens`` see :func:`largest_micro_batch`.
    """
    most = min(positions or MOST_TOKENS, MOST_TOKENS)
    steps = -(-most // LENGTH_STEP)
    tokens = step_tokens or scenario.step_tokens

    def of_length(step: int) -> Scenario:
        return scenario.with_rows(scenario.micro_batch_size, min(step * LENGTH_STEP, most), tokens)

    start = min(max(scenario.sequence_length // LENGTH_STEP, 1), steps)
    return min(_largest_of_both(of_length, steps, capacity, ask, start) * LENGTH_STEP, most)


def rows_for_auto(scenario: Scenario, capacity: Capacity, ask: Question, most_rows: int | None = None) -> int:
    """What ``micro_batch_size: auto`` comes to: the largest micro-batch that fits and divides the rows of a step; or 0.

    ``most_rows`` caps it where larger ones are no faster.
    """
    in_a_step = scenario.micro_batch_size * scenario.micro_batches
    divisors = [rows for rows in range(1, in_a_step + 1) if in_a_step % rows == 0]
    divisors = [rows for rows in divisors if rows == 1 or not most_rows or rows <= most_rows]
    if fitting(scenario.with_micro_batch_size(divisors[-1]), capacity, ask):
        return divisors[-1]
    index = _largest(lambda place: scenario.with_micro_batch_size(divisors[place - 1]), len(divisors), capacity, ask)
    return divisors[index - 1] if index else 0


def changes(scenario: Scenario, capacity: Capacity, ask: Question, *, auto: bool = False) -> Advice:
    """The cheapest changes of each kind that make a scenario fit, the cheapest kind first; none where nothing does.

    The scenario itself has been estimated; what a change would make of it may be refused. With ``auto`` the recipe
    leaves the micro-batch to the memory, which then takes what the change makes room for.
    """
    found = _tried(_kinds(scenario, capacity, ask))
    if auto:
        found = replace(found, changes=tuple(_with_rows_of_auto(change, capacity, ask) for change in found.changes))
    if scenario.gpus > 1 or scenario.method == "qlora":
        return found
    lora = replace(scenario, adapter=Adapter(type="lora"))
    more = [_Kind("several GPUs", lambda: _sharded(scenario, scenario, capacity, ask, auto=auto))]
    if not found.changes and scenario.adapter is None:
        more.append(_Kind("LoRA on several GPUs", lambda: _sharded(lora, scenario, capacity, ask, auto=auto)))
    shared = _tried(more)
    return Advice((*found.changes, *shared.changes), (*found.not_estimated, *shared.not_estimated))


def _with_rows_of_auto(change: Change, capacity: Capacity, ask: Question) -> Change:
    scenario = change.scenario.with_micro_batch_size(rows_for_auto(change.scenario, capacity, ask))
    return replace(change, scenario=scenario, estimate=ask(scenario))


def changes_of_recipe(scenario: Scenario, capacity: Capacity, ask: Question) -> Advice:
    """Those of :func:`changes` that need no further GPU."""
    return _tried(_kinds(scenario, capacity, ask))


def cheapest_method(scenario: Scenario, parameters: int, capacity: Capacity, ask: Question) -> Cheapest:
    """The first of :data:`METHODS` with which the scenario fits.

    What cannot fit for its ``parameters`` alone is not estimated, nor what cannot for what it has to hold as the same
    method without activation checkpointing does.
    """
    not_estimated: list[NotEstimated] = []
    standing: dict[str, float] = {}
    for method in METHODS:
        tried = method.of(scenario)
        least = max(_least_bytes(tried, parameters), standing.get(tried.method, 0))
        if least > capacity.to_fill_bytes:
            continue
        try:
            if fitting(tried, capacity, ask):
                return Cheapest(method, ask(tried), tuple(not_estimated))
        except NOT_ESTIMABLE as error:
            not_estimated.append(NotEstimated(method.name, str(error)))
            standing[tried.method] = float("inf")  # with activation checkpointing it is refused as well
        else:
            if (known := ask.answered(tried)) is not None:
                standing[tried.method] = sum(known.parts[part] for part in STANDING_PARTS)
    return Cheapest(None, None, tuple(not_estimated))


@dataclass(frozen=True)
class _Kind:
    """A kind of change: its name where it cannot be estimated, and the search for the cheapest of it."""

    what: str
    search: Callable[[], Change | None]


def _tried(kinds: Iterable[_Kind]) -> Advice:
    """What comes of each kind; one that cannot be estimated does not stop the others."""
    found, not_estimated = [], []
    for kind in kinds:
        try:
            change = kind.search()
        except NOT_ESTIMABLE as error:
            not_estimated.append(NotEstimated(kind.what, str(error)))
        else:
            found += [] if change is None else [change]
    return Advice(tuple(found), tuple(not_estimated))


def _kinds(scenario: Scenario, capacity: Capacity, ask: Question) -> Iterator[_Kind]:
    yield _Kind("fewer rows", lambda: _fewer_rows(scenario, "the step takes more passes", capacity, ask))
    checkpointed = replace(scenario, activation_checkpointing=True)
    if not scenario.activation_checkpointing:
        sentence = "about a third more time"
        yield _Kind(
            "activation checkpointing",
            lambda: _as_it_is_or_fewer_rows(checkpointed, sentence, scenario, capacity, ask),
        )
    if scenario.adapter is None and scenario.optimizer == "adamw":
        small = replace(scenario, optimizer="adamw_8bit")
        needs = "moments of 8 bit; needs the extra [qlora]"
        yield _Kind("moments of 8 bit", lambda: _cheapest(small, needs, scenario, capacity, ask))
    if scenario.adapter is None:
        lora = replace(scenario, adapter=Adapter(type="lora"))
        adapters = "adapters train, the model's own weights do not"
        yield _Kind("LoRA", lambda: _cheapest(lora, adapters, scenario, capacity, ask))
    if scenario.method != "qlora":
        qlora = replace(scenario, adapter=replace(scenario.adapter or Adapter(), type="qlora"))
        base = "adapters on a base in 4 bit; slower steps, inexact weights"
        yield _Kind("QLoRA", lambda: _cheapest(qlora, base, scenario, capacity, ask))


def _fewer_rows(scenario: Scenario, cost: str, capacity: Capacity, ask: Question) -> Change | None:
    for rows in _smaller_divisors(scenario):
        tried = scenario.with_micro_batch_size(rows)
        if fitting(tried, capacity, ask):
            return _change(tried, cost, scenario, ask)
    return None


def _as_it_is_or_fewer_rows(
    tried: Scenario, cost: str, asked: Scenario, capacity: Capacity, ask: Question
) -> Change | None:
    if fitting(tried, capacity, ask):
        return _change(tried, cost, asked, ask)
    if fewer := _fewer_rows(tried, cost, capacity, ask):
        return _change(fewer.scenario, cost, asked, ask)
    return None


def _cheapest(tried: Scenario, cost: str, asked: Scenario, capacity: Capacity, ask: Question) -> Change | None:
    """With all rows, else with activation checkpointing, else with fewer rows as well."""
    if fitting(tried, capacity, ask):
        return _change(tried, cost, asked, ask)
    checkpointed = replace(tried, activation_checkpointing=True)
    return _as_it_is_or_fewer_rows(checkpointed, f"{cost}; about a third more time", asked, capacity, ask)


def _sharded(scenario: Scenario, asked: Scenario, capacity: Capacity, ask: Question, *, auto: bool) -> Change | None:
    """The fewest GPUs that can share the step, with activation checkpointing; with ``auto`` rows are said, not chosen.

    A trace of many GPUs takes seconds, so there are two at most: what the first says of the parts that are shared tells
    how many GPUs it will take.
    """
    checkpointed = replace(scenario, activation_checkpointing=True, shard="fsdp2")

    def shared_by(gpus: int) -> Scenario:
        step_tokens = scenario.step_tokens // gpus
        rows = max(1, min(scenario.micro_batch_size, step_tokens // scenario.sequence_length))
        return replace(checkpointed, gpus=gpus).with_rows(rows, scenario.sequence_length, step_tokens)

    least = _least_bytes(scenario, ask(asked).parameters)
    first = next((gpus for gpus in GPU_COUNTS if least / gpus <= capacity.to_fill_bytes), None)
    if first is None:
        return None
    tried = shared_by(first)
    if not fitting(tried, capacity, ask):
        found = ask(tried)
        shared = first * sum(found.parts[part] for part in SHARED_PARTS)
        rest = process_bytes(found, tried.device) - shared // first
        room = capacity.to_fill_bytes - rest
        enough = next((gpus for gpus in GPU_COUNTS if gpus > first and shared / gpus <= room), None)
        if enough is None:
            return None
        tried = shared_by(enough)
        if not fitting(tried, capacity, ask):
            return None
    sentence = f"{tried.gpus} such GPUs that share it (--gpus {tried.gpus} --shard fsdp2)"
    return _change(tried, sentence, asked, ask, says_rows=auto)


def _change(scenario: Scenario, cost: str, asked: Scenario, ask: Question, *, says_rows: bool = False) -> Change:
    """What differs between the scenario and the one that was asked about."""
    lines: list[str] = []
    if scenario.activation_checkpointing != asked.activation_checkpointing:
        lines += ["model:", "  activation_checkpointing: true"]
    if scenario.adapter != asked.adapter and scenario.adapter is not None:
        lines += [f"adapter: {{{_adapter_keys(scenario.adapter)}}}"]
    training = []
    if scenario.optimizer != asked.optimizer:
        training.append(f"  optimizer: {scenario.optimizer}")
    if says_rows or scenario.micro_batch_size != asked.micro_batch_size:
        training.append(f"  micro_batch_size: {scenario.micro_batch_size}")
    a_row_each = scenario.gpus * scenario.sequence_length
    if a_row_each > asked.gpus * asked.step_tokens:
        training.append(f"  tokens_per_step: {a_row_each}")
    if training:
        lines += ["training:", *training]
    return Change(cost, tuple(lines), scenario, ask(scenario))


def _adapter_keys(adapter: Adapter) -> str:
    """An adapter's section on one line: its kind and size, and whatever else is not left to the defaults."""
    shown = {"type", "r", "alpha"}
    keys = [(one.name, getattr(adapter, one.name)) for one in fields(adapter)]
    plain = Adapter()
    return ", ".join(
        f"{name}: {value_as_yaml(value)}" for name, value in keys if name in shown or value != getattr(plain, name)
    )


def _least_bytes(scenario: Scenario, parameters: int) -> float:
    """What the parameters take at the very least: fp32 weights, gradients and moments, or the frozen base."""
    if scenario.method == "full":
        return parameters * (8 + MOMENT_BYTES[scenario.optimizer])
    return parameters * (0.5 if scenario.method == "qlora" else BYTES_OF[scenario.frozen_storage])


def _smaller_divisors(scenario: Scenario) -> list[int]:
    """Smaller micro-batches that divide the rows of a step, the largest first."""
    rows = scenario.micro_batch_size
    in_a_step = rows * scenario.micro_batches
    return [fewer for fewer in range(rows - 1, 0, -1) if in_a_step % fewer == 0]


def _largest_of_both(
    scenario_at: Callable[[int], Scenario], most: int, capacity: Capacity, ask: Question, start: int
) -> int:
    """The largest n from 1 to ``most`` whose scenario fits, where the need grows with n but for one step down; or 0.

    That is where a step becomes one micro-batch: no gradients of earlier ones stand beside it then.
    """
    last_of_several = bisect_left(range(1, most + 1), True, key=lambda n: scenario_at(n).micro_batches == 1)
    if last_of_several < most:
        found = _largest(
            lambda further: scenario_at(last_of_several + further),
            most - last_of_several,
            capacity,
            ask,
            max(start - last_of_several, 1),
        )
        if found:
            return last_of_several + found
    if last_of_several == 0:
        return 0
    return _largest(scenario_at, last_of_several, capacity, ask, min(start, last_of_several))


def _largest(
    scenario_at: Callable[[int], Scenario], most: int, capacity: Capacity, ask: Question, start: int = 1
) -> int:
    """The largest n from 1 to ``most`` whose scenario fits; 0 where that of 1 does not.

    The need grows with n, almost in proportion: each guess is where the line through two estimates meets the capacity,
    so that a handful is enough. The first is ``start``, for which the answer may be there already. Guesses come from
    below, since a trace takes longer the more tokens there are. Once something is too large, every other guess is the
    middle, in case the line bends.
    """

    def need(number: int) -> int:
        scenario = scenario_at(number)
        return process_bytes(ask(scenario), scenario.device)

    limit = capacity.to_fill_bytes
    bound = _bound(scenario_at, most, limit, ask)
    if bound == 0:
        return 0
    low = min(start, bound)
    high, high_need = bound + 1, None
    low_need = need(low)
    if low_need > limit:
        if low == 1:
            return 0
        high, high_need = low, low_need
        low, low_need = 1, need(1)
        if low_need > limit:
            return 0
    if bound < most and low < bound < high:
        bound_need = need(bound)
        if bound_need <= limit:
            return bound
        high, high_need = bound, bound_need
    slope, by_line = 0.0 if high_need is None else (high_need - low_need) / (high - low), True
    while high - low > 1:
        guess = (low + high) // 2
        if slope == 0:
            guess = 2 * low
        elif by_line or high_need is None:
            guess = low + int((limit - low_need) / slope)
        guess = min(max(guess, low + 1), high - 1)
        found = need(guess)
        slope = max((found - low_need) / (guess - low), 1.0)
        if found <= limit:
            low, low_need = guess, found
        else:
            high, high_need = guess, found
            by_line = not by_line
    return low


def _bound(scenario_at: Callable[[int], Scenario], most: int, limit: int, ask: Question) -> int:
    """The largest n that is not surely too much; ``most`` where only estimates know."""
    smallest = scenario_at(1)
    if max(ask.least_bytes(smallest) or 0, ask.floor_bytes(smallest)) > limit:
        return 0
    return bisect_left(range(1, most + 1), True, key=lambda n: (ask.least_bytes(scenario_at(n)) or 0) > limit)
