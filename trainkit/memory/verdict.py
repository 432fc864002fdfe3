"""Does it fit? From what a step takes, as estimated, to what a device offers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainkit.memory.scenario import AMPERE, Device
from trainkit.memory.sizes import MIB

if TYPE_CHECKING:
    from trainkit.memory.estimate import Estimate

Verdict = Literal["fits", "tight", "does not fit"]

SHARE_TO_FILL = 0.97
"""Of the capacity. Chosen so that of twelve published runs at the edge of a T4's memory none is called fitting that ran
out: their reserved memory differs by up to 3 % from one run to the next."""

T4_CONTEXT_BYTES = round(140.9 * MIB)  # process memory less reserved memory in published measurements on a T4
LARGE_CONTEXT_BYTES = 512 * MIB  # assumed for GPUs from Ampere on, whose contexts hold more kernels


@dataclass(frozen=True)
class Capacity:
    """Memory that a process may take on one device, and what to call it."""

    name: str
    size_bytes: int

    @property
    def to_fill_bytes(self) -> int:
        """What reserved memory and context may take together for a verdict of "fits"."""
        return int(SHARE_TO_FILL * self.size_bytes)


def context_bytes(device: Device) -> int:
    """What the CUDA context and the libraries' kernels take beside PyTorch's own memory; nothing on a CPU."""
    if device.kind == "cpu":
        return 0
    return LARGE_CONTEXT_BYTES if device.capability >= AMPERE else T4_CONTEXT_BYTES


def process_bytes(found: Estimate, device: Device) -> int:
    """What the device shows as taken by the process (nvidia-smi's figure): reserved memory and context.

    On a CPU memory goes back to the system, so it is what is allocated.
    """
    if device.kind == "cpu":
        return found.peak_allocated_bytes
    return found.peak_reserved_bytes + context_bytes(device)


def verdict(found: Estimate, device: Device, capacity: Capacity) -> Verdict:
    """Reserved memory and context within the margin: fits. Only what is allocated, with the context: tight."""
    if process_bytes(found, device) <= capacity.to_fill_bytes:
        return "fits"
    if found.peak_allocated_bytes + context_bytes(device) <= capacity.size_bytes:
        return "tight"
    return "does not fit"
