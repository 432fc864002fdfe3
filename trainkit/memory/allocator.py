"""CUDA's caching allocator, as far as sizes go: what it holds of the device for a step's births and deaths. Torch-free.

After c10/cuda/CUDACachingAllocator.cpp (torch 2.13, default settings, one stream): sizes are rounded to 512 bytes;
small blocks (up to 1 MiB) are cut from segments of 2 MiB, larger ones from segments of 20 MiB, the largest (from
10 MiB) get a segment of their own, rounded to 2 MiB; the smallest free block that is large enough is taken; what is
left of it stays free where it is worth splitting; free neighbours merge. A segment is given back only when the device
is full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.memory.event_log import Kind
from trainkit.memory.replay import CUDA_BLOCK_BYTES, rounded_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainkit.memory.event_log import EventLog

MIB = 2**20
_SMALL = MIB  # kSmallSize
_SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
_LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
_OWN_SEGMENT = 10 * MIB  # kMinLargeAlloc
_OWN_SEGMENT_STEP = 2 * MIB  # kRoundLarge


@dataclass(eq=False, slots=True)
class Block:
    """A stretch of a segment, between its neighbours in it."""

    size: int
    address: int
    is_small: bool
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """The allocator of one device; counts bytes allocated and reserved, and the most that was reserved."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by size, then address
        self._next_address = 0

    def allocate(self, size: int) -> Block:
        """A block of at least ``size`` bytes."""
        size = rounded_up(size, CUDA_BLOCK_BYTES) or CUDA_BLOCK_BYTES
        is_small = size <= _SMALL
        pool = self._free[is_small]
        index = bisect_left(pool, (size,))
        block = pool.pop(index)[2] if index < len(pool) else self._new_segment(size, is_small=is_small)
        block.is_free = False
        left = block.size - size
        if left and (is_small or left > _SMALL):
            after = block.after
            rest = Block(left, block.address + size, is_small, True, block, after)
            block.after, block.size = rest, size
            if after is not None:
                after.before = rest
            insort(pool, (left, rest.address, rest))
        return block

    def free(self, block: Block) -> None:
        """Take a block back, and merge it with its free neighbours."""
        pool = self._free[block.is_small]
        before, after = block.before, block.after
        if before is not None and before.is_free:
            del pool[bisect_left(pool, (before.size, before.address))]
            before.size += block.size
            block = before
        if after is not None and after.is_free:
            del pool[bisect_left(pool, (after.size, after.address))]
            block.size += after.size
            after = after.after
        block.after = after
        if after is not None:
            after.before = block
        block.is_free = True
        insort(pool, (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Give back every segment of which nothing is used (``torch.cuda.empty_cache``)."""
        for pool in self._free.values():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            for entry in whole:
                pool.remove(entry)
                self.reserved_bytes -= entry[0]

    def _new_segment(self, size: int, *, is_small: bool) -> Block:
        if is_small:
            reserved = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            reserved = _LARGE_SEGMENT
        else:
            reserved = rounded_up(size, _OWN_SEGMENT_STEP)
        self.reserved_bytes += reserved
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(reserved, self._next_address, is_small)
        self._next_address += 2 * reserved  # segments are no neighbours
        return block


def peak_reserved_bytes(log: EventLog, workspaces: Sequence[tuple[str, int]] = ()) -> int:
    """What the allocator has reserved after two steps of the log.

    The first step starts without the optimizer's state, which its update makes; the second finds what the first left.
    ``workspaces`` are libraries' buffers that stay: the phase in which each is first needed, and its bytes.
    """
    allocator = CachingAllocator()
    allocate, free = allocator.allocate, allocator.free
    birth, death, scratch = Kind.BIRTH, Kind.DEATH, Kind.SCRATCH
    asked_bytes = [log.sizes[allocation.size] for allocation in log.allocations]
    blocks: list[Block | None] = [None] * len(asked_bytes)
    waiting = list(workspaces)
    for first in (True, False):
        phase = ""
        late: list[int] = []  # the optimizer's state, which is not there before the first update
        for kind, subject, _ in log.events:
            if kind is birth:
                if blocks[subject] is not None or not asked_bytes[subject]:
                    continue
                if first and phase == "start" and log.allocations[subject].part == "optimizer state":
                    late.append(subject)
                else:
                    blocks[subject] = allocate(asked_bytes[subject])
            elif kind is death:
                block = blocks[subject]
                if block is not None:
                    free(block)
                    blocks[subject] = None
            elif kind is scratch:
                free(allocate(log.sizes[subject]))
            else:
                phase, place = log.moments[subject]
                while waiting and waiting[0][0] == phase:
                    allocate(waiting.pop(0)[1])
                if place == "update":
                    for number in late:
                        blocks[number] = allocate(asked_bytes[number])
                    late = []
    return allocator.peak_reserved_bytes
