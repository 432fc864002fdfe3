"""What a step does to memory, as a list of births and deaths, for a model of any number of equal layers. Torch-free.

A step is traced on a model of :data:`TRACED` layers: the first, two from the middle, the last. In the two from
the middle the same things happen in the same order, so what happens in one more layer is known: :func:`unfold` writes
the log of the full depth, event by event, as a trace of the full depth would have written it.

Every event belongs to a layer or to none. Events of one layer that follow each other without a break are a *stretch*.
Stretches of the two middle layers lie side by side: up (1, 2) in the forward pass and in the optimizer's lists, down
(2, 1) in the backward pass. Between the two the copies are put in.

Where kinds of layers alternate, a unit is several layers, as many as come again and again; the label is the unit's.

The chunks of the loss repeat in the same way, so a log has two axes. A chunk's label is negative: -1 is the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRACED = 4
_MIDDLE = (1, 2)
BUCKET_BYTES = 25 * 2**20  # of DistributedDataParallel: bucket_cap_mb


class Axis(IntEnum):
    """What repeats. The label of the unit ``index`` is ``index`` for a layer and ``-1 - index`` for a chunk."""

    LAYER = 0
    CHUNK = 1

    def label(self, index: int) -> int:
        """The label of a unit."""
        return index if self is Axis.LAYER else -1 - index

    def index(self, label: int | None) -> int | None:
        """The unit of a label; None where that is of the other axis or of none."""
        if label is None or (label < 0) != (self is Axis.CHUNK):
            return None
        return label if self is Axis.LAYER else -1 - label

    def place(self, index: int) -> str:
        """What a moment in a unit is called.

        >>> Axis.LAYER.place(3), Axis.CHUNK.place(0)
        ('layer 3', 'chunk 0')
        """
        return f"{self.name.lower()} {index}"


class Kind(IntEnum):
    """What an event does; in brackets what its ``subject`` is."""

    BIRTH = 0  # (an allocation)
    DEATH = 1  # (an allocation)
    SCRATCH = 2  # a kernel takes and returns memory within itself (a size)
    MOMENT = 3  # from here on the step is at (a moment)


class Event(NamedTuple):
    """``subject`` is an index into the log's allocations, sizes or moments; ``label`` is a unit's, or None."""

    kind: Kind
    subject: int
    label: int | None = None


class Allocation(NamedTuple):
    """A piece of memory: an index into the log's sizes, the part of the estimate that it counts to, and its label."""

    size: int
    part: str
    label: int | None = None


