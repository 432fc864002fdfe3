"""Writes down when each piece of memory comes to life and when it dies, while a step runs.

A dispatch mode sees every operator's outputs; a weak reference to a storage tells when it is gone. It works on fake
tensors, which have no data, as on real ones. What a kernel takes and returns within one operator it cannot see:
``scratch_bytes`` says how much that is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from trainkit.memory.event_log import Allocation, Event, EventLog, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

aten = torch.ops.aten

_WITH_BACKWARD = ("loss", "backward")


@dataclass
class _Piece:
    """An allocation under way: its part may be learned later than its birth."""

    nbytes: int
    part: str
    layer: int | None
    added_to: int | None = None  # for a sum of two gradients: the piece of the first
    alive: bool = True


class Tracker(TorchDispatchMode):
    """The mode. :meth:`moment` says where the step is, :meth:`own` what was there before it, :meth:`log` ends it."""

    def __init__(self, scratch_bytes: Callable[[Any, tuple[Any, ...]], int]) -> None:
        super().__init__()
        self._scratch_bytes = scratch_bytes
        self._pieces: list[_Piece] = []
        self._events: list[tuple[Kind, int, int | None]] = []
        self._moments: dict[tuple[str, str], int] = {}
        self._known: dict[int, int] = {}  # a storage's address → its piece
        self._references: dict[int, weakref.ref[Any]] = {}
        self._resize = torch.UntypedStorage.resize_
        self.phase = "start"
        self.place = ""
        self.layer: int | None = None
        self._next: tuple[str, str] | None = None

    def moment(self, phase: str, place: str, layer: int | None = None) -> None:
        """From here on the step is at ``place`` (which is in ``layer``, or in none)."""
        self.phase, self.place, self.layer, self._next = phase, place, layer, None
        index = self._moments.setdefault((phase, place), len(self._moments))
        self._events.append((Kind.MOMENT, index, layer))

    def moment_at_next_birth(self, phase: str, place: str) -> None:
        """The step goes to ``place`` with the next piece of memory: what dies until then belongs to what came before."""
        self._next = (phase, place)

    def own(self, tensor: torch.Tensor, part: str, layer: int | None) -> None:
        """Count ``tensor`` to ``part``, whether it is new here or was born unnoticed."""
        for storage in _storages(tensor):
            piece = self._known.get(_address(storage))
            if piece is None:
                self._birth(storage, part, layer)
            else:
                self._pieces[piece].part = part

    def log(self, layers: int) -> EventLog:
        """What happened, for a model of ``layers`` layers."""
        sizes: dict[int, int] = {}
        allocations = [
            Allocation(sizes.setdefault(piece.nbytes, len(sizes)), piece.part, piece.layer) for piece in self._pieces
        ]
        events = [
            Event(kind, sizes.setdefault(subject, len(sizes)) if kind == Kind.SCRATCH else subject, layer)
            for kind, subject, layer in _in_layer_order(self._accumulated_in_place())
        ]
        return EventLog(layers, allocations, events, list(sizes), list(self._moments))

    def __enter__(self) -> Tracker:
        tracker, resize = self, self._resize

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP2 frees and takes its unsharded weights by resizing, which no dispatch mode sees."""
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *arguments: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*arguments)

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
                        self._birth(storage, None, self._owner(args, index, len(leaves)), added_to=added_to)
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
            return self.layer
        if isinstance(args[0], torch.Tensor):
            return self._layer_of(args[0])
        if isinstance(args[0], list | tuple) and len(args[0]) == count > 1:
            return self._layer_of(args[0][index])
        return None

    def _layer_of(self, tensor: torch.Tensor) -> int | None:
        piece = self._piece_of(tensor)
        return None if piece is None else self._pieces[piece].layer

    def _piece_of(self, tensor: torch.Tensor) -> int | None:
        return next((self._known.get(_address(storage)) for storage in _storages(tensor)), None)

    def _birth(
        self, storage: torch.UntypedStorage, part: str | None, layer: int | None, *, added_to: int | None = None
    ) -> None:
        if self._next is not None:
            self.moment(*self._next)
            layer = None
        number, address = len(self._pieces), _address(storage)
        piece = _Piece(storage.nbytes(), part or self._part(), layer, added_to)
        self._pieces.append(piece)
        self._known[address] = number
        self._events.append((Kind.BIRTH, number, self.layer if self.layer is not None else layer))

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
            self._events.append((Kind.DEATH, number, self.layer if self.layer is not None else piece.layer))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        number = self._known.get(_address(storage))
        if number is None or self._pieces[number].nbytes == storage.nbytes():
            return
        piece = self._pieces[number]
        self._death(number)
        self._birth(storage, piece.part, piece.layer)

    def _accumulated_in_place(self) -> list[tuple[Kind, int, int | None]]:
        """The events, each sum of two gradients taking the place of the first where autograd would add in place.

        Under a dispatch mode it adds out of place always; in earnest it does so only where somebody else holds the
        first gradient (``can_accumulate_inplace`` in autograd/input_buffer.cpp). Where nobody does, that dies right
        after the sum is born; its death is put before.
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


def _in_layer_order(events: list[tuple[Kind, int, int | None]]) -> list[tuple[Kind, int, int | None]]:
    """The events, deaths that follow each other outside of any layer sorted: they come from unordered sets."""
    ordered: list[tuple[Kind, int, int | None]] = []
    within: int | None = None
    for kind, group in groupby(events, key=lambda event: event[0]):
        same = list(group)
        if kind == Kind.MOMENT:
            within = same[-1][2]
        if kind == Kind.DEATH and within is None:
            same.sort(key=lambda event: (event[2] is None, event[2] or 0, event[1]))
        ordered += same
    return ordered


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages under a tensor; a wrapper (DTensor) has those of its parts."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):
            yield from _storages(part)


def _address(storage: torch.UntypedStorage) -> int:
    return storage._cdata  # noqa: SLF001 - its only identity


def _is_distributed(kind: type) -> bool:
    return kind.__name__ == "DTensor"
