"""Proof that training moves the weights: what did not change after the first updates is found by its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainkit.errors import DivergedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

UPDATES = (
    5  # after which every weight that gets gradients has moved; an adapter's first factor moves from the second on
)
SECOND_FACTORS = (
    ".lora_B.",
    ".lora_embedding_B.",
)  # of peft's names: an adapter whose second factors stay does nothing
SAMPLED = 1024  # elements of each weight
LEAST_SHARE = 0.01  # of the sampled elements; every ordinary update changes nearly all of them
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bit patterns, an int64 scalar on its device that wraps around: one pass, no copy.

    Where two fingerprints of a tensor differ, its elements do. That a change leaves the sum as it was is possible and
    unlikely. Words of 8 bytes, wherever they come out even, are summed many times faster than shorter ones.
    """
    flat = tensor.detach().contiguous().view(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64).sum()
    return flat.view(INTEGERS[size]).sum(dtype=torch.int64)


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of at most :data:`SAMPLED` elements, evenly spaced over the tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLED))].clone()


class Movement:
    """The trained weights as they stood when this process began to train, and what its updates should have done.

    Which tensors changed is told by their fingerprints, so that a change of a single element counts. Whether training
    moves anything to speak of is told by a sample of the elements: where fp32 rounds an update away, weights that are
    exactly zero (the embedding of padding) still follow it.

    ``weights`` are what this process holds of them; ``add_up`` sums numbers over all processes, which look together.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], add_up: Callable[[Sequence[float]], list[float]] = list
    ) -> None:
        self._weights = weights
        self._add_up = add_up
        self._before = {name: fingerprint(weight) for name, weight in weights.items()}
        self._sampled = {name: sample(weight) for name, weight in weights.items()}
        self._updates = 0
        self._highest_rate = 0.0
        self._any_gradient = False
        self._judged = False

    def note_update(self, learning_rate: float, grad_norm: float) -> None:
        """Count an update that was made."""
        self._updates += 1
        self._highest_rate = max(self._highest_rate, learning_rate)
        self._any_gradient |= grad_norm > 0

    def is_due(self, *, warming_up: bool, at_the_end: bool) -> bool:
        """Whether to look: once, after the first updates but not in the warm-up, at the run's end at the latest."""
        ready = self._updates >= UPDATES and not warming_up
        return not self._judged and self._updates > 0 and (ready or at_the_end)

    def check(self) -> tuple[str, ...]:
        """The names of the weights that should have changed and have not, after enough updates to say so.

        Raises DivergedError when there was no gradient at all, when hardly any element changed, or none of an
        adapter's second factors, without which it is no adapter.
        """
        self._judged = True
        moved = [self._before[name].ne(fingerprint(weight)) for name, weight in self._weights.items()]
        counts = self._add_up(torch.stack(moved).tolist())
        unmoved = [name for name, count in zip(self._weights, counts, strict=True) if not count]
        after = f"{self._updates} update{'s' * (self._updates > 1)}"
        if not self._any_gradient:
            raise DivergedError(
                f"the gradient was 0 in all of {after}: nothing is learned from these targets; look at what is trained "
                "with trainkit inspect-data"
            )
        first = f", `{unmoved[0]}` first" if unmoved else ""
        small = f"at learning rates up to {self._highest_rate:.2g}{first}; raise training.learning_rate: fp32 rounds"
        share = self._share_moved()
        if share < LEAST_SHARE:
            raise DivergedError(f"{share:.1%} of the trained weights changed in {after} {small} smaller changes away")
        factors = [name for name in self._weights if any(part in f"{name}." for part in SECOND_FACTORS)]
        if factors and set(factors) <= set(unmoved):
            raise DivergedError(f"none of the adapter's second factors changed in {after} {small} smaller changes away")
        return tuple(unmoved) if self._updates >= UPDATES else ()

    def _share_moved(self) -> float:
        """The share of the sampled elements that changed."""
        moved = torch.stack([(self._sampled[name] != sample(one)).sum() for name, one in self._weights.items()])
        count, of = self._add_up([int(moved.sum()), sum(one.numel() for one in self._sampled.values())])
        return count / of
