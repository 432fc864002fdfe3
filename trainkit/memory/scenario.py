"""Everything that decides how much memory a training step takes, and nothing else. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from trainkit.recipe.precision import PrecisionName, chosen_precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainkit.recipe.schema import Adapter, Recipe

AttentionName = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flex", "eager"]
OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]
Shard = Literal["none", "ddp", "fsdp2"]
Loop = Literal["trainkit", "transformers"]

BYTES_OF: dict[PrecisionName, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

# From this CUDA capability on, the flash kernels run.
AMPERE = (8, 0)


@dataclass(frozen=True)
class Device:
    """What the step runs on: it need not be here. ``capability`` is a CUDA GPU's (``(8, 0)`` is an A100's)."""

    kind: Literal["cuda", "cpu"] = "cuda"
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model and the way it is trained.

    ``config`` is the content of the model's config.json. ``adapter`` None trains every weight. Trained weights are
    stored in fp32, frozen ones in ``frozen_storage`` (4 bit for qlora). ``micro_batches`` above 1 means that gradients
    of earlier micro-batches are there while a later one runs forward. Every token of a row counts as trained, and a row
    is ``documents_per_row`` documents that do not see each other.

    ``place`` is what an error calls the configuration.

    ``loop`` "transformers" is the plain loop that published measurements were made with: no autocast, the model's own
    loss, AdamW in its foreach form, no clipping.
    """

    config: Mapping[str, Any] = field(repr=False)
    sequence_length: int
    micro_batch_size: int = 1
    micro_batches: int = 1
    adapter: Adapter | None = None
    precision: PrecisionName = "bf16"
    frozen_storage: PrecisionName = "bf16"
    activation_checkpointing: bool = False
    optimizer: OptimizerName = "adamw"
    attention: AttentionName = "auto"
    documents_per_row: int = 1
    gpus: int = 1
    shard: Shard = "none"
    device: Device = Device()
    loop: Loop = "trainkit"
    place: str = field(default="config.json", compare=False)

    @property
    def tokens(self) -> int:
        """Row slots of one micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Row slots of a step on one device."""
        return self.micro_batches * self.tokens

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        """How it is trained, in one word."""
        return "full" if self.adapter is None else self.adapter.type

    def with_micro_batch_size(self, rows: int) -> Scenario:
        """The same tokens per step in micro-batches of another size; whether any accumulate changes with it."""
        return self.with_rows(rows, self.sequence_length, self.step_tokens)

    def with_rows(self, rows: int, sequence_length: int, step_tokens: int) -> Scenario:
        """Other micro-batches, in as many as a step of ``step_tokens`` on this device is made of, and at least one."""
        in_a_step = step_tokens // sequence_length
        return replace(
            self,
            micro_batch_size=rows,
            sequence_length=sequence_length,
            micro_batches=max(1, -(-in_a_step // rows)),
        )


def scenario_of(
    recipe: Recipe,
    config: Mapping[str, Any],
    *,
    device: Device | None = None,
    gpus: int = 1,
    shard: Shard = "none",
    micro_batch_size: int | None = None,
    place: str = "config.json",
) -> Scenario:
    """The scenario of a recipe on a model and a device.

    ``micro_batch_size`` takes the place of the recipe's, which may be ``auto``; then one row is the default. With
    ``shard`` "none" and several GPUs nothing changes: each would run alone. Raises MachineError for a precision
    that the device cannot compute in. ``place`` is what an error calls the configuration.
    """
    device = device or Device()
    rows = micro_batch_size or (1 if recipe.training.micro_batch_size == "auto" else recipe.training.micro_batch_size)
    processes = 1 if shard == "none" else gpus
    rows_in_a_step = max(1, recipe.training.tokens_per_step // recipe.packing.sequence_length // processes)
    rows = min(rows, rows_in_a_step)
    precision, _ = chosen_precision(recipe.precision, device.kind, device.capability)
    isolated = recipe.packing.strategy != "none" and recipe.packing.isolate_documents
    return Scenario(
        config=config,
        sequence_length=recipe.packing.sequence_length,
        micro_batch_size=rows,
        micro_batches=-(-rows_in_a_step // rows),
        adapter=recipe.adapter,
        precision=precision,
        frozen_storage=precision,
        activation_checkpointing=recipe.model.activation_checkpointing,
        optimizer=recipe.training.optimizer,
        attention=recipe.model.attention,
        documents_per_row=2 if isolated and _copies_for_documents(recipe, device) else 1,
        gpus=gpus,
        shard=shard,
        device=device,
        place=place,
    )


def _copies_for_documents(recipe: Recipe, device: Device) -> bool:
    """Whether the kernel runs document by document, which costs a copy of each layer's attention output."""
    by_document = recipe.model.attention == "sdpa"
    return by_document or (recipe.model.attention == "auto" and (device.kind == "cpu" or device.capability < AMPERE))
