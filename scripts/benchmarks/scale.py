"""``scripts/bench scale``: memory and time of a step on 8 to 1,024 GPUs, on paper, and what packing in shards costs.

Memory is the estimator's own trace of one GPU's step (:mod:`trainkit.memory`), time is :mod:`benchmarks.step_time`.
Nothing here needs a GPU or weights.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.step_time import GPUS_PER_MACHINE, H100, Speeds, StepTime, balancing_tokens, llama_shapes, step_time
from trainkit.errors import UsageError
from trainkit.memory.gpus import find_gpu
from trainkit.memory.models import known_models
from trainkit.memory.scenario import Device, Scenario
from trainkit.memory.sizes import GIB
from trainkit.memory.verdict import Capacity, verdict
from trainkit.recipe.schema import Adapter, Training
from trainkit.training.plan import make_plan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

MODELS = ("llama-3.1-8b", "llama-3.3-70b", "llama-3.1-405b")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPU = "h100-80gb"
ROW_TOKENS = 4096
TOKENS_PER_STEP = 2**22
"""With rows of 4,096 tokens the batch that Llama 3's pre-training began with (Llama Team 2024, section 3.4.1)."""

Trains = Literal["full", "lora"]
TRAINS: tuple[Trains, ...] = ("full", "lora")


@dataclass(frozen=True)
class Case:
    """A model trained in full or by LoRA of the default rank, on ``gpus`` that share everything out (FSDP2).

    bf16, AdamW, activation checkpointing, one row in a micro-batch.
    """

    model: str
    trains: Trains
    gpus: int
    row_tokens: int = ROW_TOKENS
    tokens_per_step: int = TOKENS_PER_STEP

    @property
    def adapter(self) -> Adapter | None:
        """As the recipe has it."""
        return Adapter() if self.trains == "lora" else None

    def rows_per_gpu(self) -> int:
        """Rows of a step on one GPU, one micro-batch each. Raises UsageError, as a run does, where there are none."""
        training = Training(steps=1, tokens_per_step=self.tokens_per_step)
        plan = make_plan(training, rows=1, sequence_length=self.row_tokens, micro_batch_size=1, processes=self.gpus)
        return plan.micro_batches_per_step


@dataclass(frozen=True)
class Line:
    """What is found of a case; bytes of one GPU, and seconds of a step. ``refused`` says why there is no step."""

    case: Case
    rows_per_gpu: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    verdict: str = ""
    time: StepTime | None = None
    refused: str = ""


def memory_of(case: Case) -> tuple[int, int, str]:
    """Peak allocated and peak reserved bytes of one GPU, and whether that fits; a trace, which takes seconds."""
    from trainkit.memory.estimate import estimate

    scenario = Scenario(
        config=known_models()[case.model].config,
        sequence_length=case.row_tokens,
        micro_batches=case.rows_per_gpu(),
        adapter=case.adapter,
        activation_checkpointing=True,
        gpus=case.gpus,
        shard="fsdp2",
        device=Device("cuda", find_gpu(GPU).capability),
    )
    found = estimate(scenario)
    fits = verdict(found, scenario.device, Capacity(GPU, find_gpu(GPU).usable_bytes))
    return found.peak_allocated_bytes, found.peak_reserved_bytes, fits


def time_of(case: Case, speeds: Speeds = H100) -> StepTime:
    """Seconds of a step, by :func:`benchmarks.step_time.step_time`."""
    shapes = llama_shapes(known_models()[case.model].config, case.adapter.r if case.adapter else None)
    return step_time(shapes, case.gpus, row_tokens=case.row_tokens, rows_per_gpu=case.rows_per_gpu(), speeds=speeds)


def line_of(case: Case) -> Line:
    """Memory and time of a case; traced where there is a step at all."""
    try:
        rows = case.rows_per_gpu()
    except UsageError as error:
        return Line(case, refused=str(error))
    return Line(case, rows, *memory_of(case), time_of(case))


# --- published runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A run that others measured on H100s with FSDP alone, in bf16: tokens a second on each GPU."""

    who: str
    model: str
    gpus: int
    row_tokens: int
    rows: int
    checkpointing: bool
    tokens_per_second: float
    network_bytes: float = H100.network_bytes


PUBLISHED = (
    Published("torchtitan", "llama-3.1-8b", 8, 8192, 2, checkpointing=False, tokens_per_second=5762),
    Published("torchtitan", "llama-3.1-8b", 128, 8192, 2, checkpointing=False, tokens_per_second=5605),
    Published(
        "fms-fsdp", "codellama-34b", 96, 4096, 2, checkpointing=True, tokens_per_second=1550, network_bytes=100e9
    ),
)
"""torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, without torch.compile; its "selective"
checkpointing recomputes little and is taken for none; GPUs limited to 500 W. fms-fsdp: its README, 34b; "800 Gbps" is
taken to be a machine's."""


def published_line(run: Published) -> dict[str, Any]:
    """The run beside the model's bounds, in tokens a second on each GPU."""
    time = step_time(
        llama_shapes(known_models()[run.model].config),
        run.gpus,
        row_tokens=run.row_tokens,
        rows_per_gpu=run.rows,
        micro_batch_size=run.rows,
        checkpointing=run.checkpointing,
        speeds=replace(H100, network_bytes=run.network_bytes),
    )
    tokens = run.rows * run.row_tokens
    return {
        "run": asdict(run),
        "in_turn": tokens / time.in_turn,
        "overlapped": tokens / time.overlapped,
        "measured": run.tokens_per_second,
    }


# --- where it stops -------------------------------------------------------------------------------------------------

BALANCED_GPUS = (8, 64, 1024)
STORED_BYTES = 2
"""Of a number in the files that these models are published in."""


