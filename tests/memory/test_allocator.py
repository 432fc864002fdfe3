"""The caching allocator's rules, on sizes that can be followed by hand, and what holds for any sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from trainkit.memory.allocator import MIB, CachingAllocator, peak_reserved_bytes
from trainkit.memory.event_log import Allocation, Event, EventLog, Kind
from trainkit.memory.replay import rounded_up

if TYPE_CHECKING:
    from trainkit.memory.allocator import Block


def test_small_blocks_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(1) for _ in range(4096)]
    assert {block.size for block in blocks} == {512}
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_large_blocks_share_segments_of_twenty_and_the_largest_have_their_own() -> None:
    allocator = CachingAllocator()
    allocator.allocate(9 * MIB)
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(11 * MIB)
    assert allocator.reserved_bytes == 32 * MIB


def test_a_freed_block_serves_again_and_the_best_fit_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(100 * MIB), allocator.allocate(50 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(40 * MIB).address == small.address
    assert allocator.allocate(90 * MIB).address == large.address
    assert allocator.reserved_bytes == 150 * MIB


def test_neighbours_merge_when_they_are_free() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    for block in (blocks[0], blocks[2], blocks[1], blocks[3]):
        allocator.free(block)
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_empty_segments_are_given_back() -> None:
    allocator = CachingAllocator()
    kept, dropped = allocator.allocate(30 * MIB), allocator.allocate(40 * MIB)
    allocator.free(dropped)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 30 * MIB
    assert allocator.peak_reserved_bytes == 70 * MIB
    assert kept.size == 30 * MIB


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.booleans()), max_size=60))
def test_blocks_never_overlap_and_all_come_back(story: list[tuple[int, bool]]) -> None:
    allocator = CachingAllocator()
    used: list[Block] = []
    for size, frees in story:
        if frees and used:
            allocator.free(used.pop(size % len(used)))
        block = allocator.allocate(size)
        assert block.size >= rounded_up(size, 512)
        assert all(one.address + one.size <= block.address or block.address + block.size <= one.address for one in used)
        used.append(block)
        assert sum(one.size for one in used) <= allocator.reserved_bytes
    for block in used:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_the_optimizers_state_comes_with_the_first_update() -> None:
    """It is cut out of what the first step's activation left, so that the second step's needs another segment."""
    sizes = [100 * MIB, 30 * MIB]
    allocations = [Allocation(1, "optimizer state"), Allocation(0, "activations")]
    moments = [("start", "model"), ("forward", "embedding"), ("optimizer", "update"), ("optimizer", "end")]
    story = [(Kind.MOMENT, 0), (Kind.BIRTH, 0), (Kind.MOMENT, 1), (Kind.BIRTH, 1), (Kind.DEATH, 1)]
    story += [(Kind.MOMENT, 2), (Kind.MOMENT, 3)]
    log = EventLog(allocations, [Event(kind, subject) for kind, subject in story], sizes, moments)
    assert peak_reserved_bytes(log) == 200 * MIB
    assert peak_reserved_bytes(log, [("forward", 8 * MIB)]) == 220 * MIB
