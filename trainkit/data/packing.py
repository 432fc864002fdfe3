"""Lengths of documents → pieces → bins: pure numpy, and the same lengths and seed always give the same plan.

A document longer than a row is first cut into pieces; then the pieces are put into as few bins (rows to be) as
best-fit-decreasing finds. Nothing here sees a token, so that a plan costs the same for short and long texts.

Legend: N documents, P pieces, B bins.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Positions = NDArray[np.signedinteger[Any]]
"""32 bits where every value fits into them (:func:`position_type`), 64 bits otherwise."""

GAP_WORTH_CLOSING = 1 / 5000
"""Bins above the lower bound, as a share of all bins: a second pass for less could save next to nothing."""
MOST_BINS_REFILLED = 4096
MOST_PIECES_REFILLED = 2**17
MOST_FIRST_PIECES_TRIED = 64
"""Bounds the search for three pieces that close a bin."""
MOST_LENGTHS_COMPARED = 2**27
"""Bounds the second pass as a whole to some tenths of a second, whatever the lengths and the capacity."""
LENGTHS_A_CALL_IS_WORTH = 4096
"""A search costs as much as comparing this many lengths before it has compared one."""


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, in the order of the documents and of their tokens; every array has shape (P,)."""

    document_P: Positions
    start_P: Positions
    """Position of the first token inside the document."""
    length_P: Int32
    overlap_P: Int32
    """How many of the first tokens repeat the end of the piece before."""

    def __len__(self) -> int:
        return int(self.document_P.size)

    def take(self, index_P: Positions | NDArray[np.bool_]) -> Pieces:
        """The pieces that ``index_P`` picks, in its order."""
        return Pieces(self.document_P[index_P], self.start_P[index_P], self.length_P[index_P], self.overlap_P[index_P])


@dataclass(frozen=True)
class Bins:
    """Which pieces share a bin: bin ``b`` holds ``order_P[offsets_B[b]:offsets_B[b + 1]]``; ``offsets_B`` is (B+1,)."""

    order_P: Positions
    offsets_B: Int64

    def __len__(self) -> int:
        return int(self.offsets_B.size) - 1


