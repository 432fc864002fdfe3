"""What `estimate-memory` is asked about: the options and the file become a recipe, a model and a device. Torch-free.

The options are short for keys of a recipe and are read by its reader, so that there is one path, whichever is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from trainkit.errors import UsageError
from trainkit.memory.advice import MOST_TOKENS
from trainkit.memory.gpus import find_gpu
from trainkit.memory.models import ModelFacts, check_sequence_length, model_facts
from trainkit.memory.scenario import Device, Scenario, scenario_of
from trainkit.memory.sizes import size_in_bytes
from trainkit.memory.verdict import Capacity
from trainkit.recipe.precision import chosen_precision
from trainkit.recipe.reader import Flag, read_recipe
from trainkit.recipe.schema import Model, Packing, Recipe, Training
from trainkit.recipe.written import text_as_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# What --fits decides itself or has no use for, and all that the textbook's arithmetic knows.
_NOT_WITH_FITS = {"RECIPE", "--model", "--adapter", "--activation-checkpointing", "--gpu", "--memory", "--plot"}
_DECIDED_BY_FITS = {"model", "model.name", "model.revision", "model.activation_checkpointing"}
_WITH_TEXTBOOK = {"RECIPE", "--model", "--set", "--view"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks; None and False where it says nothing."""

    recipe: str | None = None
    overrides: Sequence[str] = ()
    model: str | None = None
    adapter: Literal["none", "lora", "qlora"] | None = None
    precision: str | None = None
    sequence_length: int | None = None
    micro_batch_size: int | Literal["auto"] | None = None
    activation_checkpointing: bool = False
    optimizer: str | None = None
    gpus: int = 1
    shard: Literal["none", "ddp", "fsdp2"] | None = None
    gpu: str | None = None
    memory: str | None = None
    exact: bool = False
    textbook: bool = False
    fits: str | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Subject:
    """What is estimated: a model, the recipe that trains it, a device, and its capacity where one is given.

    ``step_tokens`` are those of a step on each device before the recipe's step was made to hold a larger micro-batch.
    """

    facts: ModelFacts
    recipe: Recipe
    step_tokens: int
    warnings: tuple[str, ...]
    device: Device
    capacity: Capacity | None
    gpus: int
    shard: Literal["none", "ddp", "fsdp2"]

    def scenario(self) -> Scenario:
        """The recipe's step; one row where the recipe leaves the micro-batch to the memory."""
        return scenario_of(
            self.recipe,
            self.facts.config,
            device=self.device,
            gpus=self.gpus,
            shard=self.shard,
            place=self.facts.place,
        )


def check_request(request: Request) -> None:
    """Raise UsageError for options that do not go together; before anything is read."""
    given = _given(request)
    if request.fits is not None:
        _refuse("--fits: lists every known model by the cheapest method", given & _NOT_WITH_FITS)
        for override in request.overrides:
            key = override.partition("=")[0].strip()
            if key.partition(".")[0] == "adapter" or key in _DECIDED_BY_FITS:
                _refuse("--fits: lists every known model by the cheapest method", {f"--set {key}"})
    elif not given & {"RECIPE", "--model"}:
        raise UsageError("give a RECIPE or --model NAME; see `trainkit estimate-memory --help`")
    if request.textbook:
        _refuse("--view: textbook counts parameters alone", given - _WITH_TEXTBOOK)
    if request.gpu is not None and request.memory is not None:
        raise UsageError("--memory: --gpu says how much memory there is already; give one of the two")
    if request.gpus > 1 and request.shard == "none":
        raise UsageError(
            f"--gpus: {request.gpus} GPUs that share nothing each need the same; give --shard ddp or fsdp2"
        )
    if request.gpus == 1 and request.shard in ("ddp", "fsdp2"):
        raise UsageError(f"--shard: {request.shard} needs --gpus 2 or more")


def _given(request: Request) -> set[str]:
    """The arguments and options that the command line names, by their names there."""
    named = {"recipe": "RECIPE", "overrides": "--set", "textbook": "--view"}
    return {
        named.get(option.name, f"--{option.name.replace('_', '-')}")
        for option in fields(request)
        if getattr(request, option.name) != option.default
    }


def _refuse(why: str, unwanted: set[str]) -> None:
    if unwanted:
        raise UsageError(f"{why}, so {min(unwanted)} has no place beside it; leave one out")


def device_and_capacity(request: Request) -> tuple[Device, Capacity | None]:
    """The device to estimate for (a recent GPU where none is named), and its memory where that is said."""
    if request.gpu is not None:
        gpu = find_gpu(request.gpu)
        return Device("cuda", gpu.capability), Capacity(gpu.name, gpu.usable_bytes)
    text, option = (request.memory, "--memory") if request.fits is None else (request.fits, "--fits")
    if text is None:
        return Device(), None
    size = size_in_bytes(text, option)
    return Device(), Capacity("as given", size)


