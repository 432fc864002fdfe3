"""The signals that end a command in good order: heeded from the first instruction on, and no more once it has ended.

A run takes them over while it trains (:mod:`trainkit.training.interruption`), a launcher while it starts and watches
processes (:mod:`trainkit.commands.launch`).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

# SIGUSR1 is SLURM's customary warning before the time limit; SIGHUP comes when a terminal is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
EXIT_RESUMABLE, EXIT_CTRL_C = 75, 130


class Signalled(KeyboardInterrupt):
    """One of :data:`SIGNALS` came: as Ctrl+C does, it ends whatever the command is at."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


def heeded() -> list[signal.Signals]:
    """Those of :data:`SIGNALS` that whoever called has not made this program ignore, as nohup does with SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def heed() -> None:
    """From now on each of :func:`heeded` raises Signalled."""
    for number in heeded():
        signal.signal(number, _raise)


def heed_no_more() -> None:
    """The command has ended and said how: nothing changes that any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def said_of(interrupt: KeyboardInterrupt) -> tuple[signal.Signals, int]:
    """Which signal it was, and the exit code for it."""
    received = interrupt.received if isinstance(interrupt, Signalled) else signal.SIGINT
    return received, EXIT_CTRL_C if received is signal.SIGINT else EXIT_RESUMABLE


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Signalled(signal.Signals(number))
