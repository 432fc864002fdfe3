"""The verbs of ``scripts/bench``; each prints a table, or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.packing import WORKS
from benchmarks.packing_peers import installing_lines
from benchmarks.setting import add_options
from trainkit.errors import TrainkitError

if TYPE_CHECKING:
    from collections.abc import Sequence

MATERIAL_HELP = "real data and models (default: $TRAINKIT_MATERIAL, or shared/ beside the repository)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "step":
            from benchmarks.step import measure_steps, table

            found = measure_steps(options)
        elif options.verb == "pack":
            from benchmarks.packing import measure_packing, table

            found = measure_packing(options)
        elif options.verb == "positions":
            from benchmarks.positions import measure_positions, table

            found = measure_positions(options)
        elif options.verb == "memory":
            from benchmarks.memory import measure_memory, table

            found = measure_memory(options)
        elif options.verb == "reliability":
            from benchmarks.reliability import measure_reliability, table

            found = measure_reliability(options)
        elif options.verb == "pauses":
            from benchmarks.pauses import measure_pauses, table

            found = measure_pauses(options)
        elif options.verb == "scale":
            from benchmarks.scale import measure_scale, table

            found = measure_scale(options)
        else:
            from benchmarks.micro_batch import measure_micro_batches, table

            found = measure_micro_batches(options)
    except TrainkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(_circumstances(options) | found, default=str) if options.json else table(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Measures trainkit on this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    step = verbs.add_parser(
        "step",
        help="tokens/s of a training step, beside TRL's",
        description="Real (non-pad) tokens per second of a training step, LoRA and full, of trainkit and of TRL's "
        "SFTTrainer in turns in one process; without TRL, of trainkit alone.",
    )
    add_options(step, steps=8)
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the computation (default: fp32)")
    step.add_argument("--rows", type=int, default=8, help="rows in a step (default: 8)")
    step.add_argument("--micro-batch", type=int, default=8, help="rows in a forward pass (default: 8)")
    step.add_argument("--json", action="store_true", help="print one JSON object")
    micro_batch = verbs.add_parser(
        "micro-batch",
        help="tokens/s of a training step by the rows in a forward pass",
        description="Tokens per second of steps of 16 rows, in micro-batches of 1 to 16 rows, in turns.",
    )
    add_options(micro_batch, steps=8)
    micro_batch.add_argument("--json", action="store_true", help="print one JSON object")
    pack = verbs.add_parser(
        "pack",
        help="rows, time and memory of packing, beside the packers of other projects",
        description="Packing by trainkit and by other projects' packers on the same lengths, as Markdown tables. Each "
        "measurement runs in a process of its own; times are the least of several runs where those are short.",
        epilog=_pack_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_pack(pack)
    positions = verbs.add_parser(
        "positions",
        help="what resetting positions in packed rows changes: logits and training",
        description="Identity: how far logits move when positions are not reset, by kind of position and precision. "
        "Training: documents padded, packed, isolated, reset, all evaluated alike. Markdown tables.",
    )
    _add_positions(positions)
    memory = verbs.add_parser(
        "memory",
        help="estimates beside other tools', and beside a GPU where there is one",
        description="Peak memory of training steps as trainkit estimates it, beside accelerate, fitcheck-llm and "
        "DeepSpeed where they are installed; with a CUDA device, beside what real steps take.",
    )
    memory.add_argument("--grid", action="store_true", help="only measure on the GPU")
    memory.add_argument("--published", type=Path, metavar="FILE", help="only hold against published T4 measurements")
    memory.add_argument("--json", action="store_true", help="print one JSON object")
    reliability = verbs.add_parser(
        "reliability",
        help="what saving, checksums and starting again cost",
        description="Pause and share of the wall time of a save, speed of checksums, start-up from a checkpoint beside "
        "a fresh one, finding the place in ten million rows, inspecting 1 GB of data. A Markdown table.",
    )
    reliability.add_argument("--quick", action="store_true", help="a short run: seconds, and no result")
    reliability.add_argument("--json", action="store_true", help="print one JSON object")
    pauses = verbs.add_parser(
        "pauses",
        help="how long what a run does keeps its heartbeat waiting",
        description="The longest time in which another thread did not run while tensors and a model were made, saved, "
        "loaded, hashed and trained. A Markdown table.",
    )
    pauses.add_argument("--quick", action="store_true", help="a small model: seconds, and no result")
    pauses.add_argument("--json", action="store_true", help="print one JSON object")
    scale = verbs.add_parser(
        "scale",
        help="memory and time of a step on 8 to 1,024 GPUs, on paper; packing in shards, measured",
        description="Llama of 8B, 70B and 405B, in full and by LoRA: memory of one GPU by the estimator, time by "
        "stated speeds; published runs beside the same arithmetic; packing in shards. Markdown tables.",
    )
    _add_scale(scale)
    return parser


def _add_scale(scale: argparse.ArgumentParser) -> None:
    from benchmarks.scale import GPUS, MODELS, ROW_TOKENS, TOKENS_PER_STEP, TRAINS

    scale.add_argument("--part", choices=("steps", "published", "limits", "packing"), help="one part (default: all)")
    scale.add_argument("--model", action="append", choices=MODELS, help="may be repeated (default: all)")
    scale.add_argument("--trains", action="append", choices=TRAINS, help="may be repeated (default: both)")
    scale.add_argument("--gpus", action="append", type=int, help=f"may be repeated (default: {GPUS[0]} to {GPUS[-1]})")
    scale.add_argument("--sequence-length", type=int, default=ROW_TOKENS, help=f"of a row (default: {ROW_TOKENS:,})")
    scale.add_argument(
        "--tokens-per-step", type=int, default=TOKENS_PER_STEP, help=f"over all GPUs (default: {TOKENS_PER_STEP:,})"
    )
    scale.add_argument("--material", metavar="DIR", help=MATERIAL_HELP)
    scale.add_argument("--quick", action="store_true", help="packing: a few thousand documents, and no result")
    scale.add_argument("--json", action="store_true", help="print one JSON object")


def _add_positions(positions: argparse.ArgumentParser) -> None:
    positions.add_argument("--part", choices=("identity", "training"), help="one part (default: both)")
    positions.add_argument("--seeds", type=int, default=3, help="training runs of each kind (default: 3)")
    positions.add_argument("--plot", metavar="FILE", help="the curves as a picture, .svg or .png (needs matplotlib)")
    positions.add_argument("--material", metavar="DIR", help=MATERIAL_HELP)
    positions.add_argument("--quick", action="store_true", help="two steps, one seed: seconds, and no result")
    positions.add_argument("--json", action="store_true", help="print one JSON object")


def _pack_epilog() -> str:
    works = "\n".join(f"  {name:<12} {(work.__doc__ or '').split(chr(10))[0]}" for name, work in WORKS.items())
    return f"works:\n{works}\n\ninstalling the peers, each in a folder of its own:\n{installing_lines()}"


def _add_pack(pack: argparse.ArgumentParser) -> None:
    pack.add_argument("--work", action="append", choices=WORKS, help="one work; may be repeated (default: all)")
    pack.add_argument("--peers", metavar="DIR", help="where other projects' packers were installed (see below)")
    pack.add_argument("--material", metavar="DIR", help=MATERIAL_HELP)
    pack.add_argument("--quick", action="store_true", help="a few thousand documents: seconds, and no result")
    pack.add_argument("--limit", type=float, default=300.0, help="seconds for one measurement (default: 300)")
    pack.add_argument("--json", action="store_true", help="print one JSON object")


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