def subject_of(request: Request) -> Subject:
    """The recipe that the file and the options make, and the model it names.

    Raises UsageError, ModelError and MachineError as a run of that recipe would, before anything is downloaded but a
    config.json.
    """
    device, capacity = device_and_capacity(request)
    facts = model_facts(Model(name=request.model)) if request.model is not None and request.recipe is None else None
    resized = request.sequence_length is not None or isinstance(request.micro_batch_size, int)
    written = read_recipe(request.recipe, request.overrides).recipe if request.recipe and resized else None
    read = read_recipe(request.recipe, request.overrides, _flags(request, facts, written))
    recipe = read.recipe
    facts = facts if facts and recipe.model.name == request.model else model_facts(recipe.model)
    check_sequence_length(facts, recipe.packing.sequence_length)
    _check_rows(recipe, request.gpus)
    chosen_precision(recipe.precision, device.kind, device.capability, request.gpu or "this GPU")  # raises for a GPU's
    shard = request.shard or ("none" if request.gpus == 1 else "ddp")
    warnings = read.warnings if request.recipe is not None else ()
    step_tokens = recipe.training.tokens_per_step
    if written is not None or request.recipe is None:
        step_tokens = _written_step_tokens(request, written)
    return Subject(facts, recipe, step_tokens // request.gpus, warnings, device, capacity, request.gpus, shard)


def _check_rows(recipe: Recipe, gpus: int) -> None:
    """Raise UsageError for a micro-batch beyond estimating, and where a step has none for every GPU."""
    rows = 1 if recipe.training.micro_batch_size == "auto" else recipe.training.micro_batch_size
    if (tokens := rows * recipe.packing.sequence_length) > MOST_TOKENS:
        raise UsageError(
            f"training.micro_batch_size: {rows:,} rows of {recipe.packing.sequence_length:,} tokens are {tokens:,} "
            f"tokens; more than {MOST_TOKENS:,} in a micro-batch are not estimated"
        )
    needed, there = rows * gpus * recipe.packing.sequence_length, recipe.training.tokens_per_step
    if needed > there:
        raise UsageError(
            f"training.tokens_per_step: {there:,} tokens are no micro-batch for each of {gpus} GPUs; at least "
            f"{needed:,} are needed"
        )


def _flags(request: Request, facts: ModelFacts | None, written: Recipe | None) -> list[Flag]:
    """The options as keys of a recipe. Without a file they are the whole recipe, of data that is never read.

    ``written`` is the file's recipe, where the options say other rows.
    """
    flags = []
    length = request.sequence_length
    if request.recipe is None or length is not None:  # --set goes before both
        length = _overridden(request, "packing.sequence_length") or length
    if request.recipe is None:
        longest = facts.positions if facts and facts.positions else None
        default = Packing().sequence_length
        length = length or (min(default, longest) if longest else default)
        for key, value in (("data.train", "data.jsonl"), ("training.steps", "1"), ("output_dir", "runs/estimate")):
            flags.append(Flag("--model", key, value))
        overlap = min(Packing().overlap, length // 2)
        flags.append(Flag("--sequence-length", "packing.overlap", str(overlap)))
    if request.micro_batch_size is not None or request.recipe is None:
        flags.append(Flag("--micro-batch-size", "training.micro_batch_size", str(request.micro_batch_size or 1)))
    if request.model is not None:
        flags.append(Flag("--model", "model.name", text_as_yaml(request.model)))
    if length is not None:
        flags.append(Flag("--sequence-length", "packing.sequence_length", str(length)))
    if length is not None or isinstance(request.micro_batch_size, int):
        flags.append(_tokens_per_step(request, length, written))
    if request.adapter is not None:
        key, value = ("adapter", "null") if request.adapter == "none" else ("adapter.type", request.adapter)
        flags.append(Flag("--adapter", key, value))
    if request.activation_checkpointing:
        flags.append(Flag("--activation-checkpointing", "model.activation_checkpointing", "true"))
    if request.precision is not None:
        flags.append(Flag("--precision", "precision", text_as_yaml(request.precision)))
    if request.optimizer is not None:
        flags.append(Flag("--optimizer", "training.optimizer", text_as_yaml(request.optimizer)))
    return flags


def _overridden(request: Request, key: str) -> int | None:
    """The whole number above 0 that ``--set`` gives a key; None where it gives none, or what the reader will refuse."""
    found = None
    for override in request.overrides:
        name, _, value = override.partition("=")
        if name.strip() == key:
            found = int(value) if re.fullmatch(r"\s*0*[1-9][0-9]{0,17}\s*", value) else None
    return found


def _written_step_tokens(request: Request, written: Recipe | None) -> int:
    """The tokens of a step as the recipe says, or the default."""
    if written is None:
        return _overridden(request, "training.tokens_per_step") or Training.tokens_per_step
    return written.training.tokens_per_step


def _tokens_per_step(request: Request, length: int | None, written: Recipe | None) -> Flag:
    """As many tokens in a step as the recipe says (or its default): whole rows, and a micro-batch for every GPU."""
    rows: int | Literal["auto"] | None = _overridden(request, "training.micro_batch_size") or request.micro_batch_size
    if written is not None:
        rows = written.training.micro_batch_size if rows is None else rows
        length = length or written.packing.sequence_length
    length = length or Packing().sequence_length
    least = (rows if isinstance(rows, int) else 1) * request.gpus
    whole = max(_written_step_tokens(request, written) // length, least) * length
    return Flag("--sequence-length", "training.tokens_per_step", str(whole))
