"""Writes down when each piece of memory comes to life and when it dies, while a step runs.

A dispatch mode sees every operator's outputs; a weak reference to a storage tells when it is gone. It works on fake
tensors, which have no data, as on real ones. What a kernel takes and returns within one operator it cannot see:
``scratch_bytes`` says how much that is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from trainkit.memory.event_log import Allocation, Event, EventLog, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

aten = torch.ops.aten

_COLLECTIVE = ("fsdp", "c10d", "_c10d_functional")  # namespaces of operators between processes
_WITH_BACKWARD = ("loss", "backward")


@dataclass
class _Piece:
    """An allocation under way: its part may be learned later than its birth."""

    nbytes: int
    part: str
    label: int | None
    added_to: int | None = None  # for a sum of two gradients: the piece of the first
    alive: bool = True


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode. :meth:`moment` says where the step is, :meth:`own` what was there before it, :meth:`log` ends it."""

    def __init__(self, scratch_bytes: Callable[[Any, tuple[Any, ...]], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch_bytes = scratch_bytes
        self._pieces: list[_Piece] = []
        self._events: list[tuple[Kind, int, int | None]] = []
        self._moments: dict[tuple[str, str], int] = {}
        self._known: dict[int, int] = {}  # a storage's address → its piece
        self._references: dict[int, weakref.ref[Any]] = {}
        self._resize = torch.UntypedStorage.resize_
        self.phase = "start"
        self.place = ""
        self.label: int | None = None
        self._next: tuple[str, str] | None = None

    def moment(self, phase: str, place: str, label: int | None = None) -> None:
        """From here on the step is at ``place``; ``label`` is of the layer or the chunk that it is in, if any."""
        self.phase, self.place, self.label, self._next = phase, place, label, None
        index = self._moments.setdefault((phase, place), len(self._moments))
        self._events.append((Kind.MOMENT, index, label))

    def moment_at_next_birth(self, phase: str, place: str) -> None:
        """The step goes to ``place`` with the next piece: what dies until then belongs to what came before."""
        self._next = (phase, place)

    def own(self, tensor: torch.Tensor, part: str, label: int | None) -> None:
        """Count ``tensor`` to ``part``, whether it is new here or was born unnoticed."""
        for storage in _storages(tensor):
            piece = self._known.get(_address(storage))
            if piece is None:
                self._birth(storage, part, label)
            else:
                self._pieces[piece].part = part

    def log(self) -> EventLog:
        """What happened."""
        sizes: dict[int, int] = {}
        allocations = [
            Allocation(sizes.setdefault(piece.nbytes, len(sizes)), piece.part, piece.label) for piece in self._pieces
        ]
        events = [
            Event(kind, sizes.setdefault(subject, len(sizes)) if kind == Kind.SCRATCH else subject, label)
            for kind, subject, label in self._in_order(self._accumulated_in_place())
        ]
        return EventLog(allocations, events, list(sizes), list(self._moments))

    def __enter__(self) -> Self:
        tracker, resize = self, self._resize

        def watched(storage: Any, size: int) -> Any:
            """FSDP2 frees and takes its unsharded weights by resizing, which no dispatch mode sees."""
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign,assignment]
        return super().__enter__()  # type: ignore[no-any-return,no-untyped-call]

    def __exit__(self, *arguments: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*arguments)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; its new storages are born."""
        if any(_is_distributed(kind) for kind in types):
            return NotImplemented  # a DTensor turns into operators on its local part first
        out = func(*args, **(kwargs or {}))
        adds = func is aten.add.Tensor and self.phase in _WITH_BACKWARD and not torch.is_grad_enabled()
        added_to = self._piece_of(args[0]) if adds else None
        leaves = [out] if isinstance(out, torch.Tensor) else tree_leaves(out)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                for storage in _storages(leaf):
                    if _address(storage) not in self._known:
                        part = "sharding buffers" if func.namespace in _COLLECTIVE else None
                        self._birth(storage, part, self._owner(args, index, len(leaves)), added_to=added_to)
        if scratch := self._scratch_bytes(func, args):  # kernels make room for their outputs first
            self._events.append((Kind.SCRATCH, scratch, self._owner(args, 0, 1)))
        return out

    def _part(self) -> str:
        """What a new piece counts to. In the backward pass, layers that run again work with gradients switched on."""
        if self.phase == "loss":
            return "logits and loss"
        recomputed = self.phase == "backward" and torch.is_grad_enabled()
        return "activations" if self.phase == "forward" or recomputed else "temporary buffers"

    def _owner(self, args: tuple[Any, ...], index: int, count: int) -> int | None:
        """The layer of an operator's output: where the step is; in the optimizer, of the weight that it is about.

        A list operator's outputs belong to its inputs one by one, its single output (a stack, a norm) to no layer.
        """
        if self.phase != "optimizer" or not args:
            return self.label
        if isinstance(args[0], torch.Tensor):
            return self._label_of(args[0])
        if isinstance(args[0], list | tuple) and len(args[0]) == count > 1:
            return self._label_of(args[0][index])
        return None

    def _label_of(self, tensor: torch.Tensor) -> int | None:
        piece = self._piece_of(tensor)
        return None if piece is None else self._pieces[piece].label

    def _piece_of(self, tensor: torch.Tensor) -> int | None:
        return next((self._known.get(_address(storage)) for storage in _storages(tensor)), None)

    def _birth(
        self, storage: torch.UntypedStorage, part: str | None, label: int | None, *, added_to: int | None = None
    ) -> None:
        if self._next is not None:
            self.moment(*self._next)
            label = None
        number, address = len(self._pieces), _address(storage)
        piece = _Piece(storage.nbytes(), part or self._part(), label, added_to)
        self._pieces.append(piece)
        self._known[address] = number
        self._events.append((Kind.BIRTH, number, self.label if self.label is not None else label))

        def dead(_: object) -> None:
            if self._known.get(address) == number:
                del self._known[address]
            self._references.pop(number, None)
            self._death(number)

        self._references[number] = weakref.ref(storage, dead)

    def _death(self, number: int) -> None:
        piece = self._pieces[number]
        if piece.alive:
            piece.alive = False
            self._events.append((Kind.DEATH, number, self.label))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        number = self._known.get(_address(storage))
        if number is None or self._pieces[number].nbytes == storage.nbytes():
            return
        label = self._pieces[number].label
        self._death(number)
        self._birth(storage, "sharding buffers", label)

    def _accumulated_in_place(self) -> list[tuple[Kind, int, int | None]]:
        """The events, each sum of two gradients taking the place of the first where autograd would add in place.

        Under a dispatch mode autograd adds out of place always. Without one it adds in place, unless somebody else
        holds the first gradient (``can_accumulate_inplace`` in autograd/input_buffer.cpp). Where nobody does, that
        gradient dies right after the sum is born; its death is put before.
        """
        events = list(self._events)
        for index, (kind, number, _) in enumerate(events):
            if kind != Kind.BIRTH or (first := self._pieces[number].added_to) is None:
                continue
            for later in range(index + 1, min(index + 4, len(events))):
                if events[later][:2] == (Kind.DEATH, first):
                    events.insert(index, events.pop(later))
                    break
        return events

    def _in_order(self, events: list[tuple[Kind, int, int | None]]) -> Iterator[tuple[Kind, int, int | None]]:
        """The events, deaths that follow each other labelled and sorted: some come from unordered sets."""
        here: int | None = None
        for kind, group in groupby(events, key=lambda event: event[0]):
            same = list(group)
            if kind == Kind.MOMENT:
                here = same[-1][2]
            if kind == Kind.DEATH:
                yield from self._labelled(same, here)
            else:
                yield from same

    def _labelled(
        self, deaths: list[tuple[Kind, int, int | None]], here: int | None
    ) -> Iterator[tuple[Kind, int, int | None]]:
        """Deaths that follow each other: first those of the place, then the others by owner.

        A layer's pieces, and those of the layer before or after it, die as its own doing, also where one of a chunk of
        the loss dies with them. What many layers lose at once, or a layer within a chunk, each loses itself.
        """
        owners = {number: self._pieces[number].label for _, number, _ in deaths}
        mates = {
            owner for owner in owners.values() if owner is not None and here is not None and _are_alike(owner, here)
        }
        near = here is not None and all(abs(owner - here) <= 1 for owner in mates)
        alone = near and all(owner is None or owner in mates for owner in owners.values())
        own = [
            (kind, number, here)
            for kind, number, _ in deaths
            if here is not None and (alone or owners[number] == here or (near and owners[number] in mates))
        ]
        taken = {number for _, number, _ in own}
        others = [(kind, number, owners[number]) for kind, number, _ in deaths if number not in taken]
        yield from sorted(own)
        yield from sorted(others, key=lambda event: (event[2] is None, event[2] or 0, event[1]))


def _are_alike(one: int, other: int) -> bool:
    """Whether two labels are of one axis."""
    return (one < 0) == (other < 0)


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages under a tensor; a wrapper (DTensor) has those of its parts."""
    wrapper: Any = tensor  # how it shows its parts has no types
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor.untyped_storage()
        return
    for name in wrapper.__tensor_flatten__()[0]:
        part = getattr(wrapper, name)
        if isinstance(part, torch.Tensor):
            yield from _storages(part)


def _address(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - its only identity


def _is_distributed(kind: type) -> bool:
    return kind.__name__ == "DTensor"
