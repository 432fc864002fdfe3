"""What a step does to memory, as a list of births and deaths, for a model of any number of equal layers. Torch-free.

A step is traced on a model of :data:`TRACED_LAYERS` layers: the first, two from the middle, the last. In the two from
the middle the same things happen in the same order, so what happens in one more layer is known: :func:`unfold` writes
the log of the full depth, event by event, as a trace of the full depth would have written it.

Every event belongs to a layer or to none. Events of one layer that follow each other without a break are a *stretch*.
Stretches of the two middle layers lie side by side: up (1, 2) in the forward pass and in the optimizer's lists, down
(2, 1) in the backward pass. Between the two the copies are put in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRACED_LAYERS = 4
_MIDDLE = (1, 2)


class Kind(IntEnum):
    """What an event does; in brackets what its ``subject`` is."""

    BIRTH = 0  # (an allocation)
    DEATH = 1  # (an allocation)
    SCRATCH = 2  # a kernel takes and returns memory within itself (a size)
    MOMENT = 3  # from here on the step is at (a moment)


class Event(NamedTuple):
    """``subject`` is an index into the log's allocations, sizes or moments."""

    kind: Kind
    subject: int
    layer: int | None = None


class Allocation(NamedTuple):
    """A piece of memory: an index into the log's sizes, the part of the estimate it counts to, and its layer."""

    size: int
    part: str
    layer: int | None = None


@dataclass
class EventLog:
    """A step. ``sizes`` are bytes as asked for, before any rounding; ``moments`` are pairs of phase and place.

    ``layers`` is how many the traced model had.
    """

    layers: int
    allocations: list[Allocation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    moments: list[tuple[str, str]] = field(default_factory=list)


class NotPeriodicError(Exception):
    """The middle layers do not do the same: such a model has to be traced at its full depth."""


def unfold(log: EventLog, layers: int) -> EventLog:
    """The log of the same model with ``layers`` layers, at least :data:`TRACED_LAYERS`.

    Raises NotPeriodicError where the two middle layers differ.
    """
    if layers == log.layers:
        return log
    assert log.layers == TRACED_LAYERS <= layers
    return _Unfolding(log, layers).result()


def stretches(log: EventLog) -> list[list[Event]]:
    """The events, cut where the layer changes."""
    return [list(events) for _, events in groupby(log.events, key=lambda event: event.layer)]


def pairs(log: EventLog) -> dict[int, bool]:
    """Indices of the first of two neighbouring stretches of the middle layers, and whether the pair goes up.

    Raises NotPeriodicError where a stretch of a middle layer has no partner.
    """
    layers = [events[0].layer for events in stretches(log)]
    found: dict[int, bool] = {}
    index = 0
    while index < len(layers):
        if layers[index] in _MIDDLE:
            if index + 1 == len(layers) or layers[index + 1] not in _MIDDLE:
                raise NotPeriodicError
            found[index] = layers[index] == _MIDDLE[0]
            index += 1
        index += 1
    return found


class _Unfolding:
    """One run of :func:`unfold`."""

    def __init__(self, log: EventLog, layers: int) -> None:
        self.log = log
        self.layers = layers
        self.last_middle = layers - 2
        self.moments = list(log.moments)
        self.allocations = [allocation._replace(layer=self._moved(allocation.layer)) for allocation in log.allocations]
        self.events: list[Event] = []
        self.twins: dict[int, int] = {}  # an allocation of a middle layer → its like in layer 1
        self.copies: dict[tuple[int, int], int] = {}  # (allocation of layer 1, layer) → allocation

    def result(self) -> EventLog:
        parts, found = stretches(self.log), pairs(self.log)
        index = 0
        while index < len(parts):
            if index in found:
                self._pair(parts[index], parts[index + 1], up=found[index])
                index += 2
            else:
                self.events += [self._kept(event) for event in parts[index]]
                index += 1
        return EventLog(self.layers, self.allocations, self.events, self.log.sizes, self.moments)

    def _moved(self, layer: int | None) -> int | None:
        """Where a traced layer stands in the full depth."""
        return layer if layer is None or layer < 2 else layer + self.layers - TRACED_LAYERS

    def _kept(self, event: Event) -> Event:
        if event.kind == Kind.MOMENT and event.layer is not None:
            return self._at_layer(event, event.layer, event.layer)
        return event._replace(layer=self._moved(event.layer))

    def _pair(self, one: Sequence[Event], other: Sequence[Event], *, up: bool) -> None:
        self._match(one, other)
        middle = range(2, self.last_middle) if up else range(self.last_middle - 1, 1, -1)
        self.events += [self._kept(event) for event in one]
        for layer in middle:
            self.events += list(self._copy(one, other, layer))
        self.events += [self._kept(event) for event in other]

    def _match(self, one: Sequence[Event], other: Sequence[Event]) -> None:
        """Note which allocation is whose twin; raises NotPeriodicError where the stretches are not alike."""
        if len(one) != len(other):
            raise NotPeriodicError
        for first, second in zip(one, other, strict=True):
            if first.kind != second.kind or self._size(first) != self._size(second):
                raise NotPeriodicError
            if first.kind == Kind.BIRTH:
                lower, upper = sorted((first, second), key=lambda event: event.layer or 0)
                self.twins[lower.subject] = self.twins[upper.subject] = lower.subject
                self.copies[lower.subject, 1] = lower.subject
                self.copies[lower.subject, self.last_middle] = upper.subject

    def _size(self, event: Event) -> tuple[int, str] | int | None:
        if event.kind == Kind.MOMENT:
            return None
        if event.kind == Kind.SCRATCH:
            return event.subject
        allocation = self.log.allocations[event.subject]
        return allocation.size, allocation.part

    def _copy(self, one: Sequence[Event], other: Sequence[Event], layer: int) -> Iterator[Event]:
        """The second stretch as it runs in ``layer``; the first says what lies beyond the middle layers."""
        for first, second in zip(one, other, strict=True):
            if second.kind == Kind.SCRATCH:
                yield second._replace(layer=layer)
            elif second.kind == Kind.MOMENT:
                assert second.layer is not None
                yield self._at_layer(second, second.layer, layer, exact=True)
            elif second.kind == Kind.BIRTH:
                twin = self.twins[second.subject]
                self.copies[twin, layer] = len(self.allocations)
                self.allocations.append(self.log.allocations[second.subject]._replace(layer=layer))
                yield Event(Kind.BIRTH, self.copies[twin, layer], layer)
            else:
                yield Event(Kind.DEATH, self._counterpart(first, second, layer), layer)

    def _counterpart(self, first: Event, second: Event, layer: int) -> int:
        """What dies in ``layer`` when ``second.subject`` dies in the second stretch."""
        for event in (second, first):
            subject = event.subject
            owner = self.log.allocations[subject].layer
            if owner in _MIDDLE:
                assert event.layer is not None
                try:
                    return self.copies[self.twins[subject], layer + owner - event.layer]
                except KeyError:
                    raise NotPeriodicError from None
        raise NotPeriodicError  # it dies in one layer and does not belong to one

    def _at_layer(self, event: Event, traced: int, layer: int, *, exact: bool = False) -> Event:
        """A moment in a layer, under the layer's own number."""
        number = layer if exact else self._moved(traced)
        phase, place = self.log.moments[event.subject]
        moment = (phase, place.replace(f"layer {traced}", f"layer {number}"))
        if moment not in self.moments:
            self.moments.append(moment)
        return Event(Kind.MOMENT, self.moments.index(moment), number)
