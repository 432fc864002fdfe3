"""``trainkit estimate-memory``: what a training step takes, when, whether it fits, and what would make it fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainkit.console import Console
from trainkit.errors import MachineError
from trainkit.memory.advice import (
    NOT_ESTIMABLE,
    Advice,
    Change,
    Cheapest,
    Question,
    changes,
    cheapest_method,
    largest_micro_batch,
    longest_row,
    rows_for_auto,
)
from trainkit.memory.estimate import PARTS, Estimate, estimate, is_quick, quick_peak_bytes
from trainkit.memory.models import known_models
from trainkit.memory.sizes import GIB, MIB, gib
from trainkit.memory.subject import Request, Subject, check_request, device_and_capacity, subject_of
from trainkit.memory.textbook import LEFT_OUT, Column, as_gb, as_gib, columns, lines, units_explained
from trainkit.memory.timeline import draw_timeline
from trainkit.memory.verdict import SHARE_TO_FILL, Capacity, context_bytes, process_bytes, verdict
from trainkit.plotting import check_plot_path, new_figure, save
from trainkit.recipe.schema import Adapter, Packing

if TYPE_CHECKING:
    from trainkit.memory.scenario import Scenario

# What the JSON says for the engines; the quick one evaluates formulas that were recorded from a trace.
ENGINE_NAMES = {"quick": "formula", "trace": "trace"}
ENGINE_WORDS = {
    "quick": "formula, recorded from the traced step",
    "trace": "trace of the very step on tensors without data",
}


def estimate_memory(request: Request, *, json_output: bool) -> None:
    """Estimate and report.

    Raises UsageError or ModelError for what cannot be asked, MachineError where nothing fits.
    """
    check_request(request)
    if request.plot is not None:
        check_plot_path(request.plot)
    with Console(json_only=json_output) as console:
        if request.fits is not None:
            _show_models_that_fit(request, console)
            return
        subject = subject_of(request)
        for line in subject.warnings:
            console.warn(line)
        if request.textbook:
            _show_textbook(request, subject, _asking(request, console), console)
        else:
            _show_estimate(request, subject, console)


def _asking(request: Request, console: Console) -> Question:
    """The estimator, which says how many estimates were made while it works on one that takes long."""
    made = 0

    def ask(scenario: Scenario) -> Estimate:
        nonlocal made
        if request.exact or not is_quick(scenario):
            console.progress("estimates", made)
        made += 1
        return estimate(scenario, exact=request.exact)

    return Question(ask, quick_peak_bytes)


def _show_estimate(request: Request, subject: Subject, console: Console) -> None:
    ask = _asking(request, console)
    capacity, scenario = subject.capacity, subject.scenario()
    if capacity is not None and subject.recipe.training.micro_batch_size == "auto":
        rows = rows_for_auto(scenario, capacity, ask)
        scenario = scenario.with_micro_batch_size(max(rows, 1))
    found = ask(scenario)
    said = {"model": subject.facts.name} | _as_json(scenario, found)
    _show_subject(subject, scenario, found, console)
    _show_parts(found, scenario, console)
    if capacity is not None:
        said |= _show_verdict(subject, scenario, found, capacity, ask, console)
    console.show(f"engine: {ENGINE_WORDS[found.engine]}; {found.seconds:.3f} s")
    if request.plot is not None:
        title = f"{subject.facts.name}: {_method_words(scenario)}, {_rows_words(scenario)}"
        figure = new_figure(10, 5)
        draw_timeline(figure, found, title, capacity)
        save(figure, request.plot, title)
        said["plot"] = str(request.plot)
        console.show(f"plot: {request.plot}")
    console.result(said)
    if capacity is not None and not said["max_micro_batch_size"] and _nothing_fits(scenario, capacity, ask):
        raise MachineError(
            f"{subject.facts.name}: not even one row of {scenario.sequence_length:,} tokens fits in "
            f"{gib(capacity.size_bytes)} ({capacity.name})"
        )


def _show_subject(subject: Subject, scenario: Scenario, found: Estimate, console: Console) -> None:
    share = 100 * found.trainable_parameters / found.parameters
    console.prose(f"{subject.facts.name} ({subject.facts.source})")
    console.show(
        f"{found.parameters:,} parameters; {found.trainable_parameters:,} train ({share:.{1 if share >= 1 else 3}f} %)"
    )
    checkpointing = ", activation checkpointing" if scenario.activation_checkpointing else ""
    console.show(f"{_method_words(scenario)}, {scenario.precision}, {scenario.optimizer}{checkpointing}")
    passes = scenario.micro_batches
    console.show(f"a step: {passes:,} micro-batch{'es' * (passes > 1)} of {_rows_words(scenario)}")
    if scenario.gpus > 1:
        console.show(f"on each of {scenario.gpus} GPUs, {scenario.shard}; figures are for one of them")
    console.show()


def _method_words(scenario: Scenario) -> str:
    if scenario.adapter is None:
        return "full fine-tuning"
    return f"{'QLoRA' if scenario.method == 'qlora' else 'LoRA'} r {scenario.adapter.r}"


def _rows_words(scenario: Scenario) -> str:
    rows = scenario.micro_batch_size
    return f"{rows:,} row{'s' * (rows > 1)} of {scenario.sequence_length:,} tokens"


def _show_parts(found: Estimate, scenario: Scenario, console: Console) -> None:
    rows = [(part, found.parts.get(part, 0)) for part in PARTS if found.parts.get(part, 0)]
    context = context_bytes(scenario.device)
    rows += [
        ("peak allocated", found.peak_allocated_bytes),
        ("allocator's cache", found.peak_reserved_bytes - found.peak_allocated_bytes),
        ("peak reserved", found.peak_reserved_bytes),
        ("device context", context),
        ("process", found.peak_reserved_bytes + context),
    ]
    small = found.peak_reserved_bytes < GIB
    binary, decimal, units = (MIB, 1e6, ("MiB", "MB")) if small else (GIB, 1e9, ("GiB", "GB"))
    console.table(
        "",
        ["part", *(f"{unit:>9}" for unit in units)],
        [[name, f"{size / binary:9,.2f}", f"{size / decimal:9,.2f}"] for name, size in rows],
    )
    console.show()
    console.show(f"The peak is in the {found.peak_phase} phase, at: {found.peak_place}")
    for remark in found.remarks:
        console.prose(remark)


def _show_verdict(
    subject: Subject, scenario: Scenario, found: Estimate, capacity: Capacity, ask: Question, console: Console
) -> dict[str, Any]:
    """Say whether it fits, how much more would, and what to change if it does not; the same for ``--json``."""
    word = verdict(found, scenario.device, capacity)
    rows = largest_micro_batch(scenario, capacity, ask, subject.step_tokens)
    tokens = longest_row(scenario, capacity, ask, subject.facts.positions, subject.step_tokens)
    console.show()
    console.show(
        f"{word}: {gib(process_bytes(found, scenario.device))} of {gib(capacity.size_bytes)} ({capacity.name})"
    )
    console.show(f"up to {gib(capacity.to_fill_bytes)}, {100 * SHARE_TO_FILL:.0f} % of that, counts as fitting")
    if word == "tight":
        console.prose("what is allocated has room; with what the allocator keeps in its cache it may not")
    limit = ", all its positions" if tokens == subject.facts.positions else ""
    console.show(f"largest micro-batch that fits: {f'{rows:,} of these rows' if rows else 'not even one row'}")
    console.show(f"longest rows that fit: {f'{tokens:,} tokens{limit}' if tokens else 'none'}")
    auto = subject.recipe.training.micro_batch_size == "auto"
    advice = changes(scenario, capacity, ask, auto=auto) if word != "fits" else Advice(())
    if word != "fits":
        console.show()
        console.show("What makes it fit, the cheapest first:" if advice.changes else "No single change makes it fit.")
    for number, change in enumerate(advice.changes, start=1):
        _show_change(number, change, console)
    for unknown in advice.not_estimated:
        console.show(f"not estimated: {unknown.what}: {unknown.reason}")
    return {
        "fits": word == "fits",
        "verdict": word,
        "capacity_bytes": capacity.size_bytes,
        "capacity_to_fill_bytes": capacity.to_fill_bytes,
        "max_micro_batch_size": rows,
        "max_sequence_length": tokens,
        "advice": [_change_as_json(change) for change in advice.changes],
        "not_estimated": [{"change": unknown.what, "why": unknown.reason} for unknown in advice.not_estimated],
    }


def _nothing_fits(scenario: Scenario, capacity: Capacity, ask: Question) -> bool:
    """Whether neither what was asked about nor one row, the least there can be, fits or is tight."""
    tried = (scenario, scenario.with_micro_batch_size(1))
    return all(verdict(ask(one), scenario.device, capacity) == "does not fit" for one in tried)


def _show_change(number: int, change: Change, console: Console) -> None:
    needed = process_bytes(change.estimate, change.scenario.device)
    console.prose(f"  {number}. {gib(needed)}: {change.sentence}", hang=5)
    for line in change.lines:
        console.show(f"       {line}")


def _change_as_json(change: Change) -> dict[str, Any]:
    return {
        "change": change.sentence,
        "recipe": "\n".join(change.lines),
        "gpus": change.scenario.gpus,
        "shard": change.scenario.shard,
        "peak_allocated_bytes": change.estimate.peak_allocated_bytes,
        "peak_reserved_bytes": change.estimate.peak_reserved_bytes,
        "process_bytes": process_bytes(change.estimate, change.scenario.device),
    }


def _as_json(scenario: Scenario, found: Estimate) -> dict[str, Any]:
    return {
        "parameters": found.parameters,
        "trainable_parameters": found.trainable_parameters,
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "context_bytes": context_bytes(scenario.device),
        "process_bytes": process_bytes(found, scenario.device),
        "peak_phase": found.peak_phase,
        "peak_place": found.peak_place,
        "parts": {part: found.parts.get(part, 0) for part in PARTS},
        "method": scenario.method,
        "precision": scenario.precision,
        "optimizer": scenario.optimizer,
        "activation_checkpointing": scenario.activation_checkpointing,
        "sequence_length": scenario.sequence_length,
        "micro_batch_size": scenario.micro_batch_size,
        "micro_batches_per_step": scenario.micro_batches,
        "gpus": scenario.gpus,
        "shard": scenario.shard,
        "remarks": list(found.remarks),
        "engine": ENGINE_NAMES[found.engine],
        "seconds": found.seconds,
    }


def _show_textbook(request: Request, subject: Subject, ask: Question, console: Console) -> None:
    """The arithmetic of textbooks for the number in a name and for the exact models, and what it leaves out."""
    lora = ask(replace(subject.scenario(), adapter=subject.recipe.adapter or Adapter()))
    exact = Column(subject.facts.name, lora.parameters)
    counted = columns(request.model or subject.facts.name, exact)
    table = lines(counted, lora.trainable_parameters)
    cells = [["parameters", *(f"{column.parameters:,}" for column in counted)]]
    for line in table:
        cells.append([line.what, *map(as_gib, line.sizes_bytes)])
        cells.append([f"  {line.how}", *(f"= {as_gb(size)}" for size in line.sizes_bytes)])
    width = max(len(cell) for row in cells for cell in row[1:])
    console.table(
        "",
        ["", *(f"{column.name:>{width}}" for column in counted)],
        [[row[0], *(f"{cell:>{width}}" for cell in row[1:])] for row in cells],
    )
    console.show()
    for sentence in (units_explained(table), *LEFT_OUT):
        console.prose(sentence)
    console.result(
        {
            "view": "textbook",
            "model": subject.facts.name,
            "parameters": {column.name: column.parameters for column in counted},
            "lines": [
                {"what": line.what, "how": line.how}
                | {"bytes": dict(zip((column.name for column in counted), line.sizes_bytes, strict=True))}
                for line in table
            ],
        }
    )


def _show_models_that_fit(request: Request, console: Console) -> None:
    """Every known model with the first method that fits, one row in a micro-batch unless more are asked for."""
    _, capacity = device_and_capacity(request)
    assert capacity is not None

    def ask(scenario: Scenario) -> Estimate:
        return estimate(scenario, exact=request.exact)

    listed: list[dict[str, Any]] = []
    for number, model in enumerate(known_models().values(), start=1):
        facts: dict[str, Any] = {"model": model.name, "parameters": model.parameters}
        try:
            subject = subject_of(replace(request, fits=None, model=model.name))
            best = cheapest_method(subject.scenario(), model.parameters, capacity, Question(ask, quick_peak_bytes))
        except NOT_ESTIMABLE as error:
            listed.append(facts | {"method": None, "why": str(error)})
        else:
            listed.append(facts | _method_as_json(best, subject))
        console.progress("models", number, len(known_models()))
    fitting = [one for one in listed if one["method"] is not None]
    rows = request.micro_batch_size if isinstance(request.micro_batch_size, int) else 1
    length = request.sequence_length or Packing().sequence_length
    shorter = "" if request.sequence_length else " (of a model with fewer positions: all of them)"
    console.prose(
        f"Micro-batches of {rows:,} row{'s' * (rows > 1)} of {length:,} tokens{shorter} in {gib(capacity.size_bytes)}"
    )
    if fitting:
        console.table(
            "",
            ["model", "parameters", "cheapest method that fits", f"{'process GiB':>11}", "trained parameters"],
            [
                [
                    one["model"],
                    one["parameters"],
                    one["method"],
                    f"{one['process_bytes'] / GIB:11.2f}",
                    one["trainable_parameters"],
                ]
                for one in fitting
            ],
        )
    others = [one["model"] for one in listed if one["method"] is None and "why" not in one]
    console.show()
    if others:
        console.prose(f"{len(others)} fit by no method: {', '.join(others)}")
    for one in listed:
        if "why" in one:
            instead = "" if one["method"] is None else f"{one['method']} fits; before it "
            console.prose(f"not estimated: {one['model']}: {instead}{one['why']}", hang=2)
    console.result({"capacity_bytes": capacity.size_bytes, "micro_batch_size": rows, "models": listed})
    if not fitting:
        raise MachineError(f"--fits: no known model fits in {gib(capacity.size_bytes)}")


def _method_as_json(best: Cheapest, subject: Subject) -> dict[str, Any]:
    reasons: dict[str, list[str]] = {}
    for unknown in best.not_estimated:
        reasons.setdefault(unknown.reason, []).append(unknown.what)
    why = "; ".join(f"{', '.join(whats)}: {reason}" for reason, whats in reasons.items())
    refused = {"why": why} if why else {}
    if best.method is None or best.estimate is None:
        return {"method": None} | refused
    method, found = best.method, best.estimate
    return {
        "method": method.name,
        "sequence_length": subject.recipe.packing.sequence_length,
        "trainable_parameters": found.trainable_parameters,
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "process_bytes": process_bytes(found, subject.device),
        "engine": ENGINE_NAMES[found.engine],
    } | refused
