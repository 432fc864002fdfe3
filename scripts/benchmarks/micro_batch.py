"""``scripts/bench micro-batch``: what the number of rows in a forward pass does to the speed."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from benchmarks.setting import Setting, make_trainer, read_material
from benchmarks.trl_trainer import quiet_libraries

if TYPE_CHECKING:
    import argparse

SIZES = (1, 2, 4, 8, 16)
METHODS = (True, False)


def measure_micro_batches(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of 16 packed rows, each size in its turn, ``--steps`` rounds. Raises what trainkit refuses to train."""
    quiet_libraries()
    found = []
    for lora in METHODS:
        setting = Setting(
            model=options.model,
            data=options.data,
            chat_template=options.chat_template,
            lora=lora,
            packed=True,
            sequence_length=options.length,
            rows_per_step=max(SIZES),
            steps=(options.steps + 1) * len(SIZES),
        )
        found += _measure(setting, options.steps)
    return {"length": options.length, "sizes": found}


def table(found: dict[str, Any]) -> str:
    """What :func:`measure_micro_batches` found, for people."""
    lines = [f"{'':<6}{'rows':>5}{'slots':>8}{'tokens/s':>10}   against 1 row (quartiles)"]
    for one in found["sizes"]:
        low, high = one["ratio_quartiles"]
        slots = one["rows"] * found["length"]
        speed = f"{one['tokens_per_second']:10,.0f}   {one['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{one['method']:<6}{one['rows']:5}{slots:8,}{speed}")
    return "\n".join(lines)


def _measure(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    from trainkit.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(read_material(setting.recipe(Path(folder))))
    speeds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds + 1):
        for size in SIZES:
            trainer.plan = replace(trainer.plan, micro_batch_size=size)
            started = time.perf_counter()
            tokens = next(train(trainer, lambda: False)).result.tokens
            speeds[size].append(tokens / (time.perf_counter() - started))
    found = []
    for size in SIZES:
        ratios = [speed / alone for speed, alone in zip(speeds[size][1:], speeds[1][1:], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        found.append(
            {
                "method": setting.method,
                "rows": size,
                "tokens_per_second": median(speeds[size][1:]),
                "ratio": middle,
                "ratio_quartiles": (low, high),
            }
        )
    return found
