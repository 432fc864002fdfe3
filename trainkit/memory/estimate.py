"""The peak memory of a training step: one question, answered by the quickest engine that knows the answer."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainkit.memory import quick
from trainkit.memory.allocator import peak_reserved_bytes
from trainkit.memory.event_log import with_buckets
from trainkit.memory.replay import CUDA_BLOCK_BYTES, highest_moments, rounded_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trainkit.memory.event_log import EventLog
    from trainkit.memory.replay import Moment
    from trainkit.memory.scenario import Device, Scenario

Phase = Literal["forward", "loss", "backward", "optimizer"]

# In the order in which they are stacked and listed.
PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "logits and loss",
    "temporary buffers",
    "library workspaces",
    "sharding buffers",
    "allocator rounding",
)

BYTES_OF_GRADIENT = 4  # what trains is stored in fp32, and so are its gradients
_MOST_POINTS = 200


@dataclass(frozen=True)
class Point:
    """The memory at one moment of the step: what is going on (``embedding``, ``layer 3``, ...) and bytes by part."""

    phase: Phase
    place: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a step takes on one device; bytes, and counts of numbers.

    ``parts`` are those of :data:`PARTS`, at the peak; they add up to ``peak_allocated_bytes``. ``weights`` are the
    model's own, in whatever type they are stored (fp32 where they train: there are no second, master weights), and
    ``parameters`` counts them, adapters apart. ``peak_reserved_bytes`` is what the caching allocator holds of the
    device for it; the device's context comes on top. On the CPU nothing is reserved beyond what is allocated, and the
    process itself comes on top. ``timeline`` runs through one step, thinned, its peak kept. ``remarks`` are sentences
    that a reader should know.
    """

    parameters: int
    trainable_parameters: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_phase: Phase
    peak_place: str
    parts: Mapping[str, int]
    timeline: tuple[Point, ...]
    engine: Literal["quick", "trace"]
    seconds: float
    remarks: tuple[str, ...] = ()


def estimate(scenario: Scenario, *, exact: bool = False) -> Estimate:
    """The memory of a step in steady state, from the second step on.

    ``exact`` traces the step even where the quick engine has the answer. Raises ModelError for a model that cannot be
    built or traced, UsageError for an adapter that does not fit it, and MachineError for a missing package.
    """
    covered = not exact and quick.covers(scenario)
    with _collector_at_rest() if covered else nullcontext():
        return _estimate(scenario, covered=covered)


def _estimate(scenario: Scenario, *, covered: bool) -> Estimate:
    started = time.perf_counter()
    remarks: tuple[str, ...] = ()
    engine: Literal["quick", "trace"]
    if covered:
        engine, log = "quick", quick.quick_log(scenario)
        parameters, trainable = quick.quick_counts(scenario)
    else:
        from trainkit.memory.trace import trace  # torch

        traced = trace(scenario)
        engine, log = "trace", traced.log
        parameters, trainable, remarks = traced.parameters, traced.trainable_parameters, traced.remarks
    if scenario.shard != "none" and scenario.gpus > 1:
        remarks = (*remarks, "sharding: the communication library's own buffers are not counted")
    if scenario.shard == "ddp" and scenario.gpus > 1:
        log = with_buckets(log, trainable * BYTES_OF_GRADIENT, "sharding buffers")
    peak, reserved, timeline = measure(log, scenario.device)
    return Estimate(
        parameters=parameters,
        trainable_parameters=trainable,
        peak_allocated_bytes=peak.total_bytes,
        peak_reserved_bytes=reserved,
        peak_phase=peak.phase,
        peak_place=peak.place,
        parts=peak.parts,
        timeline=timeline,
        engine=engine,
        seconds=time.perf_counter() - started,
        remarks=remarks,
    )


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """For a hundred thousand small objects without cycles, through which it would go again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_quick(scenario: Scenario) -> bool:
    """Whether the estimate takes milliseconds, not seconds."""
    return quick.covers(scenario)


def quick_peak_bytes(scenario: Scenario) -> int | None:
    """``peak_allocated_bytes`` alone, in a few milliseconds, for a search; None where only a trace knows it."""
    if not quick.covers(scenario):
        return None
    buckets = 0
    if scenario.shard == "ddp" and scenario.gpus > 1:
        buckets = rounded_up(quick.quick_counts(scenario)[1] * BYTES_OF_GRADIENT, CUDA_BLOCK_BYTES)
    return quick.quick_peak_bytes(scenario) + buckets + sum(size for _, size in workspaces(scenario.device))


def measure(log: EventLog, device: Device) -> tuple[Point, int, tuple[Point, ...]]:
    """The highest point of a step, the bytes reserved for it, and the points that lead through it."""
    on_cuda = device.kind == "cuda"
    moments = list(highest_moments(log, CUDA_BLOCK_BYTES if on_cuda else 1))
    # In steady state the workspaces are there from the start.
    workspace_bytes = sum(size for _, size in workspaces(device))
    points = [_point(moment, workspace_bytes) for moment in moments if moment.phase != "start"]
    peak = max(points, key=lambda point: point.total_bytes)
    reserved = peak_reserved_bytes(log, workspaces(device)) if on_cuda else peak.total_bytes
    return peak, reserved, _thinned(points, peak)


def workspaces(device: Device) -> tuple[tuple[Phase, int], ...]:
    """Buffers of cuBLAS: the phase in which each is first needed, and its bytes.

    One for each thread that multiplies matrices, autograd's being the second. Sizes are the defaults of
    aten/src/ATen/cuda/CublasHandlePool.cpp: 8 MiB and 128 KiB, or 32 MiB from Hopper on.
    """
    if device.kind == "cpu":
        return ()
    size = 32 * 2**20 if device.capability >= (9, 0) else 8 * 2**20 + 128 * 2**10
    return (("forward", rounded_up(size, CUDA_BLOCK_BYTES)), ("loss", rounded_up(size, CUDA_BLOCK_BYTES)))


def _point(moment: Moment, workspace_bytes: int) -> Point:
    found = {**moment.bytes_by_part, "library workspaces": workspace_bytes}
    return Point(moment.phase, moment.place, {part: found.get(part, 0) for part in PARTS})  # type: ignore[arg-type]


def _thinned(points: Sequence[Point], peak: Point) -> tuple[Point, ...]:
    """At most some hundred points at equal distances, and the peak."""
    distance = -(-len(points) // _MOST_POINTS)
    return tuple(point for index, point in enumerate(points) if index % distance == 0 or point is peak)
