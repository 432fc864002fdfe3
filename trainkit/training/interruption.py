"""Signals that ask a run to stop, turned into a flag that the loop looks at between micro-batches."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1 is SLURM's customary warning before the time limit


class Interruption:
    """While entered, the first SIGTERM, SIGINT or SIGUSR1 sets ``received``; a second SIGINT stops at once.

    Works in the main thread only, as Python's signal handlers do. ``on_first`` is called with the first signal from
    inside the handler, so that it must not use what the interrupted code may hold: no buffered stream, no lock.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None]) -> None:
        self._on_first = on_first
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # what signal.signal itself returned

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.received is None
        self.received = signal.Signals(number)
        if first:
            self._on_first(self.received)

    def requested(self) -> bool:
        """Whether a signal came."""
        return self.received is not None
