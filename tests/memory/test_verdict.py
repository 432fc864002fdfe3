from __future__ import annotations

from trainkit.memory.estimate import Estimate
from trainkit.memory.scenario import Device
from trainkit.memory.verdict import LARGE_CONTEXT_BYTES, T4_CONTEXT_BYTES, Capacity, context_bytes, verdict

GPU = Device("cuda", (8, 0))
FOUND = Estimate(10**9, 10**9, 60 * 2**30, 70 * 2**30, "backward", "layer 1", {}, (), "trace", 1.0)


def judged(capacity_bytes: int) -> str:
    return verdict(FOUND, GPU, Capacity("test", capacity_bytes))


def test_the_verdict_turns_at_reserved_memory_with_the_margin_and_at_allocated_memory() -> None:
    fitting = int((FOUND.peak_reserved_bytes + LARGE_CONTEXT_BYTES) / 0.97) + 2
    assert judged(fitting) == "fits"
    assert judged(fitting - 4) == "tight"
    tight = FOUND.peak_allocated_bytes + LARGE_CONTEXT_BYTES
    assert judged(tight) == "tight"
    assert judged(tight - 1) == "does not fit"


def test_the_context_is_the_devices() -> None:
    assert context_bytes(Device("cuda", (7, 5))) == T4_CONTEXT_BYTES
    assert context_bytes(Device("cuda", (9, 0))) == LARGE_CONTEXT_BYTES
    assert context_bytes(Device("cpu")) == 0
