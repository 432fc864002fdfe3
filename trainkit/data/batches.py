"""Rows → tensors. The order of an epoch is a function of its number, so that a position is two integers.

Legend: R rows, T tokens in a row, S segments (tokens that attend to each other) in a row.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trainkit.data.packed_store import Row
    from trainkit.recipe.schema import Packing

NOT_A_TARGET = -100
"""The label that cross-entropy passes over."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: R rows, padded on the right to the same T.

    ``labels_RT[r, t]`` is the token that follows token t, or -100 where that is no target. ``segment_lengths[r]``
    covers all T slots. ``tokens`` counts what is not padding, ``trained_tokens`` the targets.
    """

    input_ids_RT: torch.Tensor
    labels_RT: torch.Tensor
    position_ids_RT: torch.Tensor
    segment_lengths: tuple[tuple[int, ...], ...]
    trained_tokens: int
    tokens: int


@lru_cache(maxsize=1)
def epoch_order(number_of_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Row numbers in the order in which ``epoch`` (from 0) visits them, shape (rows,); each exactly once.

    Not to be written to: it is kept for the steps of the epoch, since drawing it takes half a second for 10 M rows.

    >>> sorted(epoch_order(4, seed=1, epoch=0).tolist())
    [0, 1, 2, 3]
    """
    order = np.random.default_rng([seed, epoch]).permutation(number_of_rows)
    order.flags.writeable = False
    return order


def share_out(work_R: Sequence[int], processes: int) -> list[list[int]]:
    """Indices of ``work_R`` for each process, with about the same work, and rows that differ by one at most.

    A function of its arguments alone. The heaviest row goes first, always to the process with the least work so far
    that still has room (Graham's longest-processing-time rule); each process keeps the order that it was given.

    >>> share_out([9, 1, 1, 9, 4, 4], 2)
    [[0, 1, 4], [2, 3, 5]]
    >>> share_out([5], 2)
    [[0], []]
    """
    each, left_over = divmod(len(work_R), processes)
    shares: list[list[int]] = [[] for _ in range(processes)]
    least = [(0, process) for process in range(processes)]  # a heap
    for index in sorted(range(len(work_R)), key=lambda index: (-work_R[index], index)):
        work, process = heapq.heappop(least)
        while len(shares[process]) >= each + (left_over > 0):  # no room any more
            work, process = heapq.heappop(least)
        left_over -= len(shares[process]) == each
        shares[process].append(index)
        heapq.heappush(least, (work + work_R[index], process))
    return [sorted(share) for share in shares]


def attention_work(row: Row, isolate_documents: bool) -> int:
    """Pairs of tokens that see each other in a row: the sum of the squared lengths of its documents."""
    lengths_S = row.segment_lengths.astype(np.int64)
    return int((lengths_S**2).sum() if isolate_documents else lengths_S.sum() ** 2)


def empty_batch(pad_id: int, tokens: int = 8) -> Batch:
    """A micro-batch of padding alone, for a process that has fewer rows than others: its loss and gradients are 0."""
    return Batch(
        input_ids_RT=torch.full((1, tokens), pad_id, dtype=torch.int64),
        labels_RT=torch.full((1, tokens), NOT_A_TARGET, dtype=torch.int64),
        position_ids_RT=torch.arange(tokens)[None],
        segment_lengths=((tokens,),),
        trained_tokens=0,
        tokens=0,
    )


def make_batch(rows: Sequence[Row], packing: Packing, pad_id: int) -> Batch:
    """Put rows side by side.

    Packed rows are padded to ``packing.sequence_length``, so that every step has the same shape; rows of
    ``strategy: none`` only to the longest of them, which is what padding honestly costs. The padding is a segment of
    its own. Without ``isolate_documents`` a row is one segment; without ``reset_positions`` positions run through the
    row. The two do not depend on each other, and neither moves a target. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    filled_R = [row.ids_T.size for row in rows]
    width = packing.sequence_length if packing.strategy == "best-fit" else max(filled_R)
    ids_RT = np.full((len(rows), width), pad_id, np.int64)
    labels_RT = np.full((len(rows), width), NOT_A_TARGET, np.int64)
    positions_RT = np.empty((len(rows), width), np.int64)
    segment_lengths: list[tuple[int, ...]] = []
    for index, (row, filled) in enumerate(zip(rows, filled_R, strict=True)):
        ids_RT[index, :filled] = row.ids_T
        labels_RT[index, : filled - 1] = np.where(row.trained_T[1:], row.ids_T[1:], NOT_A_TARGET)
        padding = width - filled
        lengths_S = np.append(row.segment_lengths, padding) if padding else row.segment_lengths
        positions_RT[index] = np.arange(width)
        if packing.reset_positions:
            positions_RT[index] -= np.repeat(np.cumsum(lengths_S) - lengths_S, lengths_S)
        segment_lengths.append(tuple(lengths_S.tolist()) if packing.isolate_documents else (width,))
    return Batch(
        input_ids_RT=torch.from_numpy(ids_RT),
        labels_RT=torch.from_numpy(labels_RT),
        position_ids_RT=torch.from_numpy(positions_RT),
        segment_lengths=tuple(segment_lengths),
        trained_tokens=int(np.count_nonzero(labels_RT != NOT_A_TARGET)),
        tokens=sum(filled_R),
    )
