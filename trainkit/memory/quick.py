"""The quick engine: recorded logs instead of a trace. Torch-free; a few milliseconds for an answer.

It covers the decoders of :mod:`trainkit.memory.families`, trained in bf16 on a GPU with the variable-length kernel, in
full or with LoRA or QLoRA on every linear layer. Its logs are traces (``scripts/record_memory_logs``), so that its
answers are those of the trace.
"""

from __future__ import annotations

import lzma
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple

from trainkit.memory.event_log import Axis, EventLog, unfold
from trainkit.memory.families import FAMILIES, Family, family_of, is_tied, shape_of
from trainkit.memory.replay import peak_of_folded
from trainkit.memory.scenario import AMPERE
from trainkit.memory.symbolic_log import Dimensions, SymbolicLog
from trainkit.recipe.schema import Adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trainkit.memory.scenario import Scenario

Method = Literal["full", "lora", "qlora"]

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
_CHUNK_TOKENS = 1024  # of trainkit.model.loss on a GPU; a test compares them
_PLAIN_LOGITS = 2**22  # there too: up to this many, the loss is not cut into chunks
_LEAST_UNPACKED = 1537  # tokens from which a 4-bit weight is unpacked to multiply (trainkit.memory.four_bit)
_LINEAR_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


class LogFile(NamedTuple):
    """Logs that are stored together, since compressed together they take a third: those of one model and method."""

    family: str
    tied: bool
    method: Method
    left_over: int = 0  # layers beyond whole periods

    @property
    def name(self) -> str:
        """The file's name."""
        left_over = f"-{self.left_over}-over" if self.left_over else ""
        return f"{self.family}-{'tied' if self.tied else 'untied'}-{self.method}{left_over}.jsonl.xz"

    def logs(self) -> list[LogKey]:
        """Its logs, in the order of its lines."""
        either = (False, True)
        family = _named(self.family)
        cut = either if family.cuts_loss else (True,)
        one_row = either if family.row_differs else (False,)
        return [LogKey(self, *kind) for kind in product(either, either, cut, one_row)]


class LogKey(NamedTuple):
    """What makes a step another sequence of operators.

    ``accumulates``: gradients are there before the step. ``one_chunk``: the loss is not cut.
    ``one_row``: of the micro-batch, where that is another sequence than several.
    """

    file: LogFile
    checkpointed: bool
    accumulates: bool
    one_chunk: bool
    one_row: bool = False


def all_files() -> Iterator[LogFile]:
    """Every file of logs that is stored."""
    for family in FAMILIES:
        for found in product(family.ties, METHODS, family.left_over):
            yield LogFile(family.name, *found)


def covers(scenario: Scenario) -> bool:
    """Whether the answer can be had from a recorded log."""
    return family_of(scenario.config) is not None and _covers_training(scenario)


def quick_log(scenario: Scenario) -> EventLog:
    """The step's log at full depth, of a scenario that is covered."""
    folded = _at(scenario)
    period = _family(scenario).period
    for axis, count in reversed(_counts(scenario).items()):  # the layers last: they are many, and walked once then
        folded = unfold(folded, count, axis, period if axis is Axis.LAYER else 1)
    return folded


def quick_peak_bytes(scenario: Scenario) -> int:
    """The allocated peak alone, without libraries' workspaces: for a search among many scenarios, all covered."""
    return peak_of_folded(_at(scenario), _counts(scenario))


def quick_counts(scenario: Scenario) -> tuple[int, int]:
    """Parameters of the model and trained parameters, of a scenario that is covered."""
    return _log_of(key_of(scenario)).counts(_dimensions(scenario), _counts(scenario)[Axis.LAYER])


def key_of(scenario: Scenario) -> LogKey:
    """Which log a scenario's step is, where it is covered."""
    family = _family(scenario)
    return LogKey(
        LogFile(
            family.name,
            is_tied(scenario.config, family),
            scenario.method,
            shape_of(scenario.config, family).layers % family.period,
        ),
        checkpointed=scenario.activation_checkpointing,
        accumulates=scenario.micro_batches > 1,
        one_chunk=_chunks(scenario) == 1 or not family.cuts_loss,
        one_row=family.row_differs and scenario.micro_batch_size == 1,
    )


def _covers_training(scenario: Scenario) -> bool:
    device = scenario.device
    adapter = scenario.adapter
    logits = scenario.tokens * scenario.config["vocab_size"]
    return (
        scenario.loop == "trainkit"
        and (device.kind == "cuda" and device.capability >= AMPERE)
        and scenario.precision == scenario.frozen_storage == "bf16"
        and scenario.attention in {"auto", "varlen", "flash_attention_2"}
        and scenario.optimizer == "adamw"
        and scenario.documents_per_row == 1
        and (scenario.shard in {"none", "ddp"} or scenario.gpus == 1)
        and logits > _PLAIN_LOGITS
        and (scenario.method != "qlora" or scenario.tokens >= _LEAST_UNPACKED)
        and (adapter is None or _adapts_every_linear_layer(adapter))
    )


def _adapts_every_linear_layer(adapter: Adapter) -> bool:
    """With one rank, no dropout and nothing besides."""
    targets = adapter.target_modules
    plain = Adapter(type=adapter.type, r=adapter.r)
    numbers = replace(adapter, target_modules="all-linear", alpha_pattern={}, alpha=plain.alpha)
    same = replace(numbers, use_rslora=False, init_lora_weights=True)
    return same == plain and (targets == "all-linear" or frozenset(targets) == _LINEAR_LAYERS)


def _at(scenario: Scenario) -> EventLog:
    return _log_of(key_of(scenario)).at(_dimensions(scenario))


def _dimensions(scenario: Scenario) -> Dimensions:
    shape = shape_of(scenario.config, _family(scenario))
    chunks = _chunks(scenario)
    queries_per_key = shape.heads // shape.key_value_heads
    return Dimensions(
        rows=scenario.micro_batch_size,
        tokens=scenario.sequence_length,
        key_value_heads=shape.key_value_heads,
        queries_per_key=queries_per_key,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        head_width=shape.head_width,
        vocabulary=shape.vocabulary,
        rank=1 if scenario.adapter is None else scenario.adapter.r,
        chunk=_CHUNK_TOKENS,
        last_chunk=scenario.tokens - (chunks - 1) * _CHUNK_TOKENS,
        fused_heads=queries_per_key + 2,
        positions=shape.positions,
    )


@cache
def _log_of(key: LogKey) -> SymbolicLog:
    return SymbolicLog.from_line(stored_lines(key.file)[key.file.logs().index(key)])


@cache
def stored_lines(file: LogFile) -> Sequence[bytes]:
    """The logs of a file, each a line of JSON."""
    data = (files("trainkit.memory") / "logs" / file.name).read_bytes()
    return lzma.decompress(data).split(b"\n")


def _family(scenario: Scenario) -> Family:
    family = family_of(scenario.config)
    assert family is not None, "asked only of what is covered"
    return family


def _named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def _counts(scenario: Scenario) -> dict[Axis, int]:
    """How many units of each axis that repeats."""
    family, chunks = _family(scenario), _chunks(scenario)
    units = shape_of(scenario.config, family).layers // family.period
    return {Axis.LAYER: units} | ({Axis.CHUNK: chunks} if chunks > 1 and family.cuts_loss else {})


def _chunks(scenario: Scenario) -> int:
    return -(-scenario.tokens // _CHUNK_TOKENS)
