"""Before a run: the micro-batch that fits, what the step will take, and a refusal where it cannot fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainkit.errors import MachineError, ModelError
from trainkit.launched import ALONE, Launched
from trainkit.memory.advice import Question, changes_of_recipe, rows_for_auto
from trainkit.memory.estimate import Estimate, estimate, quick_peak_bytes
from trainkit.memory.machine import available_memory_bytes, process_memory_bytes
from trainkit.memory.scenario import Device, scenario_of
from trainkit.memory.sizes import gib
from trainkit.memory.verdict import Capacity, context_bytes, process_bytes, verdict
from trainkit.model.checking import CONFIG_FILE, read_config

if TYPE_CHECKING:
    from pathlib import Path

    from trainkit.memory.scenario import Scenario, Shard
    from trainkit.recipe.schema import Recipe

SMALLER = "take a smaller model, or a smaller packing.sequence_length"
LESS_AFTER_FAILURE = 0.75  # of the estimate: it said that the step fits, so a little less would be no answer
CPU_MICRO_BATCH_TOKENS = 2048  # larger micro-batches are no faster on a CPU: docs/benchmarks.md


@dataclass(frozen=True)
class Fit:
    """Rows per device and forward pass, the predicted peak, and what is to be said of it.

    ``predicted_bytes`` is what :func:`trainkit.memory.machine.peak_memory_bytes` will measure: allocated on a GPU,
    resident in the process on a CPU. None where the model cannot be traced.
    """

    micro_batch_size: int
    predicted_bytes: int | None
    sentences: tuple[str, ...]


def fit(recipe: Recipe, folder: Path, device: torch.device, here: Launched = ALONE) -> Fit:
    """Take the recipe's micro-batch or choose one, and predict the peak; reads config.json and no weight.

    With several processes it is the peak of one of them; those of a CPU have the same share of its memory.
    Raises MachineError when the step cannot fit into what is free on ``device``, with the cheapest change that helps.
    """
    shard: Shard = "none" if here.processes == 1 else "fsdp2" if here.shards else "ddp"
    config, place = read_config(folder), str(folder / CONFIG_FILE)
    on = _described(device)
    scenario = scenario_of(recipe, config, device=on, gpus=here.processes, shard=shard, place=place)
    ask = Question(estimate, quick_peak_bytes)
    capacity = _free(device, scenario.device, here)
    asked = recipe.training.micro_batch_size
    try:
        if asked == "auto":
            scenario = scenario.with_micro_batch_size(max(1, _chosen_rows(scenario, capacity, ask)))
        found = ask(scenario)
    except ModelError as error:
        rows = 1 if asked == "auto" else asked
        chosen = "; training.micro_batch_size: auto is 1" if asked == "auto" else ""
        return Fit(rows, None, (f"not estimated: {error}{chosen}",))
    word = verdict(found, scenario.device, capacity)
    if word == "does not fit":
        raise MachineError(_refusal(scenario, found, capacity, ask))
    needed, there = gib(process_bytes(found, scenario.device)), gib(capacity.size_bytes)
    sentences = (
        f"a step takes {needed} of {there} free on {device} ({word}); the peak is in the {found.peak_phase} phase",
    )
    rows = scenario.micro_batch_size
    before = process_memory_bytes() if device.type == "cpu" else 0
    return Fit(rows, before + found.peak_allocated_bytes, sentences)


def _described(device: torch.device) -> Device:
    """The device as the estimator knows it."""
    if device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_capability(device))
    return Device("cpu")


def _free(device: torch.device, described: Device, here: Launched = ALONE) -> Capacity:
    """What the step may take. A context that is there already is counted as free: the estimate counts it as taken."""
    sharing = here.local_processes if device.type == "cpu" else 1
    return Capacity(str(device), available_memory_bytes(device) // sharing + context_bytes(described))


def _chosen_rows(scenario: Scenario, capacity: Capacity, ask: Question) -> int:
    most = None
    if scenario.device.kind == "cpu":
        most = max(1, CPU_MICRO_BATCH_TOKENS // scenario.sequence_length)
    return rows_for_auto(scenario, capacity, ask, most_rows=most)


def _refusal(scenario: Scenario, found: Estimate, capacity: Capacity, ask: Question) -> str:
    """One line: what is needed, what is there, and the cheapest change that makes it fit on one device."""
    hint = _cheapest_change(scenario, capacity, ask) or SMALLER
    rows = scenario.micro_batch_size
    return (
        f"memory: a step with {rows} row{'s' * (rows > 1)} of {scenario.sequence_length:,} tokens takes "
        f"{gib(process_bytes(found, scenario.device))}, {capacity.name} has {gib(capacity.size_bytes)} free; {hint}"
    )


def _cheapest_change(scenario: Scenario, capacity: Capacity, ask: Question) -> str | None:
    """The cheapest change of the recipe that fits into ``capacity``, and what a step takes then; None without one."""
    helping = changes_of_recipe(scenario, capacity, ask).changes
    if not helping:
        return None
    first = helping[0]
    lines = ", ".join(line.strip() for line in first.lines if not line.endswith(":"))
    return f"with {lines} it takes {gib(process_bytes(first.estimate, scenario.device))}"


def advice_after_failure(recipe: Recipe, folder: Path, device: torch.device, micro_batch_size: int) -> str:
    """What to change after a step of ``micro_batch_size`` rows ran out of memory on ``device``, in one sentence.

    The change is the cheapest that takes at least a quarter less than the step was estimated to, and no more than the
    device can give to this process.
    """
    try:
        scenario = scenario_of(recipe, read_config(folder), device=_described(device))
        scenario = scenario.with_micro_batch_size(micro_batch_size)
        ask = Question(estimate, quick_peak_bytes)
        needed = process_bytes(ask(scenario), scenario.device)
        held = torch.cuda.memory_reserved(device) if device.type == "cuda" else process_memory_bytes()
        room = min(_free(device, scenario.device).size_bytes + held, int(LESS_AFTER_FAILURE * needed))
        change = _cheapest_change(scenario, Capacity(str(device), room), ask)
    except (ModelError, MemoryError, RuntimeError):  # the last two where there is no room to think about it either
        return "a smaller training.micro_batch_size or model.activation_checkpointing: true takes less"
    return f"a step was estimated at {gib(needed)}, {change or SMALLER}"
