"""An event log whose sizes are products of the model's dimensions, as it is stored. Torch-free.

Every piece of memory that a step of a plain decoder takes is a number times some of the dimensions below, so that one
recorded log serves every model of a family. ``sizes`` holds (numerator, denominator, exponent of each dimension);
``scratch`` a kernel of :mod:`trainkit.memory.kernel_scratch` and its numbers, as indices into ``sizes``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainkit.memory import kernel_scratch
from trainkit.memory.event_log import Allocation, Event, EventLog, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Dimensions(NamedTuple):
    """What sizes depend on. The last chunk of the loss may be shorter than the others."""

    rows: int
    tokens: int
    key_value_heads: int
    queries_per_key: int
    hidden: int
    intermediate: int
    head_width: int
    vocabulary: int
    rank: int
    chunk: int
    last_chunk: int
    fused_heads: int  # of a layer that makes queries, keys and values at once: queries per key, and two
    positions: int  # of a table of them


class ParameterCount(NamedTuple):
    """Parameters of one size: how many in each layer, how many besides, and whether they train or are an adapter's."""

    size: int
    in_a_layer: int
    besides: int
    trains: bool
    added: bool


@dataclass(frozen=True)
class SymbolicLog:
    """A recorded step of four layers and four chunks. Events are (kind, subject, label), sizes see above."""

    sizes: Sequence[Sequence[int]]
    scratch: Sequence[tuple[str, Sequence[int]]]
    allocations: Sequence[Allocation]
    events: Sequence[Event]
    moments: Sequence[tuple[str, str]]
    parameters: Sequence[ParameterCount]

    def at(self, dimensions: Dimensions) -> EventLog:
        """The log of a model with these dimensions; the scratch of kernels stands behind the other sizes."""
        products = [_product(size, dimensions) for size in self.sizes]
        kernels = [kernel_scratch.BY_NAME[name](*(products[index] for index in used)) for name, used in self.scratch]
        first = len(products)
        events = [
            Event(Kind.SCRATCH, first + subject, label) if kind == Kind.SCRATCH else Event(kind, subject, label)
            for kind, subject, label in self.events
        ]
        return EventLog(list(self.allocations), events, products + kernels, list(self.moments))

    def counts(self, dimensions: Dimensions, layers: int) -> tuple[int, int]:
        """Parameters of a model with these dimensions (without adapters), and trained parameters."""
        own = trained = 0
        for found in self.parameters:
            numbers = _product(self.sizes[found.size], dimensions) * (found.in_a_layer * layers + found.besides)
            own += 0 if found.added else numbers
            trained += numbers if found.trains else 0
        return own, trained

    def to_line(self) -> bytes:
        """A line of JSON; the same log gives the same bytes."""
        parts = sorted({allocation.part for allocation in self.allocations})
        content = {
            "sizes": self.sizes,
            "scratch": self.scratch,
            "parts": parts,
            "allocations": [[size, parts.index(part), label] for size, part, label in self.allocations],
            "events": list(_relative(self.events)),
            "moments": self.moments,
            "parameters": self.parameters,
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def from_line(cls, line: bytes) -> SymbolicLog:
        """What :meth:`to_line` wrote."""
        content: dict[str, Any] = json.loads(line)
        parts = content["parts"]
        return cls(
            sizes=content["sizes"],
            scratch=[(name, used) for name, used in content["scratch"]],
            allocations=[Allocation(size, parts[part], label) for size, part, label in content["allocations"]],
            events=list(_absolute(content["events"])),
            moments=[(phase, place) for phase, place in content["moments"]],
            parameters=[ParameterCount(*found) for found in content["parameters"]],
        )


def _relative(events: Sequence[Event]) -> Iterator[list[int | None]]:
    """Events as they are stored: what dies is counted back from the youngest allocation, and a birth is of the next.

    Layers that do the same then read the same, and a log takes a third of the room.
    """
    born = 0
    for kind, subject, label in events:
        if kind == Kind.BIRTH:
            assert subject == born, "allocations are numbered in the order of their births"
            born += 1
        stored = {Kind.BIRTH: 0, Kind.DEATH: born - subject}.get(kind, subject)
        yield [kind, stored, label]


def _absolute(stored: Sequence[tuple[int, int, int | None]]) -> Iterator[Event]:
    """The events that :func:`_relative` has written."""
    birth, death, kinds = Kind.BIRTH, Kind.DEATH, list(Kind)
    born = 0
    for number, subject, label in stored:
        kind = kinds[number]
        if kind is birth:
            yield Event(birth, born, label)
            born += 1
        else:
            yield Event(kind, born - subject if kind is death else subject, label)


def _product(size: Sequence[int], dimensions: Dimensions) -> int:
    numerator, denominator, *exponents = size
    for dimension, exponent in zip(dimensions, exponents, strict=True):
        if exponent:
            numerator *= dimension**exponent
    return -(-numerator // denominator)
