"""Processes that beat, in one process: each is a thread with a store that all of them share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from trainkit.training import heartbeats
from trainkit.training.heartbeats import SILENT, Heartbeats, Store, Whereabouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLACES = [Whereabouts("elsewhere", 100 + rank, 0.0) for rank in range(4)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeats, "SILENT_SECONDS", 0.4)


class Shared:
    """A store whose server does not answer while it is ``silent``."""

    def __init__(self) -> None:
        self.kept: dict[str, int | str] = {}
        self.lock = threading.Lock()
        self.silent = False
        self.calls = 0

    def add(self, key: str, number: int, /) -> int:
        self.calls += 1
        while self.silent:
            time.sleep(0.01)
        return self.raise_by(key, number)

    def raise_by(self, key: str, number: int) -> int:
        with self.lock:
            self.kept[key] = value = int(self.kept.get(key, 0)) + number
        return value

    def set(self, key: str, value: str, /) -> None:
        self.kept[key] = value

    def get(self, key: str, /) -> bytes:
        return str(self.kept[key]).encode()

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.kept for key in keys)


class Beating:
    """One process of four, and what it said and ended with."""

    def __init__(self, store: Store, rank: int) -> None:
        self.said: list[str] = []
        self.ended: list[int] = []
        self.beats = Heartbeats(store, PLACES, rank, self.said.append, self.ended.append)
        self.beats.begin()


@pytest.fixture
def store() -> Iterator[Shared]:
    store = Shared()
    yield store
    store.silent = False
    store.set(SILENT, "0")  # whoever still beats ends


def wait_until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_nobody_is_silent(store: Shared) -> None:
    run = [Beating(store, rank) for rank in range(4)]
    time.sleep(1.2)
    assert not any(one.said or one.ended for one in run)
    for one in run:
        one.beats.leave()
    assert not any(one.said or one.ended for one in run)


@pytest.mark.parametrize("silent", [0, 1, 3])
def test_all_others_name_the_one_that_never_beats(store: Shared, silent: int) -> None:
    run = [Beating(store, rank) for rank in range(4) if rank != silent]
    wait_until(lambda: all(one.ended for one in run))
    for one in run:
        assert one.ended == [75]
        [line] = one.said
        assert line.startswith(f"process {silent} (pid {100 + silent} on elsewhere) has not answered for 0.4 seconds")
        assert len(line) <= 200


def test_a_machine_with_several_is_named_by_its_first(store: Shared) -> None:
    run = [Beating(store, rank) for rank in (0, 1)]
    wait_until(lambda: all(one.ended for one in run))
    assert all(one.said[0].startswith("process 2 ") for one in run)


def test_one_that_has_done_its_part_may_be_silent(store: Shared) -> None:
    run = [Beating(store, rank) for rank in range(4)]
    for one in run[1:]:
        one.beats.leave()
    time.sleep(1.2)
    assert not run[0].said
    run[0].beats.leave()


def test_without_an_answer_from_the_store_the_first_process_is_silent(store: Shared) -> None:
    run = [Beating(store, rank) for rank in range(4)]
    wait_until(lambda: store.calls > 20)
    store.silent = True
    wait_until(lambda: all(one.ended for one in run[1:]))
    assert all(one.said[0].startswith("process 0 ") for one in run[1:])
    assert not run[0].said


def test_time_in_which_nobody_looked_does_not_count(store: Shared) -> None:
    """As after a machine was suspended: the last beat was long ago, and there was no look that found nothing new."""
    first = Beating(store, 0)
    for _ in range(10):
        store.raise_by("1", 1)
        time.sleep(0.02)
    store.silent = True
    time.sleep(1.0)
    store.silent = False
    time.sleep(0.2)
    store.raise_by("1", heartbeats.LEFT)
    time.sleep(0.6)
    assert not first.said
    first.beats.leave()


def test_a_store_that_is_gone_is_no_verdict() -> None:
    """The first process has ended, which is for others to explain."""
    make = torch.distributed.TCPStore  # type: ignore[attr-defined] # in C++, without a stub
    servers = [make("localhost", 0, is_master=True, wait_for_workers=False)]
    port, soon = servers[0].port, timedelta(seconds=5)
    one = Beating(make("localhost", port, is_master=False, wait_for_workers=False, timeout=soon), 1)
    wait_until(lambda: servers[0].add("1", 0) > 3)
    servers.clear()
    one.beats._beating.join(timeout=5)
    time.sleep(0.6)
    assert not one.said
    assert not one.beats._waiting.is_alive()


def test_only_the_very_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        own = Whereabouts.of_this_process()
        there = replace(own, process_id=child.pid, began=psutil.Process(child.pid).create_time())
        replace(there, host="elsewhere").kill_if_here()
        replace(there, began=there.began - 60).kill_if_here()
        time.sleep(0.1)
        assert child.poll() is None
        os.kill(child.pid, 19)  # SIGSTOP
        there.kill_if_here()
        assert child.wait(timeout=10) == -9
    there.kill_if_here()  # it is gone
