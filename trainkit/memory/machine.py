"""What this machine has, and what a run took of it, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

from trainkit.memory.sizes import gib

CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes(device: torch.device) -> int:
    """Memory that a run may still take on ``device``: free on the GPU; on the CPU, within the container's limit."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or its limit is "max"
        return available
    return min(available, max(0, limit - used))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room: torch has a class for that on a GPU, on the CPU a sentence of its allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def held_in_words(device: torch.device) -> str:
    """What the process holds: on a GPU at its peak, by PyTorch's own count; on a CPU now, as the system counts it."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"{gib(allocated)} allocated and {gib(reserved)} reserved at the peak"
    return f"{gib(process_memory_bytes())} resident"


def process_memory_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def forget_peak(device: torch.device) -> None:
    """Measure the peak anew from here on; on a CPU the system knows only that since the process started."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that the run held: allocated on the GPU, resident on the CPU (since the process started)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
