"""``scripts/bench step``: a step of trainkit and a step of SFTTrainer, A B A B, in one process.

SFTTrainer's own loop drives: whenever it has finished a step, trainkit does one. What either does between its steps
(collating, logging) is part of its time.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.setting import Setting, make_trainer, read_material, rows_in_order
from benchmarks.trl_trainer import MISSING, make_sft_trainer, quiet_libraries, trl_is_installed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from benchmarks.setting import Material
    from trainkit.data.packed_store import Row

WARM_UP_STEPS = 2

Variant = Literal["packed", "pack/pad", "padded"]
VARIANTS: dict[Variant, str] = {
    "packed": "the same packed rows: documents isolated by both",
    "pack/pad": "the same documents: packed by trainkit, padded by TRL (its default)",
    "padded": "the same rows of one document: padded by both",
}


@dataclass(frozen=True)
class StepTime:
    """One optimizer update: its real tokens and its wall-clock time."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Measured:
    """Medians over the steps. ``ratio`` is trainkit's tokens/s over TRL's of the step beside it, with quartiles."""

    method: str
    variant: Variant
    trainkit: float
    trl: float | None
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Every variant, LoRA and full. Raises TrainkitError for what trainkit refuses to train."""
    with_trl = trl_is_installed()
    quiet_libraries()
    found = []
    for lora, variant in product((True, False), VARIANTS):
        setting = Setting(
            model=options.model,
            data=options.data,
            chat_template=options.chat_template,
            lora=lora,
            packed=variant != "padded",
            precision=options.dtype,
            sequence_length=options.length,
            rows_per_step=options.rows,
            micro_batch_size=options.micro_batch,
            steps=options.steps + WARM_UP_STEPS,
        )
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = _in_turns(setting, variant, Path(folder), with_trl=with_trl)
        found.append(_summary(setting.method, variant, ours[WARM_UP_STEPS:], theirs[WARM_UP_STEPS:]))
    return {"trl": with_trl, "variants": VARIANTS, "steps": [asdict(one) for one in found]}


def table(found: dict[str, Any]) -> str:
    """What :func:`measure_steps` found, for people."""
    lines = [f"{'':<6}{'rows':<10}{'trainkit':>10}{'TRL':>10}   ratio (quartiles)"]
    for one in found["steps"]:
        line = f"{one['method']:<6}{one['variant']:<10}{one['trainkit']:10,.0f}"
        if one["trl"] is not None:
            low, high = one["ratio_quartiles"]
            line += f"{one['trl']:10,.0f}   {one['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(line)
    lines += ["", "real tokens/s, median of the steps"]
    lines += [f"{name:<10}{meaning}" for name, meaning in found["variants"].items()]
    return "\n".join(lines if found["trl"] else [*lines, MISSING])


def _in_turns(
    setting: Setting, variant: Variant, folder: Path, *, with_trl: bool
) -> tuple[list[StepTime], list[StepTime]]:
    """Times of the steps of trainkit and of TRL; none of TRL's where it is not installed."""
    from trainkit.training.loop import train

    material = read_material(setting.recipe(folder))
    rows = rows_in_order(material)
    steps = train(make_trainer(material), lambda: False)
    ours: list[StepTime] = []

    def our_step() -> None:
        started = time.perf_counter()
        tokens = next(steps).result.tokens
        ours.append(StepTime(tokens, time.perf_counter() - started))

    if with_trl:
        return ours, _their_steps(setting, material, variant, rows, folder, our_step)
    for _ in range(setting.steps):
        our_step()
    return ours, []


def _their_steps(
    setting: Setting,
    material: Material,
    variant: Variant,
    rows: Sequence[Row],
    folder: Path,
    our_step: Callable[[], None],
) -> list[StepTime]:
    """Run TRL's training loop, with a step of ours after each of its own; the times of its own."""
    from transformers import TrainerCallback

    accumulation = setting.rows_per_step // setting.micro_batch_size
    batch_rows = setting.micro_batch_size
    if variant == "pack/pad":
        rows = _documents(rows)
        batch_rows = len(rows) // (setting.steps * accumulation)  # so that its steps are as large as ours
    rows_per_step = batch_rows * accumulation
    tokens = [
        sum(row.ids_T.size for row in rows[start : start + rows_per_step])
        for start in range(0, setting.steps * rows_per_step, rows_per_step)
    ]
    times: list[StepTime] = []

    class Turns(TrainerCallback):  # type: ignore[misc]
        """Takes the time from the end of our step to the end of theirs."""

        started = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(StepTime(tokens[len(times)], time.perf_counter() - self.started))
            our_step()
            self.started = time.perf_counter()

    trainer = make_sft_trainer(
        material,
        rows[: setting.steps * rows_per_step],
        folder / "trl",
        batch_rows=batch_rows,
        accumulation=accumulation,
        padding_free=variant == "packed",
    )
    trainer.add_callback(Turns())
    trainer.train()
    return times


def _documents(rows: Sequence[Row]) -> list[Row]:
    """The documents of packed rows, each as a row of its own."""
    import numpy as np

    from trainkit.data.packed_store import Row

    documents = []
    for row in rows:
        ends = np.cumsum(row.segment_lengths)[:-1]
        for ids, trained in zip(np.split(row.ids_T, ends), np.split(row.trained_T, ends), strict=True):
            documents.append(Row(ids, trained, np.array([ids.size], np.int32)))
    return documents


def _summary(method: str, variant: Variant, ours: Sequence[StepTime], theirs: Sequence[StepTime]) -> Measured:
    trainkit = median(step.tokens_per_second for step in ours)
    if not theirs:
        return Measured(method, variant, trainkit, None, None, None)
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return Measured(method, variant, trainkit, median(step.tokens_per_second for step in theirs), middle, (low, high))
