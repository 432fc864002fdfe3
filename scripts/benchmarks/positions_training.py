"""Training with documents padded, packed, isolated and reset: the recipe's own switches, and one way to evaluate.

A run's own evaluation treats rows as the run does, so its losses do not compare. Here every run is measured on the same
held-out documents, each alone in its row.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.packing_data import ALPACA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainkit.data.packed_store import PackedRows
    from trainkit.recipe.schema import Recipe
    from trainkit.training.assembly import Base
    from trainkit.training.loop import Trainer

ARMS: dict[str, dict[str, Any]] = {
    "padded": {"strategy": "none"},
    "packed, separator only": {"isolate_documents": False, "reset_positions": False},
    "packed, isolated": {"isolate_documents": True, "reset_positions": False},
    "packed, isolated, reset": {"isolate_documents": True, "reset_positions": True},
}
REFERENCE = "packed, isolated, reset"
EVALUATIONS = 8
MICRO_BATCH = 8
ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what it is trained on, in full, in fp32."""

    name: str
    model: str
    data: Any
    evaluation: Any
    chat_template: str | None
    sequence_length: int
    rows_per_step: int
    steps: int
    learning_rate: float


def cases(material: Path | None, folder: Path, steps: int | None, examples: int) -> list[Case]:
    """The shipped model on the shipped data; stories260K on a part of Alpaca where the material is there."""
    import json

    found = [
        Case(
            name="shipped model, quickstart data",
            model="tiny",
            data="quickstart",
            evaluation={"path": "quickstart", "split": "eval"},
            chat_template=None,
            sequence_length=256,
            rows_per_step=8,
            steps=steps or 40,
            learning_rate=1e-3,
        )
    ]
    if material is not None and (material / "models/stories260K").is_dir():
        part = folder / "alpaca.json"
        part.write_text(json.dumps(json.loads((material / ALPACA).read_text())[:examples]))
        stories = Case(
            name=f"stories260K, {examples:,} examples of Alpaca",
            model=str(material / "models/stories260K"),
            data=str(part),
            evaluation=0.02,
            chat_template="plain",
            sequence_length=512,
            rows_per_step=8,
            steps=steps or 64,
            learning_rate=2e-3,
        )
        found.insert(0, stories)
    return found


