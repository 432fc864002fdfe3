"""What this machine has, and what a run took of it, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no room: on a GPU it has a class for that, on the CPU a sentence of its allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


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
