"""A process of a run that does not answer any more is found by the others, named, and ends the run.

One that crashes is noticed at once: its connections close. One that is stopped, hangs in the kernel, or was on a
machine that has lost its power closes nothing, and whoever waits for it in a collective waits for long. A short limit
for collectives would be wrong: one process may save or evaluate for minutes while another waits for it.

So each process has a thread that raises a number of its own every few seconds, whatever the process does otherwise. The
numbers lie in a store of torch's that the first process keeps; connection and server are not those of the collectives.
Each looks at the number of the process behind it, the last at that of the first, so that the work does not grow with
their number. If it has not changed in many looks, the silent process is named in the store; all the others read
that, say it, and end. If the store itself does not answer, it is the first process that is silent.

Looks are counted, not seconds: a process that was itself stopped for an hour, or a machine that was suspended, blames
nobody when it goes on. The clocks of two machines are never compared.

What holds Python's lock for longer than :data:`SILENT_SECONDS` would be taken for silent. What waits for a disk, a
network or a device, and a loop that never ends, is not: the limit of the collectives is for those.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch

from trainkit.errors import LostProcessError
from trainkit.launched import address_towards, launched
from trainkit.training.processes import any_of, from_first, gathered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator

BEAT_SECONDS = 5.0
SILENT_SECONDS = 90.0
CONNECTING_SECONDS = 60.0
CLOCK_SECONDS = 2.0  # two processes may reckon the start of a third that far apart, where the clock is being set
LEFT = 2**40  # added to the number of a process that has done its part
SILENT = "silent"  # the key of the rank that was found


class Store(Protocol):
    """What is used of a store of torch's; every call waits for the answer of the server."""

    def add(self, key: str, number: int, /) -> int:
        """Add to a number, 0 where there was none; returns the sum."""

    def set(self, key: str, value: str, /) -> None:
        """Keep a value."""

    def get(self, key: str, /) -> bytes:
        """The value that is kept."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all are there."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a process of the run is; ``began`` tells it from a later one with the same id."""

    host: str
    process_id: int
    began: float

    @classmethod
    def of_this_process(cls) -> Whereabouts:
        """Host, id and start of the process that asks."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def kill_if_here(self) -> None:
        """End the process if it is on this machine; a stopped one obeys no other signal, and its launcher waits."""
        with suppress(psutil.Error):
            process = psutil.Process(self.process_id)
            same_start = abs(process.create_time() - self.began) < CLOCK_SECONDS
            if self.host == socket.gethostname() and same_start:
                process.kill()


@contextmanager
def heartbeats(accelerator: Accelerator, say: Callable[[str], None], warn: Callable[[str], None]) -> Iterator[None]:
    """In here a process that does not answer ends the run, with exit code 75; every process must enter.

    ``say`` gets the line that names it, in a thread of its own and while the main one may be in the middle of anything;
    ``warn`` is told where processes cannot reach the store, so that none of this is there.
    """
    if accelerator.num_processes == 1:
        yield
        return
    store = _shared_store(accelerator)
    own = json.dumps(asdict(Whereabouts.of_this_process())).encode()
    everyone = [Whereabouts(**json.loads(one)) for one in gathered(accelerator, own)]
    if any_of(accelerator, store is None) or store is None:
        warn("the processes cannot open a further connection, so that one that hangs is noticed late")
        yield
        return
    beating = Heartbeats(store, everyone, accelerator.process_index, say)
    beating.begin()
    yield  # what fails needs no farewell: its connections close
    beating.leave()


def _shared_store(accelerator: Accelerator) -> Store | None:
    """A store in the first process, and a connection to it in the others; None where that fails."""
    store: Any = None
    place, make = None, torch.distributed.TCPStore  # type: ignore[attr-defined] # in C++, without a stub
    timeout = timedelta(seconds=CONNECTING_SECONDS)
    if accelerator.is_main_process:
        with suppress(RuntimeError, OSError):
            host = _own_address()
            store = make(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            place = (host, store.port)
    place = from_first(accelerator, place)
    if place is not None and store is None:
        with suppress(RuntimeError, OSError):
            host, port = place
            store = make(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    found: Store | None = store
    return found


def _own_address() -> str:
    """An address of this machine that the other processes reach."""
    meeting, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
    own = address_towards(meeting, port)
    # A host's own name may stand for its loopback there, and for its address elsewhere.
    is_loopback = own is None or own.startswith("127.") or own == "::1"
    several_machines = launched().local_processes < launched().processes
    return meeting if own is None or (is_loopback and several_machines) else own


class Heartbeats:
    """The beating of one process, and its look at the next one; see the module.

    ``everyone`` is where the processes are, by rank. ``end`` ends this process at once with an exit code.
    """

    def __init__(
        self,
        store: Store,
        everyone: Sequence[Whereabouts],
        rank: int,
        say: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._store = store
        self._everyone = everyone
        self._rank = rank
        self._say = say
        self._end = end
        self._leaving = threading.Event()
        self._over = threading.Event()  # nobody is to be looked at any more
        self._answers = 0
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._waiting = threading.Thread(target=self._look_at_store, name="heartbeat store", daemon=True)

    def begin(self) -> None:
        """Beat from now on."""
        self._beating.start()
        if self._rank:  # the first process keeps the store itself
            self._waiting.start()

    def leave(self) -> None:
        """Tell the others that this process has done its part, and stop; returns when they can know it."""
        self._leaving.set()
        self._beating.join()

    def _beat(self) -> None:
        following = (self._rank + 1) % len(self._everyone)
        before, unchanged = -1, 0
        try:
            while not self._leaving.wait(BEAT_SECONDS):
                self._store.add(str(self._rank), 1)
                number = self._store.add(str(following), 0)
                if self._store.check([SILENT]):
                    self._end_for(int(self._store.get(SILENT)))
                    return
                self._answers += 1
                unchanged = unchanged + 1 if number == before and number < LEFT else 0
                before = number
                if unchanged * BEAT_SECONDS >= SILENT_SECONDS:
                    self._store.set(SILENT, str(following))
            self._store.add(str(self._rank), LEFT)
        except RuntimeError:
            pass  # the first process has ended: well, or with a message of its own, or killed, which the launcher says
        finally:
            self._over.set()

    def _look_at_store(self) -> None:
        before, unchanged = -1, 0
        while not self._over.wait(BEAT_SECONDS):
            unchanged = unchanged + 1 if self._answers == before else 0
            before = self._answers
            if unchanged * BEAT_SECONDS >= SILENT_SECONDS:
                self._end_for(0)
                return

    def _end_for(self, rank: int) -> None:
        """Say which process is silent, and end this one; nothing that is being saved minds."""
        silent = self._everyone[rank]
        try:
            self._say(
                f"process {rank} (pid {silent.process_id} on {silent.host}) has not answered for {SILENT_SECONDS:g} "
                "seconds, it hangs or its machine does; the same command continues from the newest checkpoint"
            )
            time.sleep(BEAT_SECONDS)  # until all have read it: once one ends, the others know no more than that
            silent.kill_if_here()
        finally:
            self._end(LostProcessError.exit_code)