def cut(
    lengths_N: NDArray[np.integer],
    sequence_length: int,
    long_documents: Literal["split", "truncate", "drop"],
    overlap: int = 0,
) -> Pieces:
    """Cut documents of ``lengths_N`` tokens into pieces of at most ``sequence_length`` tokens.

    A document that fits is one piece; one of 0 tokens is none. ``split`` keeps every token: each later piece begins
    with the ``overlap`` tokens that ended the piece before, and brings at least one new token. ``truncate`` keeps the
    beginning, ``drop`` nothing of a document that is too long. Raises ValueError where ``overlap`` leaves no room for
    a new token.

    Ten tokens in rows of four, one repeated: 0123, 3456, 6789. Nine tokens fill two pieces of five exactly:

    >>> pieces = cut(np.array([3, 10]), 4, "split", overlap=1)
    >>> pieces.document_P.tolist(), pieces.start_P.tolist(), pieces.length_P.tolist(), pieces.overlap_P.tolist()
    ([0, 1, 1, 1], [0, 0, 3, 6], [3, 4, 4, 4], [0, 0, 1, 1])
    >>> cut(np.array([9]), 5, "split", overlap=1).start_P.tolist()
    [0, 4]
    >>> cut(np.array([3, 10]), 4, "truncate").length_P.tolist(), cut(np.array([3, 10]), 4, "drop").document_P.tolist()
    ([3, 4], [0])
    """
    if not 0 <= overlap < sequence_length:
        raise ValueError(f"an overlap of {overlap} tokens leaves nothing new in pieces of {sequence_length}")
    lengths_N = np.asarray(lengths_N)
    pieces_N = (lengths_N > 0).astype(np.int64)
    stride = sequence_length - overlap
    too_long_N = lengths_N > sequence_length
    if long_documents == "split":
        pieces_N[too_long_N] = 1 + -(-(lengths_N[too_long_N].astype(np.int64) - sequence_length) // stride)
    elif long_documents == "drop":
        pieces_N[too_long_N] = 0
    document_P = np.repeat(np.arange(lengths_N.size, dtype=position_type(lengths_N.size)), pieces_N)
    longest = int(lengths_N.max(initial=0))
    start_P = np.zeros(document_P.size, position_type(longest))
    # Only the pieces of documents with several of them need to be numbered.
    of_several_P = np.flatnonzero(np.repeat(pieces_N > 1, pieces_N))
    several_N = pieces_N[pieces_N > 1]
    number_P = np.arange(of_several_P.size) - np.repeat(np.cumsum(several_N) - several_N, several_N)
    start_P[of_several_P] = number_P * stride
    overlap_P = np.zeros(document_P.size, np.int32)
    overlap_P[of_several_P[number_P > 0]] = overlap
    return Pieces(
        document_P=document_P,
        start_P=start_P,
        length_P=np.minimum(sequence_length, lengths_N[document_P] - start_P).astype(np.int32),
        overlap_P=overlap_P,
    )


def position_type(largest: int) -> type[np.signedinteger[Any]]:
    """The narrowest signed integer that counts to ``largest``.

    >>> position_type(2**31 - 1), position_type(2**31)
    (<class 'numpy.int32'>, <class 'numpy.int64'>)
    """
    return np.int32 if largest < 2**31 else np.int64


def one_a_bin(number_of_pieces: int) -> Bins:
    """Every piece alone, in order: the rows of a run that pads instead of packing.

    >>> one_a_bin(3).offsets_B.tolist()
    [0, 1, 2, 3]
    """
    return Bins(np.arange(number_of_pieces), np.arange(number_of_pieces + 1))


def lower_bound(lengths_P: NDArray[np.integer], capacity: int) -> int:
    """The fewest bins that could hold the pieces if they could be cut at will.

    >>> lower_bound(np.array([3, 3, 3]), 4)
    3
    """
    return -(-int(lengths_P.sum(dtype=np.int64)) // capacity)


def best_fit(lengths_P: NDArray[np.integer], capacity: int, seed: int) -> Bins:
    """Pack pieces into bins of ``capacity`` tokens by best-fit-decreasing: longest first, each where it fits tightest.

    Pieces of equal length and bins of equal room are handled as one group, so that the deciding costs (distinct
    lengths x groups) and not pieces. Where this leaves gaps worth a bin, the bins with gaps are filled anew
    (:func:`_refill`); the result never has more bins than best-fit-decreasing. Which of the equally long pieces goes
    where, the order of the bins and where in its bin a piece stands are drawn from ``seed``: no row and no run is
    sorted by length. Raises ValueError for a length outside 1 ... ``capacity``.

    Five and three fill one bin of eight, four and four another; the two is left over:

    >>> lengths = np.array([4, 5, 2, 3, 4])
    >>> bins = best_fit(lengths, capacity=8, seed=0)
    >>> sorted(sorted(lengths[part].tolist()) for part in np.split(bins.order_P, bins.offsets_B[1:-1]))
    [[2], [3, 5], [4, 4]]
    """
    lengths_P = np.asarray(lengths_P)
    if lengths_P.size == 0:
        return one_a_bin(0)
    if lengths_P.min() < 1 or lengths_P.max() > capacity:
        raise ValueError(f"a piece must have 1 to {capacity} tokens; cut long documents and leave empty ones out first")
    rng = np.random.default_rng(seed)
    counts_L = np.bincount(lengths_P, minlength=capacity + 1)
    longest_first_P = _longest_first(lengths_P, counts_L, rng)
    placements = _place_groups(counts_L, capacity)
    bin_P, slot_P = _tighten(*_spread_groups(placements), placements, capacity, rng)

    pieces_B = np.bincount(bin_P).astype(bin_P.dtype)
    order_B = rng.permutation(pieces_B.size)
    offsets_B = np.concatenate(([0], np.cumsum(pieces_B[order_B], dtype=np.int64)))
    begin_B = np.empty(pieces_B.size, bin_P.dtype)
    begin_B[order_B] = offsets_B[:-1]
    # Turning every bin by a random amount takes the longest piece from its head without sorting anything again.
    slot_P += (rng.random(pieces_B.size) * pieces_B).astype(bin_P.dtype)[bin_P]
    of_bin_P = pieces_B[bin_P]
    slot_P -= of_bin_P * (slot_P >= of_bin_P)
    slot_P += begin_B[bin_P]
    order_P = np.empty_like(longest_first_P)
    order_P[slot_P] = longest_first_P
    return Bins(order_P, offsets_B)


def _longest_first(lengths_P: NDArray[np.integer], counts_L: Int64, rng: np.random.Generator) -> Positions:
    """Piece numbers by falling length, equal lengths in random order; ``counts_L[l]`` pieces have l tokens."""
    longest = counts_L.size - 1
    shortage_P = (longest - lengths_P).astype(np.uint16 if longest < 2**16 else np.uint32)
    # numpy sorts 16-bit keys by radix, in linear time; wider ones are sorted by their lower half, then by their upper.
    order_P = np.argsort(shortage_P.astype(np.uint16), kind="stable")
    if longest >= 2**16:
        order_P = order_P[np.argsort((shortage_P // 2**16).astype(np.uint16)[order_P], kind="stable")]
    narrow_P: Positions = order_P.astype(position_type(order_P.size))
    ends_L = np.cumsum(counts_L[::-1])
    several_L = np.flatnonzero(counts_L[::-1] > 1)
    for end, count in zip(ends_L[several_L].tolist(), counts_L[::-1][several_L].tolist(), strict=True):
        rng.shuffle(narrow_P[end - count : end])
    return narrow_P


def _place_groups(counts_L: Int64, capacity: int) -> Int64:
    """Best-fit-decreasing over the histogram: ``counts_L[l]`` pieces of length l.

    Returns the placements, shape (placements, 5): first bin, number of bins, pieces put into each of them, pieces
    that already lay in each, their length. Placement after placement takes its pieces from the list of pieces by
    falling length.

    The tightest bin stays the tightest while it still takes a piece of the same length, so a bin receives all the
    pieces of this length that it has room for before the next bin receives one.
    """
    groups_of_room: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(
        list
    )  # (first bin, bins, pieces in each)
    rooms = 0  # bit r is set while there is a group with room for r tokens
    number_of_bins = 0
    placements: list[tuple[int, int, int, int, int]] = []

    for length in np.flatnonzero(counts_L)[::-1].tolist():
        left = int(counts_L[length])
        while left:
            wide_enough = rooms >> length
            if wide_enough:
                room = length + (wide_enough & -wide_enough).bit_length() - 1
                first, bins, inside = groups_of_room[room].pop()
                rooms ^= 0 if groups_of_room[room] else 1 << room
            else:
                room, first, inside = capacity, number_of_bins, 0
                bins = -(-left // (capacity // length))
                number_of_bins += bins
            each = room // length
            full = min(bins, left // each)
            rest = min(left - full * each, each - 1) if full < bins else 0
            # The group falls into bins that take all they can, one bin that takes the rest, and untouched bins.
            for taken, part in ((each, full), (rest, int(rest > 0)), (0, bins - full - int(rest > 0))):
                if not part:
                    continue
                if taken:
                    placements.append((first, part, taken, inside, length))
                    left -= taken * part
                new_room = room - taken * length
                if new_room:
                    groups_of_room[new_room].append((first, part, inside + taken))
                    rooms |= 1 << new_room
                first += part
    return np.array(placements, np.int64).reshape(-1, 5)


def _spread_groups(placements: Int64) -> tuple[Positions, Positions]:
    """For each piece, by falling length: its bin, and how many pieces lay in the bin before it."""
    first, bins, each, inside, _ = placements.T
    pieces = bins * each
    number = int(pieces.sum())
    dtype = position_type(number)

    def of_pieces(values: Int64) -> Positions:
        return np.repeat(values.astype(dtype), pieces)

    bin_P = np.arange(number, dtype=dtype)  # where its placement began is taken off: its number within the placement
    bin_P -= of_pieces(np.cumsum(pieces) - pieces)
    slot_P = of_pieces(inside)
    if each.max(initial=1) > 1:
        each_P = of_pieces(each)
        # Numpy divides unsigned integers several times faster.
        turn_P = (bin_P.view(f"u{bin_P.itemsize}") // each_P.view(f"u{bin_P.itemsize}")).view(dtype)
        each_P *= turn_P
        slot_P += bin_P
        slot_P -= each_P
        bin_P = turn_P
    bin_P += of_pieces(first)
    return bin_P, slot_P


def _tighten(
    bin_P: Positions, slot_P: Positions, placements: Int64, capacity: int, rng: np.random.Generator
) -> tuple[Positions, Positions]:
    """Fill the bins with the widest gaps anew where that saves a bin; returns bin and slot of every piece."""
    first, bins, each, _, length = placements.T
    # What a placement puts into each of its bins is added where its run of bins begins and taken off behind it.
    change_B = np.zeros(int((first + bins).max()) + 1, np.int64)
    np.add.at(change_B, first, each * length)
    np.subtract.at(change_B, first + bins, each * length)
    gap_B = capacity - np.cumsum(change_B[:-1])
    if int(gap_B.sum()) // capacity <= GAP_WORTH_CLOSING * gap_B.size:
        return bin_P, slot_P
    gappy = np.argsort(-gap_B, kind="stable")[: min(MOST_BINS_REFILLED, np.count_nonzero(gap_B))]
    gappy = gappy[np.cumsum(np.bincount(bin_P)[gappy]) <= MOST_PIECES_REFILLED]
    spare = int(gap_B[gappy].sum()) - capacity
    if spare < 0:
        return bin_P, slot_P
    pooled_B = np.zeros(gap_B.size, np.bool_)
    pooled_B[gappy] = True
    pooled_P = np.flatnonzero(pooled_B[bin_P])
    lengths_P = length[np.searchsorted(np.cumsum(bins * each), pooled_P, "right")]
    refilled = _refill(lengths_P, capacity, spare, rng)
    if refilled is None:
        return bin_P, slot_P
    new_number_B = (np.cumsum(~pooled_B) - 1).astype(bin_P.dtype)
    new_bin_P = new_number_B[bin_P]
    new_bin_P[pooled_P] = gap_B.size - gappy.size + refilled[0]
    slot_P[pooled_P] = refilled[1]
    return new_bin_P, slot_P


def _refill(
    lengths_P: NDArray[np.integer], capacity: int, spare: int, rng: np.random.Generator
) -> tuple[Int64, Int64] | None:
    """Fill bins with pieces in random order, and close each with the few pieces that make it exactly full.

    Best-fit-decreasing ends with pieces that no longer complement each other; a random order keeps the mix of lengths
    until the last bin. Returns bin and slot of every piece, or None as soon as more than ``spare`` tokens of room
    have been left open, for then no bin can be saved any more, or when the search has become too long.
    """
    left_L = np.bincount(lengths_P, minlength=capacity + 1)
    closing_room = min(capacity, 3 * int(np.median(lengths_P)) + int(lengths_P.min()))
    waiting = deque(rng.permutation(lengths_P).tolist())
    taken_early: Counter[int] = Counter()  # lengths that closed a bin, still to be skipped in `waiting`
    bins: list[list[int]] = []
    pieces_left = lengths_P.size
    compared = 0
    while pieces_left:
        content, room = _draw(waiting, taken_early, left_L, capacity, closing_room)
        closing, searches = _pieces_that_close(left_L, room)
        compared += searches * (room + LENGTHS_A_CALL_IS_WORTH)
        closing = closing or _longest_that_fit(left_L, room)
        for length in closing:
            left_L[length] -= 1
        taken_early.update(closing)
        content += closing
        spare -= room - sum(closing)
        if spare < 0 or compared > MOST_LENGTHS_COMPARED:
            return None
        pieces_left -= len(content)
        bins.append(content)

    sizes_B = np.array([len(content) for content in bins])
    by_bin_P = np.concatenate([np.array(content) for content in bins])
    first_B = np.cumsum(sizes_B) - sizes_B
    # Only lengths were dealt out so far; the k-th piece of a length takes the k-th place given to that length.
    place_P = np.empty(lengths_P.size, np.int64)
    place_P[np.argsort(lengths_P, kind="stable")] = np.argsort(by_bin_P, kind="stable")
    bin_of_place_P = np.repeat(np.arange(sizes_B.size), sizes_B)
    return bin_of_place_P[place_P], (np.arange(by_bin_P.size) - first_B[bin_of_place_P])[place_P]


def _draw(
    waiting: deque[int], taken_early: Counter[int], left_L: Int64, capacity: int, closing_room: int
) -> tuple[list[int], int]:
    """The next waiting lengths, until at most ``closing_room`` tokens of room are left; and the room."""
    content: list[int] = []
    room = capacity
    refused: list[int] = []
    while waiting and room > closing_room and len(refused) < 8:
        length = waiting.popleft()
        if taken_early[length]:
            taken_early[length] -= 1
        elif length > room:
            refused.append(length)
        else:
            content.append(length)
            left_L[length] -= 1
            room -= length
    waiting.extendleft(reversed(refused))
    return content, room


def _pieces_that_close(left_L: Int64, room: int) -> tuple[list[int], int]:
    """One, two or three lengths of those left that add up to ``room`` exactly, and how many searches that took.

    The search is bounded: [] may also mean that three would have been found later.

    >>> _pieces_that_close(np.bincount([2, 2, 3, 7]), 7), _pieces_that_close(np.bincount([2, 2, 3]), 7)
    (([7], 0), ([2, 2, 3], 2))
    """
    if room == 0:
        return [], 0
    if room < left_L.size and left_L[room]:
        return [room], 0
    pair = _pair_that_closes(left_L, room)
    if pair:
        return pair, 1
    searches = 1
    for first in np.flatnonzero(left_L[:room])[:MOST_FIRST_PIECES_TRIED].tolist():
        left_L[first] -= 1
        pair = _pair_that_closes(left_L, room - first)
        left_L[first] += 1
        searches += 1
        if pair:
            return [first, *pair], searches
    return [], searches


def _pair_that_closes(left_L: Int64, room: int) -> list[int]:
    """Two lengths with sum ``room``, the most plentiful such pair; or []."""
    longest = min(room - 1, left_L.size - 1)
    shortest = room - longest
    if longest < shortest:
        return []
    pairs = np.minimum(left_L[shortest : longest + 1], left_L[shortest : longest + 1][::-1])
    if room % 2 == 0:
        pairs[room // 2 - shortest] //= 2
    best = int(pairs.argmax())
    return [shortest + best, longest - best] if pairs[best] else []


def _longest_that_fit(left_L: Int64, room: int) -> list[int]:
    """Always the longest length left that still fits, until none does.

    >>> _longest_that_fit(np.bincount([2, 2, 3, 7]), 6)
    [3, 2]
    """
    chosen: list[int] = []
    for length in np.flatnonzero(left_L[: room + 1])[::-1].tolist():
        fitting = min(int(left_L[length]), room // length)
        chosen += [length] * fitting
        room -= length * fitting
    return chosen
