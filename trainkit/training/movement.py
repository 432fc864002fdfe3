"""Proof that training moves the weights: what did not change after the first updates is found by its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainkit.errors import DivergedError

if TYPE_CHECKING:
    from collections.abc import Mapping

UPDATES = 5  # after which every weight that gets gradients has moved; an adapter's first factor moves from the second on
SECOND_FACTORS = (".lora_B.", ".lora_embedding_B.")  # of peft's names: an adapter whose second factors stay does nothing
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bit patterns, an int64 scalar on its device: one pass, no copy.

    Where two fingerprints differ, the tensors do. That a change leaves the sum as it was is possible and unlikely.
    """
    return tensor.detach().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


class Movement:
    """The trained weights as they stood when this process began to train, and what its updates should have done."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._before = {name: fingerprint(weight) for name, weight in weights.items()}
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

        Raises DivergedError when there was no gradient at all, when no weight changed, or none of an adapter's second
        factors, without which it is no adapter.
        """
        self._judged = True
        same = [self._before[name].eq(fingerprint(weight)) for name, weight in self._weights.items()]
        unmoved = [name for name, is_same in zip(self._weights, torch.stack(same).tolist(), strict=True) if is_same]
        after = f"after {self._updates} update{'s' * (self._updates > 1)}"
        if not self._any_gradient:
            raise DivergedError(
                f"the gradient was 0 in every step {after}: nothing is learned from these targets; look at what is "
                "trained with trainkit inspect-data"
            )
        for kind, names in (("trained weights", list(self._weights)), ("adapter's second factors", self._factors())):
            if names and set(names) <= set(unmoved):
                raise DivergedError(
                    f"none of the {len(names)} {kind} changed {after} at learning rates up to "
                    f"{self._highest_rate:.2g}, `{names[0]}` first; raise training.learning_rate: "
                    "fp32 rounds smaller changes away"
                )
        return tuple(unmoved) if self._updates >= UPDATES else ()

    def _factors(self) -> list[str]:
        return [name for name in self._weights if any(part in f"{name}." for part in SECOND_FACTORS)]
