"""The micro-batch that fits, and the peak that is predicted with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainkit.errors import MachineError
from trainkit.memory.formula import ModelShape, StepShape, largest_micro_batch, memory_parts
from trainkit.memory.machine import available_memory_bytes, process_memory_bytes
from trainkit.memory.shapes import read_model_shape, tensor_shapes, trainable_parameters

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from trainkit.model.precision import PrecisionPlan
    from trainkit.recipe.schema import Recipe

SHARE_TO_FILL = 0.9  # of the free memory, since the formula leaves out what is small
CPU_MICRO_BATCH_TOKENS = 2048  # larger micro-batches are no faster on a CPU: docs/benchmarks.md
NF4_BYTES_PER_PARAMETER = 0.516  # 4 bit, and 0.127 bit of scales with double quantisation (arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class Fit:
    """Rows per device and forward pass, and the predicted peak: of the device, or of the process on a CPU."""

    micro_batch_size: int
    predicted_bytes: int


def fit(recipe: Recipe, folder: Path, config: Any, precision: PrecisionPlan, device: torch.device) -> Fit:
    """Take the recipe's micro-batch or choose one, and predict the peak.

    Raises MachineError when weights, gradients and optimizer alone exceed what is free, or, for ``auto``, when the
    estimate fits not even one row.
    """
    shapes = tensor_shapes(folder)
    model, step = read_model_shape(config, shapes), _one_row(recipe, precision, shapes)
    available = available_memory_bytes(device)
    _refuse_what_cannot_fit(model, step, available, device)
    size = recipe.training.micro_batch_size
    if size == "auto":
        size = largest_micro_batch(
            model,
            step,
            available_bytes=int(SHARE_TO_FILL * available),
            rows_per_step=recipe.training.tokens_per_step // step.sequence_length,
            most_tokens=CPU_MICRO_BATCH_TOKENS if device.type == "cpu" else None,
        )
        if size == 0:
            needed = sum(memory_parts(model, step).values())
            raise MachineError(
                f"training.micro_batch_size: auto: one row of {step.sequence_length} tokens needs about "
                f"{_gib(needed)}, {device} has {_gib(available)} free; set model.activation_checkpointing: true, or a "
                "smaller packing.sequence_length"
            )
    predicted = sum(memory_parts(model, replace(step, micro_batch_size=size)).values())
    return Fit(size, predicted + (process_memory_bytes() if device.type == "cpu" else 0))


def _one_row(recipe: Recipe, precision: PrecisionPlan, shapes: dict[str, tuple[int, ...]]) -> StepShape:
    four_bit = recipe.adapter is not None and recipe.adapter.type == "qlora"
    return StepShape(
        micro_batch_size=1,
        sequence_length=recipe.packing.sequence_length,
        trainable_parameters=trainable_parameters(shapes, recipe.adapter),
        frozen_bytes_per_parameter=NF4_BYTES_PER_PARAMETER if four_bit else precision.frozen_storage.itemsize,
        compute_bytes=precision.compute.itemsize,
        optimizer=recipe.training.optimizer,
        activation_checkpointing=recipe.model.activation_checkpointing,
    )


def _refuse_what_cannot_fit(model: ModelShape, step: StepShape, available: int, device: torch.device) -> None:
    parts = memory_parts(model, step)
    certain = sum(size for name, size in parts.items() if name not in {"activations", "logits"})
    if certain > available:
        raise MachineError(
            f"model.name: weights, gradients and optimizer state need {_gib(certain)}, {device} has {_gib(available)} "
            "free; train an adapter (adapter: {type: lora}), or take a smaller model"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
