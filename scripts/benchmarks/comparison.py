"""``scripts/compare_trl``: the same rows in the same order through trainkit's command line and through SFTTrainer."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.setting import Setting, add_options, read_material, rows_in_order
from benchmarks.trl_trainer import MISSING, losses, make_sft_trainer, quiet_libraries, trl_is_installed
from trainkit.cli import run
from trainkit.errors import TrainkitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

BOUND = 1e-5
"""Largest relative difference of a step's loss. Both sides compute in fp32 and add up in another order."""


@dataclass(frozen=True)
class Curves:
    """The training loss of each step, by trainkit and by TRL."""

    name: str
    ours: list[float]
    theirs: list[float]

    def differences(self) -> list[float]:
        """Relative, step by step."""
        return [abs(one - other) / abs(one) for one, other in zip(self.ours, self.theirs, strict=True)]

    def table(self) -> str:
        """Both curves side by side."""
        lines = [self.name, f"{'step':>5}  {'trainkit':>12}  {'TRL':>12}  {'difference':>10}"]
        numbers = zip(itertools.count(1), self.ours, self.theirs, self.differences(), strict=False)
        lines += [f"{step:5}  {one:12.7f}  {other:12.7f}  {apart:10.1e}" for step, one, other, apart in numbers]
        return "\n".join(lines)


def train_with_trainkit(recipe: Path, run_folder: Path) -> list[float]:
    """The curve of ``trainkit fine-tune``. Raises UsageError with what the command said when it fails."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = run(["fine-tune", str(recipe), "--json"])
    if code:
        raise UsageError(errors.getvalue().strip())
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def compare(setting: Setting) -> Curves:
    """Train twice from the same weights. Raises TrainkitError when one of them cannot."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = setting.recipe(folder)
        material = read_material(recipe)
        rows = rows_in_order(material)
        ours = train_with_trainkit(recipe, folder / "run")
        trainer = make_sft_trainer(
            material,
            rows,
            folder / "trl",
            batch_rows=setting.micro_batch_size,
            accumulation=setting.rows_per_step // setting.micro_batch_size,
            padding_free=setting.packed,
        )
        trainer.train()
        kind = "packed rows, documents isolated" if setting.packed else "a row for each document, padded"
        schedule = f"{setting.lr_scheduler} schedule, {setting.rows_per_step // setting.micro_batch_size} micro-batches"
        return Curves(f"{setting.method}, {kind}, {schedule}", ours, losses(trainer))


def settings(options: argparse.Namespace) -> list[Setting]:
    """Padded and packed, LoRA and full, two schedules; every step has two micro-batches of unequal token counts."""
    return [
        Setting(
            model=options.model,
            data=options.data,
            chat_template=options.chat_template,
            lora=lora,
            packed=packed,
            lr_scheduler="cosine" if lora == packed else "linear",
            sequence_length=options.length,
            micro_batch_size=4,
            steps=options.steps,
        )
        for packed, lora in itertools.product((False, True), (True, False))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print; 0 where all curves agree within the bound, 1 where one does not."""
    parser = argparse.ArgumentParser(
        prog="compare_trl",
        description="Train the same rows in the same order with trainkit and with TRL's SFTTrainer, in fp32 on the "
        f"CPU; exit 1 when a step's loss differs by more than {BOUND:g} (relative).",
    )
    add_options(parser, steps=10)
    options = parser.parse_args(arguments)
    if not trl_is_installed():
        print(MISSING, file=sys.stderr)
        return 2
    quiet_libraries()
    largest = 0.0
    try:
        for setting in settings(options):
            curves = compare(setting)
            print(f"{curves.table()}\n", flush=True)
            largest = max(largest, *curves.differences())
    except TrainkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"largest relative difference {largest:.1e}, bound {BOUND:g}: {'agree' if largest <= BOUND else 'DIFFER'}")
    return 0 if largest <= BOUND else 1
