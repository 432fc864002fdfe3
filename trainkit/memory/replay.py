"""Plays an event log: how much is allocated when, by part, with the allocator's rounding. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.memory.event_log import TRACED, Axis, Kind, pairs, stretches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trainkit.memory.event_log import Event, EventLog

# kMinBlockSize of c10/cuda/CUDACachingAllocator: every allocation is a multiple of it, and counted as such.
CUDA_BLOCK_BYTES = 512

ROUNDING = "allocator rounding"
SCRATCH = "temporary buffers"


@dataclass(frozen=True)
class Moment:
    """The most that was allocated at one moment of the step, and of what."""

    phase: str
    place: str
    bytes_by_part: Mapping[str, int]
    allocated_bytes: int


def highest_moments(log: EventLog, block_bytes: int = CUDA_BLOCK_BYTES) -> Iterator[Moment]:
    """For each moment of the log, in order, its highest point.

    Sizes are rounded to ``block_bytes``; 1 rounds nothing, as the CPU's allocator.
    """
    asked = [log.sizes[allocation.size] for allocation in log.allocations]
    parts: dict[str, int] = defaultdict(int)
    played = 0
    # Where the points are is looked for first, since what each is made of would be noted at every birth otherwise.
    for moment, at, highest in _highest_points(log, [rounded_up(size, block_bytes) for size in asked]):
        for kind, subject, _ in log.events[played : at + 1]:
            if kind is Kind.BIRTH:
                parts[log.allocations[subject].part] += asked[subject]
            elif kind is Kind.DEATH:
                parts[log.allocations[subject].part] -= asked[subject]
        played = at + 1
        found = dict(parts)
        last = log.events[at]
        if last.kind is Kind.SCRATCH:
            found[SCRATCH] = found.get(SCRATCH, 0) + log.sizes[last.subject]
        found[ROUNDING] = highest - sum(found.values())
        yield Moment(*log.moments[moment], found, highest)


def _highest_points(log: EventLog, rounded: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """For each moment, the number of the first event at its highest point, and the bytes allocated there.

    ``rounded`` are the bytes of every allocation.
    """
    birth, death, scratch = Kind.BIRTH, Kind.DEATH, Kind.SCRATCH
    moment: int | None = None
    allocated = at = 0
    highest = -1
    for index, (kind, subject, _) in enumerate(log.events):
        if kind is birth:
            now = allocated = allocated + rounded[subject]
        elif kind is death:
            allocated -= rounded[subject]
            continue
        elif kind is scratch:
            now = allocated + log.sizes[subject]
        else:
            if moment is not None:
                yield moment, at, highest
            moment, highest, now = subject, -1, allocated
        if now > highest:
            highest, at = now, index
    if moment is not None:
        yield moment, at, highest


def peak_of_folded(log: EventLog, counts: Mapping[Axis, int]) -> int:
    """The allocated peak of the log unfolded to ``counts``, without unfolding it.

    Copies of a stretch all add the same net amount, so that the highest point in them is in the first or the last.
    """
    cut = stretches(log)
    copies: dict[int, int] = {}  # index of a stretch → how often it runs more (or, negative, less) than once
    for axis, count in counts.items():
        for index, up in pairs(cut, axis).items():
            # Of fewer than four units, one of the middle is left, or none; it is the lower.
            lower, upper = (index, index + 1) if up else (index + 1, index)
            copies[upper if count >= TRACED else lower] = max(count - TRACED, min(0, count - TRACED + 1))
            if count < TRACED:
                copies[upper] = -1
    allocated = peak = 0
    for index, events in enumerate(cut):
        more = copies.get(index, 0)
        if more < 0:
            continue
        highest, net = _course(log, events)
        peak = max(peak, allocated + highest, allocated + more * net + highest)
        allocated += (1 + more) * net
    return peak


def _course(log: EventLog, events: Sequence[Event]) -> tuple[int, int]:
    """The highest point of a stretch and its end, from its start at 0."""
    now = highest = 0
    for event in events:
        if event.kind == Kind.MOMENT:
            continue
        if event.kind == Kind.SCRATCH:
            highest = max(highest, now + log.sizes[event.subject])
            continue
        size = rounded_up(log.sizes[log.allocations[event.subject].size], CUDA_BLOCK_BYTES)
        now += size if event.kind == Kind.BIRTH else -size
        highest = max(highest, now)
    return highest, now


def rounded_up(size: int, multiple: int) -> int:
    """The next multiple, ``size`` itself where it is one.

    >>> rounded_up(1, 512), rounded_up(1024, 512), rounded_up(0, 512)
    (512, 1024, 0)
    """
    return -(-size // multiple) * multiple
