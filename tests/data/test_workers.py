from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from trainkit.data.workers import FEW_ITEMS, in_order
from trainkit.errors import DataError, MachineError


def no_warning(line: str) -> None:
    raise AssertionError(line)


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))
    return number * number, os.getpid()


def test_results_come_in_order_and_from_other_processes() -> None:
    results = list(in_order(slow_square, range(20), 3, no_warning))
    assert [square for square, _ in results] == [number * number for number in range(20)]
    processes = {process for _, process in results}
    assert os.getpid() not in processes
    assert len(processes) > 1


@pytest.mark.parametrize(("items", "workers"), [(FEW_ITEMS, 4), (10, 1), (0, 4)])
def test_few_items_or_one_core_need_no_process(items: int, workers: int) -> None:
    results = list(in_order(slow_square, range(items), workers, no_warning))
    assert [square for square, _ in results] == [number * number for number in range(items)]
    assert {process for _, process in results} <= {os.getpid()}


def refuse_seven(number: int) -> int:
    if number == 7:
        raise DataError("x.jsonl:7: broken")
    return number


def test_an_error_comes_in_its_turn() -> None:
    found = []
    with pytest.raises(DataError, match=r"^x\.jsonl:7: broken$"):  # noqa: PT012 - what came before counts
        for number in in_order(refuse_seven, range(20), 2, no_warning):
            found.append(number)  # noqa: PERF402 - extend would keep nothing of an iterator that raises
    assert found == list(range(7))


def test_items_are_taken_as_they_are_needed() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield number

    results = in_order(refuse_seven, items(), 2, no_warning)
    assert next(results) == 0
    assert taken < 20
    assert isinstance(results, Generator)
    results.close()


def say_and_sleep(number: int) -> int:
    if number:
        time.sleep(60)
    return number


def test_who_stops_early_does_not_wait_for_what_is_under_way() -> None:
    results = in_order(say_and_sleep, range(20), 2, no_warning)
    assert next(results) == 0
    workers = [process.pid for process in multiprocessing.active_children()]
    assert workers
    begun = time.monotonic()
    assert isinstance(results, Generator)
    results.close()
    assert time.monotonic() - begun < 30
    assert not [worker for worker in workers if worker and is_running(worker)]


class Killer:
    """The identity, in a worker that the kernel kills on ``deadly`` items, each as often as it has lives."""

    def __init__(self, folder: Path, deadly: dict[int, int]) -> None:
        self.folder = folder
        self.deadly = deadly

    def __call__(self, number: int) -> int:
        deaths = len(list(self.folder.glob(f"{number}-*")))
        if deaths < self.deadly.get(number, 0):
            (self.folder / f"{number}-{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number


@pytest.mark.parametrize("deadly", [{0: 1}, {5: 1}, {19: 1}, {5: 1, 18: 1}], ids=str)
def test_what_a_killed_worker_was_at_is_done_again_by_fewer(tmp_path: Path, deadly: dict[int, int]) -> None:
    said: list[str] = []
    assert list(in_order(Killer(tmp_path, deadly), range(20), 2, said.append)) == list(range(20))
    assert len(said) == len(deadly)
    assert "was killed, most likely because memory ran out" in said[0]
    assert "by one process from here on" in said[0]
    assert not multiprocessing.active_children()


def test_a_worker_killed_again_at_the_same_items_is_named_as_lack_of_memory(tmp_path: Path) -> None:
    said: list[str] = []
    found = []
    with pytest.raises(MachineError, match="most likely because memory ran out"):  # noqa: PT012 - what came before counts
        for number in in_order(Killer(tmp_path, {15: 2}), range(20), 4, said.append):
            found.append(number)  # noqa: PERF402 - extend would keep nothing of an iterator that raises
    assert found == list(range(len(found)))
    assert len(found) <= 15
    assert len(said) == 1
    assert not multiprocessing.active_children()


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from trainkit.data.workers import in_order\n"
        'def work(number):\n    os.write(1, b"%d\\n" % os.getpid())\n    time.sleep(60)\n'
        "list(in_order(work, range(9), 2, print))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    until = time.monotonic() + 10
    while alive := [worker for worker in workers if is_running(worker)]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False