def train_case(case: Case, seeds: int) -> dict[str, Any]:
    """Every arm with every seed, its curve; and how fast the steps of the arms are, in turns."""
    runs: list[dict[str, Any]] = []
    documents_a_row = 0.0
    speeds: dict[str, list[float]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            recipe, _, packed, _ = prepared(case, ARMS[REFERENCE], case.rows_per_step, seed, folder)
            held_out = prepared(case, ARMS["padded"], case.rows_per_step, seed, folder)[3]
            wanted = _trained_tokens(recipe, packed)
            documents_a_row = packed.ledger.pieces / len(packed)
            rows_of_arm = dict.fromkeys(ARMS, case.rows_per_step)
            rows_of_arm["padded"] = _padded_rows(
                case, seed, folder, round(case.rows_per_step * documents_a_row), wanted
            )
            trainers = {}
            for arm, packing in ARMS.items():
                print(f"  seed {seed}: {arm}", file=sys.stderr, flush=True)
                recipe, base, rows, _ = prepared(case, packing, rows_of_arm[arm], seed, folder)
                trainers[arm] = _trainer(recipe, base, rows)
                runs.append({"arm": arm, "seed": seed} | _train(trainers[arm], held_out, case.steps))
            speeds = speeds or _speeds(trainers)
    return {
        "case": case.name,
        "steps": case.steps,
        "sequence_length": case.sequence_length,
        "documents_a_row": documents_a_row,
        "runs": runs,
        "summary": [_summary(arm, runs, speeds) for arm in ARMS],
    }


def _padded_rows(case: Case, seed: int, folder: Path, about: int, wanted: int) -> int:
    """How many padded rows in a step train ``wanted`` tokens in all steps, as nearly as whole rows can.

    A padded row holds one document; how long the documents of the first steps are is chance.
    """
    recipe, _, rows, _ = prepared(case, ARMS["padded"], about, seed, folder)
    apart = {}
    for rows_per_step in range(max(1, about - about // 4), about + about // 4 + 1):
        training = replace(recipe.training, tokens_per_step=rows_per_step * case.sequence_length)
        apart[rows_per_step] = abs(_trained_tokens(replace(recipe, training=training), rows) - wanted)
    return min(apart, key=apart.__getitem__)


def _trained_tokens(recipe: Recipe, rows: PackedRows) -> int:
    """What the steps of the recipe train."""
    from trainkit.training.loop import rows_of_step
    from trainkit.training.plan import make_plan

    length, seed = recipe.packing.sequence_length, recipe.training.seed
    plan = make_plan(recipe.training, rows=len(rows), sequence_length=length, micro_batch_size=MICRO_BATCH)
    return sum(rows.trained_tokens(row) for step in range(plan.steps) for row in rows_of_step(plan, seed, step))


def prepared(
    case: Case, packing: dict[str, Any], rows_per_step: int, seed: int, folder: Path
) -> tuple[Recipe, Base, PackedRows, PackedRows]:
    """Recipe, base model (not loaded), training rows and held-out rows."""
    from trainkit.data.encoding import Encoder
    from trainkit.data.preparation import default_cache, prepare
    from trainkit.recipe.reader import read_recipe
    from trainkit.training.assembly import read_base

    sections = {
        "model": {"name": case.model},
        "precision": "fp32",
        "data": {"train": case.data, "eval": case.evaluation, "chat_template": case.chat_template},
        "packing": {"sequence_length": case.sequence_length, "overlap": 16, **packing},
        "training": {
            "steps": case.steps,
            "tokens_per_step": rows_per_step * case.sequence_length,
            "micro_batch_size": MICRO_BATCH,
            "learning_rate": case.learning_rate,
            "seed": seed,
        },
        "output_dir": str(folder / "run"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections))
    recipe = read_recipe(str(file)).recipe
    base = read_base(recipe)
    data = prepare(recipe, Encoder(base.tokenizer, recipe.data, recipe.packing), default_cache(), lambda *_: None)
    assert data.evaluation is not None
    return recipe, base, data.train, data.evaluation


def _trainer(recipe: Recipe, base: Base, rows: PackedRows) -> Trainer:
    from accelerate import Accelerator

    from trainkit.model.precision import plan_precision
    from trainkit.training.assembly import assemble

    accelerator = Accelerator(mixed_precision="no")
    precision = plan_precision(recipe.precision, accelerator.device)
    trainer, _ = assemble(recipe, base, rows, precision, MICRO_BATCH, accelerator)
    return trainer


def _train(trainer: Trainer, held_out: PackedRows, steps: int) -> dict[str, Any]:
    """The loss on the held-out documents, each alone, over the trained tokens."""
    from trainkit.training.evaluation import evaluate_loss
    from trainkit.training.loop import train

    alone = replace(trainer.packing, strategy="none", isolate_documents=True, reset_positions=True)

    def evaluated() -> float:
        return evaluate_loss(replace(trainer, packing=alone), held_out, lambda: False, lambda *_: None).loss

    trained, curve = 0, [(0, evaluated())]
    for report in train(trainer, lambda: False):
        trained += report.result.trained_tokens
        if report.step % max(1, steps // EVALUATIONS) == 0 or report.step == steps:
            curve.append((trained, evaluated()))
    return {"curve": curve, "trained_tokens_per_step": trained / steps}


def _speeds(trainers: dict[str, Trainer]) -> dict[str, list[float]]:
    """Real tokens a second of more steps, an arm after the other, round by round."""
    from trainkit.training.loop import train

    speeds: dict[str, list[float]] = {arm: [] for arm in trainers}
    for trainer in trainers.values():
        trainer.plan = replace(trainer.plan, steps=trainer.counters.step + ROUNDS)
    for _ in range(ROUNDS):
        for arm, trainer in trainers.items():
            started = time.perf_counter()
            tokens = next(train(trainer, lambda: False)).result.tokens
            speeds[arm].append(tokens / (time.perf_counter() - started))
    return speeds


def _summary(arm: str, runs: Sequence[dict[str, Any]], speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Means over the seeds; ``against_reference`` is the difference to the reference run of the same seed.

    ``speed_ratio`` is the median ratio to the step of the reference in the same round.
    """
    final = {(run["arm"], run["seed"]): run["curve"][-1][1] for run in runs}
    own = [run for run in runs if run["arm"] == arm]
    apart = [final[arm, run["seed"]] - final[REFERENCE, run["seed"]] for run in own]
    return {
        "arm": arm,
        "eval_loss": mean(final[arm, run["seed"]] for run in own),
        "against_reference": mean(apart),
        "against_reference_range": (min(apart), max(apart)),
        "trained_tokens_per_step": mean(run["trained_tokens_per_step"] for run in own),
        "tokens_per_second": median(speeds[arm]),
        "speed_ratio": median(one / other for one, other in zip(speeds[arm], speeds[REFERENCE], strict=True)),
    }
