"""Signals that ask a run to stop: at once where nothing is lost, else as a flag that the loop looks at."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from trainkit.signals import heeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, TracebackType


class Interruption:
    """While entered, each of ``SIGNALS`` raises KeyboardInterrupt, and ``received`` says which it was.

    One that is ignored, as SIGHUP is under nohup, stays ignored. Inside :meth:`deferring` the first one only sets
    ``received``; a second SIGINT stops at once.

    Works in the main thread only, as Python's signal handlers do. ``on_first`` is called with the first deferred signal
    from inside the handler, so that it must not use what the interrupted code may hold: no buffered stream, no lock.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None]) -> None:
        self._on_first = on_first
        self._deferring = False
        self._ctrl_c = 0
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in heeded():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # what signal.signal itself returned

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """What runs here looks at :meth:`requested` often, and has something to save."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """In here a signal ends the process without a word, even while a library waits and lets no handler run."""
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)
        try:
            yield
        finally:
            for number in self._previous:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        before, self.received = self.received, signal.Signals(number)
        self._ctrl_c += self.received is signal.SIGINT
        if not self._deferring or (self.received is signal.SIGINT and self._ctrl_c > 1):
            raise KeyboardInterrupt
        if before is None:
            self._on_first(self.received)
        else:
            self.received = before

    def requested(self) -> bool:
        """Whether a signal came."""
        return self.received is not None
