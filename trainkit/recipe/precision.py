"""What ``precision`` of a recipe comes to on a device. Torch-free: a run and the estimate of its memory ask here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trainkit.errors import MachineError

if TYPE_CHECKING:
    from trainkit.recipe.schema import Precision

PrecisionName = Literal["fp32", "fp16", "bf16"]

# From these CUDA capabilities on, the GPU multiplies the type itself; below, it is emulated or missing.
_CUDA_CAPABILITY_BF16 = (8, 0)
_CUDA_CAPABILITY_FP16 = (5, 3)


def chosen_precision(
    requested: Precision, device_type: str, capability: tuple[int, int] = (0, 0), gpu_name: str = "this GPU"
) -> tuple[PrecisionName, str]:
    """The type of the arithmetic on a device of torch's ``device_type``, and why, as a clause.

    ``capability`` and ``gpu_name`` are those of a CUDA GPU. Raises :class:`MachineError` where the device cannot
    compute in the type that is asked for; the CPU can, if slowly.

    >>> chosen_precision("auto", "cuda", (8, 6))
    ('bf16', 'chosen: this GPU multiplies bf16, which has the range of fp32')
    >>> chosen_precision("fp16", "cpu")
    ('fp16', 'as the recipe says')
    """
    if requested == "auto":
        return _automatic(device_type, capability, gpu_name)
    if device_type == "cuda":
        if requested == "bf16" and capability < _CUDA_CAPABILITY_BF16:
            alternative = _automatic(device_type, capability, gpu_name)[0]
            raise MachineError(f"precision: {gpu_name} has no bf16 arithmetic; set precision: {alternative}")
        if requested == "fp16" and capability < _CUDA_CAPABILITY_FP16:
            raise MachineError(f"precision: {gpu_name} has no fp16 arithmetic; set precision: fp32")
    elif device_type != "cpu" and requested != "fp32":
        raise MachineError(f"precision: {requested} is not supported on {device_type}; set precision: fp32")
    return requested, "as the recipe says"


def _automatic(device_type: str, capability: tuple[int, int], gpu_name: str) -> tuple[PrecisionName, str]:
    if device_type == "cuda":
        if capability >= _CUDA_CAPABILITY_BF16:
            return "bf16", "chosen: this GPU multiplies bf16, which has the range of fp32"
        if capability >= _CUDA_CAPABILITY_FP16:
            return "fp16", f"chosen: {gpu_name} has no bf16 arithmetic"
        return "fp32", f"chosen: {gpu_name} has no 16-bit arithmetic"
    if device_type == "cpu":
        return "fp32", "chosen: 16 bit saves no time on the CPU"
    return "fp32", f"chosen: 16 bit is not tried on {device_type}"
