"""A function over a stream of items on all cores, its results in the order of the items.

Workers are forks: what the function needs is there already and is not sent. They do arithmetic, text and pipes only, so
whatever other threads the parent has, none of their locks is needed in a worker.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from trainkit.errors import MachineError
from trainkit.signals import heeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AHEAD = 2
"""Items that wait for each worker; with those that are worked on they bound the memory."""
FEW_ITEMS = 2
"""So few are not worth a process."""
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h

_function_of_worker: Callable[[Any], Any] | None = None


def usable_cores() -> int:
    """Processors that this process may run on; 1 where processes cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, warn: Callable[[str], None]
) -> Iterator[Result]:
    """``function`` of every item, computed by up to ``workers`` processes; here where there are few items.

    What the function raises is raised in the item's turn. When a worker is killed, half as many go on from the first
    item whose result is not out yet, which ``warn`` is told. Raises MachineError when that happens to an item again.
    """
    items = iter(items)
    first = list(itertools.islice(items, FEW_ITEMS + 1))
    if workers < 2 or len(first) <= FEW_ITEMS:
        yield from map(function, itertools.chain(first, items))
        return
    coming = itertools.chain(first, items)
    taken: deque[Item] = deque()
    again = 0  # items in turn that were under way when a worker was killed
    while True:
        coming, taken = itertools.chain(taken, coming), deque()
        results: deque[Future[Result]] = deque()
        try:
            with _pool(function, workers) as pool:
                while True:
                    for item in itertools.islice(coming, workers * (1 + ITEMS_AHEAD) - len(results)):
                        taken.append(item)
                        with _forking_quietly():
                            results.append(pool.submit(_call, item))
                    if not results:
                        return
                    result = results.popleft().result()
                    taken.popleft()
                    again -= 1
                    yield result
        except BrokenProcessPool as error:
            if again > 0:
                raise MachineError(
                    "a process that encodes data was killed, and so was the next one at the same examples, most likely "
                    "because memory ran out; free some, or give the program fewer processors (taskset -c 0)"
                ) from error
            again, workers = len(taken), max(1, workers // 2)
            warn(
                "warning: a process that encodes data was killed, most likely because memory ran out; what was under "
                f"way is encoded again, by {'one process' if workers == 1 else f'{workers} processes'} from here on"
            )


@contextmanager
def _pool(function: Callable[[Any], Any], workers: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(function, os.getpid()),
    )
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        # Nobody waits for what they are at, and that may take minutes.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _forking_quietly() -> Iterator[None]:
    """Python warns of forks beside threads, and tokenizers of forks after its own; neither is used in the workers."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """What a worker does first: it leaves Ctrl+C to its parent, and does not outlive it."""
    global _function_of_worker  # noqa: PLW0603 - an executor's worker has no other place for it
    _function_of_worker = function
    gc.disable()  # looking for cycles would copy the parent's pages, and a worker makes next to none
    for one in heeded():
        signal.signal(one, signal.SIG_IGN if one is signal.SIGINT else signal.SIG_DFL)
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _call(item: Any) -> Any:
    assert _function_of_worker is not None
    return _function_of_worker(item)
