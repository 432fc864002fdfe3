"""What is trained in a measurement, as a recipe, and trainkit's own side of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

from trainkit.errors import UsageError
from trainkit.recipe.reader import read_recipe

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from trainkit.data.packed_store import PackedRows, Row
    from trainkit.recipe.schema import Recipe
    from trainkit.training.assembly import Base
    from trainkit.training.loop import Trainer
    from trainkit.training.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train. ``packed`` rows hold isolated documents; otherwise each document has a row of its own.

    ``weight_decay`` and ``max_grad_norm`` are such that both are at work.
    """

    model: str
    data: str
    chat_template: str | None
    lora: bool
    packed: bool
    precision: Literal["fp32", "bf16"] = "fp32"
    sequence_length: int = 512
    rows_per_step: int = 8
    micro_batch_size: int = 8
    steps: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 0.5
    lr_scheduler: Literal["linear", "cosine"] = "cosine"
    seed: int = 42

    @property
    def method(self) -> str:
        """What trains: adapters or everything."""
        return "LoRA" if self.lora else "full"

    def recipe(self, folder: Path) -> Path:
        """Write the setting as a recipe into ``folder``, where its run will lie as well."""
        sections: dict[str, Any] = {
            "model": {"name": self.model},
            "precision": self.precision,
            "data": {"train": self.data, "chat_template": self.chat_template},
            "packing": {
                "strategy": "best-fit" if self.packed else "none",
                "sequence_length": self.sequence_length,
                "overlap": 16,
            },
            "training": {
                "steps": self.steps,
                "tokens_per_step": self.rows_per_step * self.sequence_length,
                "micro_batch_size": self.micro_batch_size,
                "learning_rate": self.learning_rate,
                "lr_scheduler": self.lr_scheduler,
                "warmup_steps": 0,  # the first warm-up step is 0 in transformers and not in trainkit
                "weight_decay": self.weight_decay,
                "max_grad_norm": self.max_grad_norm,
                "seed": self.seed,
            },
            "checkpoints": {"every_steps": None},
            "output_dir": str(folder / "run"),
        }
        if self.lora:
            sections["adapter"] = {"type": "lora", "r": 8, "alpha": 16}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path


@dataclass(frozen=True)
class Material:
    """A recipe with its model (not loaded) and its rows, as ``trainkit fine-tune`` finds them."""

    recipe: Recipe
    base: Base
    rows: PackedRows


def read_material(recipe_file: Path) -> Material:
    """What the recipe trains, and on which rows. Raises what ``trainkit fine-tune`` raises."""
    from trainkit.data.encoding import Encoder
    from trainkit.data.preparation import default_cache, prepare
    from trainkit.training.assembly import read_base

    recipe = read_recipe(str(recipe_file)).recipe
    base = read_base(recipe)
    data = prepare(recipe, Encoder(base.tokenizer, recipe.data, recipe.packing), default_cache(), lambda *_: None)
    return Material(recipe, base, data.train)


def make_trainer(material: Material) -> Trainer:
    """Trainkit's own trainer, made of the parts that ``trainkit fine-tune`` makes it of."""
    from accelerate import Accelerator

    from trainkit.model.precision import plan_precision
    from trainkit.training.assembly import assemble

    recipe, accelerator = material.recipe, Accelerator(mixed_precision="no")
    micro_batch_size = recipe.training.micro_batch_size
    assert isinstance(micro_batch_size, int)
    precision = plan_precision(recipe.precision, accelerator.device)
    trainer, _ = assemble(recipe, material.base, material.rows, precision, micro_batch_size, accelerator)
    return trainer


def plan_of(material: Material) -> Plan:
    """The steps of the recipe in one process."""
    from trainkit.training.plan import make_plan

    training, size = material.recipe.training, material.recipe.training.micro_batch_size
    assert isinstance(size, int)
    length = material.recipe.packing.sequence_length
    return make_plan(training, rows=len(material.rows), sequence_length=length, micro_batch_size=size)


def rows_in_order(material: Material) -> list[Row]:
    """The rows of all steps, one after the other.

    Raises UsageError where a step is shorter than the others: other trainers know no such step.
    """
    from trainkit.training.loop import rows_of_step

    plan, rows = plan_of(material), []
    for step in range(plan.steps):
        indices = rows_of_step(plan, material.recipe.training.seed, step)
        if len(indices) < plan.rows_per_step:
            raise UsageError(
                f"--steps: {plan.steps} steps of {plan.rows_per_step} rows do not come out even in {plan.rows} rows; "
                f"take at most {plan.rows // plan.rows_per_step} steps, or more data"
            )
        rows += [material.rows.row(index) for index in indices]
    return rows


def add_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """The options that say what is trained."""
    parser.add_argument("--model", default="tiny", help="`tiny`, a folder or a hub id (default: tiny)")
    parser.add_argument("--data", default="quickstart", help="a data file (default: the quickstart's)")
    parser.add_argument("--chat-template", help="a .jinja file, chatml or plain (default: the model's own)")
    parser.add_argument("--length", type=int, default=512, help="packing.sequence_length (default: 512)")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer updates (default: {steps})")
