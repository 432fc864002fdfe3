"""A process that encodes data is killed, as the kernel does when memory runs out: tried again once, then exit 5."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from trainkit.data.workers import usable_cores

if TYPE_CHECKING:
    from tests.faults.conftest import Tally

EXAMPLES = 40_000
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "asks", "what", "it", "is", "then"]

pytestmark = pytest.mark.skipif(usable_cores() < 2, reason="one core encodes without further processes")


@pytest.fixture
def packing(tmp_path: Path, tiny_model_folder: Path) -> Packing:
    draw = random.Random(0)
    with (tmp_path / "train.jsonl").open("w") as file:
        for _ in range(EXAMPLES):
            text = " ".join(draw.choices(WORDS, k=draw.randrange(5, 120)))
            file.write(json.dumps({"text": text}) + "\n")
    return Packing(tmp_path, tiny_model_folder)


class Packing:
    """`pack-data` of one file, from the start to the end, whatever happens to its processes meanwhile."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        packing = ["pack-data", "--data", "train.jsonl", "--tokenizer", str(model)]
        self.command = [sys.executable, "-m", "trainkit", *packing]
        self.environment = {**os.environ, "TRAINKIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def start(self, output: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, "--output", output, "--force"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rows(self, output: str) -> dict[str, str]:
        """What lies in an output, by name."""
        root = self.folder / output
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.goal("a process that encodes data is killed: what it was at is encoded again, the rows are the same")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_what_a_killed_worker_encoded_is_encoded_again(packing: Packing, tally: Tally, kills: int) -> None:
    with packing.start("whole") as undisturbed:
        while not workers_of(undisturbed):
            assert undisturbed.poll() is None
            time.sleep(0.002)
        begun = time.monotonic()
        while workers_of(undisturbed):
            time.sleep(0.002)
        encoding_seconds = time.monotonic() - begun
        _, said = undisturbed.communicate()
    assert undisturbed.returncode == 0, said
    draw = random.Random(1)
    warned = 0
    for number in range(kills):
        output = f"disturbed-{number}"
        with packing.start(output) as disturbed:
            while not (workers := workers_of(disturbed)):
                assert disturbed.poll() is None
                time.sleep(0.002)
            time.sleep(draw.uniform(0, encoding_seconds))
            one = draw.choice(workers_of(disturbed) or workers)
            with suppress(psutil.NoSuchProcess):
                one.kill()
            report, said = disturbed.communicate()
        problems = [] if disturbed.returncode == 0 else [f"exit {disturbed.returncode}: {said}"]
        warned += "was killed, most likely because memory ran out" in report
        if packing.rows(output) != packing.rows("whole"):
            problems.append("other rows")
        tally.count(output, problems)
    assert warned >= kills // 5  # the others were at their end already
    tally.note(at_least=kills)


def test_workers_that_are_killed_again_end_it_with_one_line_and_exit_5(packing: Packing) -> None:
    with packing.start("never") as disturbed:
        while disturbed.poll() is None:
            for worker in workers_of(disturbed):
                worker.kill()
            time.sleep(0.002)
        _, said = disturbed.communicate()
    assert disturbed.returncode == 5
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert len(lines[0]) <= 200
    assert "free some, or give the program fewer processors (taskset -c 0)" in lines[0]
    assert "Traceback" not in said
    assert packing.rows("never") == {}
