"""Muon: momentum whose matrix is orthogonalised before it is applied. It learns to copy in half the tokens of AdamW.

After Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), where the coefficients of the
Newton-Schulz step are from; the scale 0.2 √(longer side), which makes AdamW's learning rates fit, is from "Muon is
scalable for LLM training" (Liu et al., 2025). torch's own computes in bf16, which is slow on CPUs without it.

Shapes: L matrices of one shape, O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices_LOI: Tensor) -> Tensor:
    """The matrices with their singular values brought near 1 (between 0.7 and 1.2), their singular vectors kept."""
    linear, cubic, quintic = NEWTON_SCHULZ
    tall = matrices_LOI.shape[1] > matrices_LOI.shape[2]
    x: Tensor = matrices_LOI.mT if tall else matrices_LOI
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = linear * x + (cubic * gram + quintic * gram @ gram) @ x
    return x.mT if tall else x


@dataclass(frozen=True, slots=True)
class Muon:
    """The optimizer of a model's hidden matrices; those of one shape are worked on together."""

    groups: tuple[tuple[tuple[Tensor, ...], Tensor], ...]  # matrices (O, I) and their momentum (L, O, I)
    momentum: float = 0.95
    weight_decay: float = 0.1

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update of every matrix from its gradient, which is then forgotten."""
        for matrices, momentum_LOI in self.groups:
            gradient_LOI = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            momentum_LOI.lerp_(gradient_LOI, 1 - self.momentum)
            update_LOI = orthogonalised(gradient_LOI.lerp(momentum_LOI, self.momentum))
            scale = learning_rate * 0.2 * max(update_LOI.shape[1:]) ** 0.5
            for matrix, update in zip(matrices, update_LOI, strict=True):
                matrix.mul_(1 - learning_rate * self.weight_decay).sub_(update, alpha=scale)
                matrix.grad = None


def muon(matrices: Iterable[Tensor]) -> Muon:
    """The optimizer with zero momentum."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    return Muon(tuple((tuple(group), torch.zeros(len(group), *shape)) for shape, group in by_shape.items()))
