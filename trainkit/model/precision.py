"""Which number type does what: storage, arithmetic, gradients, optimizer.

Every weight that trains is stored in fp32 (the master weights), whatever the arithmetic runs in: a 16-bit weight
cannot take a small update. Frozen weights need no such care and are stored in the type of the arithmetic.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainkit.recipe.precision import PrecisionName, chosen_precision

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from trainkit.recipe.schema import Precision

_DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class PrecisionPlan:
    """The type of every number of a run, and why."""

    name: PrecisionName
    frozen_storage: torch.dtype
    trained_storage: torch.dtype
    compute: torch.dtype
    gradient: torch.dtype
    optimizer: torch.dtype
    reason: str

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow, so that the loss is scaled up before the backward pass."""
        return self.compute == torch.float16

    def sentence(self) -> str:
        """One line for the run's opening: every type and the reason."""
        scaling = ", loss scaled dynamically" if self.scales_loss else ""
        return (
            f"{self.name} ({self.reason}): compute {_NAMES[self.compute]}; trained weights "
            f"{_NAMES[self.trained_storage]}, frozen weights {_NAMES[self.frozen_storage]}; gradients "
            f"{_NAMES[self.gradient]}; optimizer {_NAMES[self.optimizer]}{scaling}"
        )


def plan_precision(requested: Precision, device: torch.device) -> PrecisionPlan:
    """The types for ``precision: requested`` on this device.

    Raises :class:`MachineError` where the device cannot compute in the requested type.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        gpu = f"{torch.cuda.get_device_name(device)}, capability {capability[0]}.{capability[1]}"
        return types_of(*chosen_precision(requested, device.type, capability, gpu))
    name, reason = chosen_precision(requested, device.type)
    if device.type == "cpu" and name != "fp32" and not _cpu_multiplies(name):
        reason += f"; this CPU has no {name} instructions, so that it is slower than fp32 here"
    return types_of(name, reason)


def types_of(name: PrecisionName, reason: str) -> PrecisionPlan:
    """The plan that comes with a precision, on whatever device."""
    compute = _DTYPES[name]
    return PrecisionPlan(
        name=name,
        frozen_storage=compute,
        trained_storage=torch.float32,
        compute=compute,
        gradient=torch.float32,
        optimizer=torch.float32,
        reason=reason,
    )


def autocast(plan: PrecisionPlan, device: torch.device) -> AbstractContextManager[object]:
    """The context of the forward pass: torch's autocast, or nothing in fp32."""
    if plan.compute == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=plan.compute)


def make_scaler(plan: PrecisionPlan, device: torch.device) -> torch.amp.GradScaler | None:
    """The dynamic loss scaler that fp16 needs, on the CPU too; None for the other types."""
    return torch.amp.GradScaler(device.type) if plan.scales_loss else None


def _cpu_multiplies(name: PrecisionName) -> bool:
    """Whether this processor has matrix or dot-product instructions for a 16-bit type.

    torch names the tests with an underscore; where a release has none, the answer is no, which only adds a warning.
    """
    tests = {"bf16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"), "fp16": ("_is_amx_fp16_supported",)}
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests.get(name, ()))
