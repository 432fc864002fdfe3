"""How good a packing is: against the fewest rows there can be, against padding, and what attention has to compute.

Everything follows from lengths. Padding is measured on the very pieces that the rows are made of, one piece a row, so
that the only thing compared is how they are laid out.

Legend: N documents, P pieces, L lengths from 0 to the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainkit.data.packing import lower_bound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trainkit.data.packed_store import PackedRows

BATCH_SIZES = (8, 32)
"""Rows in the padded batches that packing is compared with."""
MUCH = 8
"""Lengths differ much where the longest is this many times the shortest."""
MOST_EQUAL_BANDS = 12


@dataclass(frozen=True)
class LengthBand:
    """How many documents have ``shortest`` to ``longest`` tokens."""

    shortest: int
    longest: int
    documents: int


@dataclass(frozen=True)
class PackingQuality:
    """What :func:`packing_quality` measures; slots are places for tokens."""

    lower_bound_rows: int
    """The fewest rows that could hold the tokens."""
    packed_slots: int
    slots_to_context: int
    """Of the same pieces, each padded to sequence_length."""
    slots_in_batches: Mapping[int, float]
    """Of the same pieces in random batches, each padded to its longest: expected slots, by batch size."""
    attention_whole_rows: int
    """Pairs of tokens (query, key) where every row is one piece of text; a causal mask halves this and the next."""
    attention_isolated: int
    """The same where a piece attends to itself alone."""
    length_bands: tuple[LengthBand, ...]
    """Lengths of the documents, before they were cut."""
    longest_tokens: int
    median_tokens: float


def packing_quality(rows: PackedRows) -> PackingQuality:
    """Measure rows that hold at least one document; reads lengths and no tokens."""
    lengths_P, context = rows.plan.pieces.length_P, rows.sequence_length
    in_rows_N = np.zeros(len(rows.documents), np.bool_)  # marking is many times faster than sorting
    in_rows_N[rows.plan.pieces.document_P] = True
    lengths_N = np.diff(rows.documents.offsets_N)[in_rows_N]
    return PackingQuality(
        lower_bound_rows=lower_bound(lengths_P, context),
        packed_slots=len(rows) * context,
        slots_to_context=lengths_P.size * context,
        slots_in_batches={size: slots_in_random_batches(lengths_P, size) for size in BATCH_SIZES},
        attention_whole_rows=len(rows) * context**2,
        attention_isolated=int(np.square(lengths_P, dtype=np.int64).sum()),
        length_bands=length_bands(lengths_N),
        longest_tokens=int(lengths_N.max()),
        median_tokens=float(np.median(lengths_N)),
    )


def padding_share(tokens: int, slots: float) -> float:
    """Share of the slots that hold no token.

    >>> padding_share(3, 4)
    0.25
    """
    return 1 - tokens / slots


def slots_in_random_batches(lengths_P: NDArray[np.integer], batch_size: int) -> float:
    """Expected slots when the pieces are shuffled, cut into batches, and each batch is padded to its longest piece.

    Exact, not drawn: in a random batch of b out of P pieces, of which c are at most l long, the longest is at most l
    with probability c/P x (c-1)/(P-1) x ... (b factors). The last batch holds what is left over.

    The longest of two is 3, 5 or 5, and the piece that is left over has 3 tokens on average: 2 x 13/3 + 3 slots:

    >>> round(slots_in_random_batches(np.array([1, 3, 5]), 2), 6)
    11.666667
    >>> slots_in_random_batches(np.array([1, 3, 5]), 1), slots_in_random_batches(np.array([1, 3, 5]), 8)
    (9.0, 15.0)
    """
    whole, left_over = divmod(lengths_P.size, batch_size)
    return whole * batch_size * _expected_longest(lengths_P, batch_size) + (
        left_over * _expected_longest(lengths_P, left_over) if left_over else 0.0
    )


def _expected_longest(lengths_P: NDArray[np.integer], drawn: int) -> float:
    """Mean length of the longest of ``drawn`` different pieces, at most all of them."""
    if drawn > lengths_P.size:
        return 0.0
    at_most_L = np.cumsum(np.bincount(lengths_P))[:-1]
    taken = np.arange(drawn)[:, None]
    # A factor is 0 where fewer than `drawn` pieces are that short; those after it must not turn the sign.
    probability_L = np.prod(np.maximum(at_most_L - taken, 0) / (lengths_P.size - taken), axis=0)
    return float(at_most_L.size - probability_L.sum())


def length_bands(lengths_N: NDArray[np.integer]) -> tuple[LengthBand, ...]:
    """A histogram from the shortest document's band to the longest's.

    Where lengths differ much, bands end at powers of two; where the longest is less than 8 times the shortest, they are
    equally wide. Either way no band straddles a sequence_length that is a power of two and at least as wide as a band:
    what is longer stands in the bands above it.

    >>> [(band.shortest, band.longest, band.documents) for band in length_bands(np.array([1, 3, 4, 16, 17]))]
    [(1, 1, 1), (2, 2, 0), (3, 4, 2), (5, 8, 0), (9, 16, 1), (17, 32, 1)]
    >>> [(band.shortest, band.longest, band.documents) for band in length_bands(np.array([30, 30, 32]))]
    [(30, 30, 2), (31, 31, 0), (32, 32, 1)]
    """
    shortest, longest = int(lengths_N.min()), int(lengths_N.max())
    if longest < MUCH * shortest:
        width = 1
        while (longest - shortest) // width >= MOST_EQUAL_BANDS:
            width *= 2
        first = (shortest - 1) // width
        ends = [width * number for number in range(first, -(-longest // width) + 1)]
    else:
        ends = [0] + [2**power for power in range((longest - 1).bit_length() + 1)]
        while ends[1] < shortest:
            ends.pop(0)
    counts = np.bincount(np.searchsorted(ends, lengths_N) - 1, minlength=len(ends) - 1).tolist()
    return tuple(
        LengthBand(below + 1, end, count) for below, end, count in zip(ends[:-1], ends[1:], counts, strict=True)
    )