def limits_of(model: str, trains: Trains) -> dict[str, Any]:
    """What a machine needs besides GPUs, and the shortest rows that links do not slow down.

    The processes of a machine load the whole model into host memory, one after another (trainkit/training/assembly.py):
    fp32 where it trains, bf16 below an adapter. At the end the first one loads it again, beside what was trained. While
    the last of them loads, the first waits in a collective, which is given up after COLLECTIVE_SECONDS.
    """
    from trainkit.training.processes import COLLECTIVE_SECONDS

    config, rank = known_models()[model].config, Case(model, trains, GPUS_PER_MACHINE).adapter
    shapes = llama_shapes(config, rank.r if rank else None)
    base, trained = known_models()[model].parameters, shapes.parameters(trained=True)
    loaded = base * 4 if rank is None else base * 2 + trained * 4
    return {
        "model": model,
        "trains": trains,
        "loading_bytes": loaded,
        "finishing_bytes": loaded + trained * 4,
        "reading_bytes_per_second": base * STORED_BYTES * (GPUS_PER_MACHINE - 1) / COLLECTIVE_SECONDS,
        "balancing_tokens": [balancing_tokens(shapes, gpus) for gpus in BALANCED_GPUS],
    }


def limits_table(lines: list[dict[str, Any]]) -> list[str]:
    """The same as a Markdown table."""
    gpus = ", ".join(f"{number:,}" for number in BALANCED_GPUS)
    rows = [
        f"| model | trains | host GiB, loading | host GiB, at the end | reading GB/s | balancing tokens: {gpus} GPUs |",
        "|---" * 6 + "|",
    ]
    rows += [
        f"| {line['model']} | {line['trains']} | {line['loading_bytes'] / GIB:,.0f} | "
        f"{line['finishing_bytes'] / GIB:,.0f} | {line['reading_bytes_per_second'] / 1e9:.2f} | "
        f"{', '.join(f'{tokens:,}' for tokens in line['balancing_tokens'])} |"
        for line in lines
    ]
    return rows


# --- the verb -------------------------------------------------------------------------------------------------------


def measure_scale(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that ``--part`` names, all without."""
    found: dict[str, Any] = {}
    if options.part in (None, "steps"):
        found["steps"] = [asdict(line) for line in _lines(options)]
    if options.part in (None, "published"):
        found["published"] = [published_line(run) for run in PUBLISHED]
    if options.part in (None, "limits"):
        found["limits"] = [limits_of(model, trains) for model in MODELS for trains in TRAINS]
    if options.part in (None, "packing"):
        from benchmarks.packing_shards import measure_shards

        found["packing"] = measure_shards(options)
    return found


def _lines(options: argparse.Namespace) -> Iterator[Line]:
    for model in options.model or MODELS:
        for trains in options.trains or TRAINS:
            for gpus in options.gpus or GPUS:
                case = Case(model, trains, gpus, options.sequence_length, options.tokens_per_step)
                print(f"  {model}, {trains}, {gpus} GPUs", file=sys.stderr, flush=True)
                yield line_of(case)


def table(found: dict[str, Any]) -> str:
    """What :func:`measure_scale` found, as Markdown."""
    parts = []
    if "steps" in found:
        parts.append("\n".join(steps_table(found["steps"])))
    if "published" in found:
        parts.append("\n".join(published_table(found["published"])))
    if "limits" in found:
        parts.append("\n".join(limits_table(found["limits"])))
    if "packing" in found:
        from benchmarks.packing_shards import shards_tables

        parts.append(shards_tables(found["packing"]))
    return "\n\n".join(parts)


STEPS_COLUMNS = (
    "model",
    "trains",
    "GPUs",
    "rows a GPU",
    "allocated GiB",
    "reserved GiB",
    "in 80 GB",
    "computing s",
    "exchanging s",
    "step s",
    "tokens/s a GPU",
)


def steps_table(lines: list[dict[str, Any]]) -> list[str]:
    """The lines as rows of a Markdown table."""
    head = [f"| {' | '.join(STEPS_COLUMNS)} |", "|---" * len(STEPS_COLUMNS) + "|"]
    return [*head, *(f"| {' | '.join(steps_cells(line))} |" for line in lines)]


def steps_cells(line: dict[str, Any]) -> list[str]:
    """The cells of one line."""
    case = Case(**line["case"])
    named = [case.model, case.trains, f"{case.gpus:,}"]
    if line["refused"]:
        return [*named, "less than one: refused", *[""] * 7]
    time = StepTime(**line["time"])
    tokens = line["rows_per_gpu"] * case.row_tokens
    return [
        *named,
        f"{line['rows_per_gpu']:,}",
        f"{line['allocated_bytes'] / GIB:,.1f}",
        f"{line['reserved_bytes'] / GIB:,.1f}",
        line["verdict"],
        _seconds(time.computing),
        _seconds(time.exchanging),
        f"{_seconds(time.overlapped)} to {_seconds(time.in_turn)}",
        f"{tokens / time.in_turn:,.0f} to {tokens / time.overlapped:,.0f}",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 1000 else f"{seconds:.3g}"


def published_table(lines: list[dict[str, Any]]) -> list[str]:
    """Published runs beside the model, as a Markdown table."""
    rows = ["| run | GPUs | rows | model's tokens/s a GPU | measured | measured ÷ overlapped |", "|---" * 6 + "|"]
    for line in lines:
        run = line["run"]
        rows.append(
            f"| {run['who']}, {run['model']} | {run['gpus']} | {run['rows']} of {run['row_tokens']:,} | "
            f"{line['in_turn']:,.0f} to {line['overlapped']:,.0f} | {line['measured']:,.0f} | "
            f"{line['measured'] / line['overlapped']:.2f} |"
        )
    return rows
