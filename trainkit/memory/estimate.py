"""The peak memory of a training step: one question, answered by the quickest engine that knows the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainkit.memory.scenario import Scenario

Phase = Literal["forward", "loss", "backward", "optimizer"]

# In the order in which they are stacked and listed.
PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "logits and loss",
    "temporary buffers",
    "sharding buffers",
    "allocator rounding",
)


@dataclass(frozen=True)
class Point:
    """The memory at one moment of the step: what is going on (``embedding``, ``layer 3``, ...) and bytes by part."""

    phase: Phase
    place: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a step takes on one device; bytes, and counts of numbers.

    ``parts`` are those of :data:`PARTS`, at the peak; they add up to ``peak_allocated_bytes``. ``weights`` are the
    model's own, in whatever type they are stored (fp32 where they train: there are no second, master weights).
    ``peak_reserved_bytes`` is what the caching allocator holds of the device for it; the device's context comes on top.
    ``timeline`` runs through one step, thinned, its peak kept. ``remarks`` are sentences that a reader should know.
    """

    parameters: int
    trainable_parameters: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_phase: Phase
    peak_place: str
    parts: Mapping[str, int]
    timeline: tuple[Point, ...]
    engine: Literal["quick", "trace"]
    seconds: float
    remarks: tuple[str, ...] = ()


def estimate(scenario: Scenario, *, exact: bool = False) -> Estimate:
    """The memory of a step in steady state, from the second step on.

    ``exact`` traces the step even where the quick engine has the answer. Raises ModelError for a model that cannot be
    built or traced, UsageError for an adapter that does not fit it, and MachineError for a missing package.
    """
    from trainkit.memory.trace import trace_step  # torch

    return trace_step(scenario)
