"""Rows → tensors. The order of an epoch is a function of its number, so that a position is two integers.

Legend: R rows, T tokens in a row, S segments (tokens that attend to each other) in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def epoch_order(number_of_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Row numbers in the order in which ``epoch`` (from 0) visits them, shape (rows,); each exactly once.

    >>> sorted(epoch_order(4, seed=1, epoch=0).tolist())
    [0, 1, 2, 3]
    """
    return np.random.default_rng([seed, epoch]).permutation(number_of_rows)


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