@dataclass
class EventLog:
    """A step. ``sizes`` are bytes as asked for, before any rounding; ``moments`` are pairs of phase and place."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    moments: list[tuple[str, str]] = field(default_factory=list)


class _Step(NamedTuple):
    """What happens in every middle unit: an event, and which allocation it is about.

    A birth's is the one that has this ``twin`` in unit 1. A death's is of the first of its ``owners``, (twin in unit 1,
    distance of its unit from this one), that is there.
    """

    event: Event
    twin: int = 0
    owners: tuple[tuple[int, int], ...] = ()


class NotPeriodicError(Exception):
    """The middle units do not do the same: such a model has to be traced with all of them."""


def unfold(log: EventLog, count: int, axis: Axis = Axis.LAYER, period: int = 1) -> EventLog:
    """The log of the same step with ``count`` units on an axis, of which it has :data:`TRACED` (or none).

    ``count`` is at least 2. A unit is ``period`` layers, which moments count one by one. Raises NotPeriodicError where
    the two middle units differ.
    """
    assert count >= 2
    return log if count == TRACED else _Unfolding(log, count, axis, period).result()


def with_buckets(log: EventLog, size: int, part: str) -> EventLog:
    """The log with ``size`` bytes more, which are there from start to end in pieces of :data:`BUCKET_BYTES`."""
    pieces = [min(BUCKET_BYTES, size - start) for start in range(0, size, BUCKET_BYTES)]
    first = len(log.allocations)
    allocations = [Allocation(len(log.sizes) + index, part) for index in range(len(pieces))]
    births = [Event(Kind.BIRTH, first + index) for index in range(len(pieces))]
    start, *events = log.events
    return EventLog([*log.allocations, *allocations], [start, *births, *events], [*log.sizes, *pieces], log.moments)


def stretches(log: EventLog) -> list[list[Event]]:
    """The events, cut where the label changes."""
    return [list(events) for _, events in groupby(log.events, key=lambda event: event.label)]


def pairs(cut: Sequence[Sequence[Event]], axis: Axis) -> dict[int, bool]:
    """Indices of the first of two neighbouring stretches of the middle units, and whether the pair goes up.

    Raises NotPeriodicError where a stretch of a middle unit has no partner.
    """
    units = [axis.index(events[0].label) for events in cut]
    found: dict[int, bool] = {}
    index = 0
    while index < len(units):
        if units[index] in _MIDDLE:
            partner = units[index + 1] if index + 1 < len(units) else None
            if {units[index], partner} != set(_MIDDLE):
                raise NotPeriodicError
            found[index] = units[index] == _MIDDLE[0]
            index += 1
        index += 1
    return found


class _Unfolding:
    """One run of :func:`unfold`."""

    def __init__(self, log: EventLog, count: int, axis: Axis, period: int) -> None:
        self.log = log
        self.axis = axis
        self.period = period
        self.count = count
        self.last_middle = count - 2
        self.moments = {moment: index for index, moment in enumerate(log.moments)}
        self.allocations = [
            allocation if axis.index(allocation.label) is None else self._kept_allocation(allocation)
            for allocation in log.allocations
        ]
        self.events: list[Event] = []
        # An allocation → the unit it is born in; not always the unit it belongs to, since FSDP2 gathers ahead.
        self.born_in = {
            event.subject: unit
            for event in log.events
            if event.kind == Kind.BIRTH and (unit := axis.index(event.label)) is not None
        }
        self.twins: dict[int, int] = {}  # an allocation of a middle unit → its like in unit 1
        self.copies: dict[tuple[int, int], int] = {}  # (allocation of unit 1, unit) → allocation

    def result(self) -> EventLog:
        cut = stretches(self.log)
        found = pairs(cut, self.axis)
        index = 0
        while index < len(cut):
            if index in found:
                self._pair(cut[index], cut[index + 1], up=found[index])
                index += 2
            else:
                self.events += [self._kept(event) for event in cut[index]]
                index += 1
        events = self.events if self.count >= TRACED else list(_without_strangers(self.events, self.allocations))
        return EventLog(self.allocations, events, self.log.sizes, list(self.moments))

    def _moved(self, label: int | None) -> int | None:
        """Where a traced unit stands among all."""
        index = self.axis.index(label)
        return label if index is None or index < 2 else self.axis.label(index + self.count - TRACED)

    def _kept_allocation(self, allocation: Allocation) -> Allocation:
        return Allocation(allocation.size, allocation.part, self._moved(allocation.label))

    def _kept(self, event: Event) -> Event:
        index = self.axis.index(event.label)
        if index is None:
            return event
        if event.kind != Kind.MOMENT:
            return Event(event.kind, event.subject, self._moved(event.label))
        return self._moment(event, index, self.axis.index(self._moved(event.label)) or 0)

    def _pair(self, one: Sequence[Event], other: Sequence[Event], *, up: bool) -> None:
        if self.count < TRACED:  # of the middle only unit 1 is left, or nothing
            kept = one if up else other
            self.events += [self._kept(event) for event in kept] if self.count == TRACED - 1 else []
            return
        self._match(one, other)
        pattern = [self._step(first, second) for first, second in zip(one, other, strict=True)]
        middle = range(2, self.last_middle) if up else range(self.last_middle - 1, 1, -1)
        self.events += [self._neighbourly(self._kept(event), event) for event in one]
        for unit in middle:
            self.events += self._copy(pattern, unit)
        self.events += self._copy(pattern, self.last_middle if up else 1)

    def _neighbourly(self, kept: Event, traced: Event) -> Event:
        """An event of the first stretch, where it now stands: what dies in it may belong to another neighbour."""
        here, now = self.axis.index(traced.label), self.axis.index(kept.label)
        owner = self.born_in.get(traced.subject) if traced.kind == Kind.DEATH else None
        if owner is None or here is None or now is None or traced.subject not in self.twins:
            return kept
        subject = self.copies.get((self.twins[traced.subject], now + owner - here), kept.subject)
        return kept._replace(subject=subject)

    def _match(self, one: Sequence[Event], other: Sequence[Event]) -> None:
        """Note which allocation is whose twin; raises NotPeriodicError where the stretches are not alike."""
        if len(one) != len(other):
            raise NotPeriodicError
        for first, second in zip(one, other, strict=True):
            if first.kind != second.kind or self._size(first) != self._size(second):
                raise NotPeriodicError
            if first.kind == Kind.BIRTH:
                up = self.axis.index(first.label) == _MIDDLE[0]
                lower, upper = (first.subject, second.subject) if up else (second.subject, first.subject)
                self.twins[lower] = self.twins[upper] = lower
                self.copies[lower, 1] = lower
                self.copies[lower, self.last_middle] = upper

    def _size(self, event: Event) -> tuple[int, str] | int | None:
        if event.kind == Kind.MOMENT:
            return None
        if event.kind == Kind.SCRATCH:
            return event.subject
        allocation = self.log.allocations[event.subject]
        return allocation.size, allocation.part

    def _step(self, first: Event, second: Event) -> _Step:
        """What an event of the second stretch is in any unit; the first says what lies beyond the middle units."""
        if second.kind == Kind.BIRTH:
            return _Step(second, self.twins[second.subject])
        owners = []
        if second.kind == Kind.DEATH:
            for event in (second, first):
                owner = self.born_in.get(event.subject)
                here = self.axis.index(event.label)
                if owner in _MIDDLE and event.subject in self.twins and here is not None:
                    owners.append((self.twins[event.subject], owner - here))
        return _Step(second, owners=tuple(owners))

    def _copy(self, pattern: Sequence[_Step], unit: int) -> Iterator[Event]:
        """The second stretch as it runs in ``unit``."""
        label = self.axis.label(unit)
        birth, death, scratch = Kind.BIRTH, Kind.DEATH, Kind.SCRATCH
        copies, allocations = self.copies, self.allocations
        new = tuple.__new__  # tens of thousands are made, and the classes' own way takes twice as long
        for event, twin, owners in pattern:
            kind, subject, _ = event
            if kind is birth:
                number = copies.get((twin, unit))
                if number is None:
                    number = copies[twin, unit] = len(allocations)
                    size, part, _ = self.log.allocations[subject]
                    allocations.append(new(Allocation, (size, part, label)))
                yield new(Event, (birth, number, label))
            elif kind is death:
                for owner, distance in owners:
                    number = copies.get((owner, unit + distance))
                    if number is not None:
                        break
                else:
                    number = self._of_a_neighbour(event, label)
                yield new(Event, (death, number, label))
            elif kind is scratch:
                yield new(Event, (scratch, subject, label))
            else:
                yield self._moment(event, self.axis.index(event.label) or 0, unit)

    def _of_a_neighbour(self, event: Event, label: int) -> int:
        """What dies in the unit of this label though it is no middle unit's: the first's or the last's, next to it."""
        if self._moved(event.label) == label:
            return event.subject
        raise NotPeriodicError  # it dies in a unit and belongs to none

    def _moment(self, event: Event, traced: int, unit: int) -> Event:
        """A moment in a unit, under its own number."""
        phase, place = self.log.moments[event.subject]
        name, _, own = place.rpartition(" ")
        if self.axis.place(0).startswith(f"{name} ") and own.isdecimal():
            place = f"{name} {int(own) + self.period * (unit - traced)}"
        moment = (phase, place)
        number = self.moments.setdefault(moment, len(self.moments))
        return Event(Kind.MOMENT, number, self.axis.label(unit))


def _without_strangers(events: Sequence[Event], allocations: Sequence[Allocation]) -> Iterator[Event]:
    """Deaths of what was never born, since its unit was left out, become deaths of its like."""
    alive: dict[int, None] = {}
    for event in events:
        if event.kind == Kind.BIRTH:
            alive[event.subject] = None
            yield event
        elif event.kind == Kind.DEATH:
            lost = allocations[event.subject]
            subject = (
                event.subject
                if event.subject in alive
                else next(
                    number for number in alive if allocations[number][:2] == lost[:2] and allocations[number].label
                )
            )
            del alive[subject]
            yield event._replace(subject=subject)
        else:
            yield event
