"""strace on a process that waits for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.forks import Forks, Outcome


def traced(forks: Forks, waiting: Outcome, folder: Path, options: Sequence[str]) -> tuple[Outcome, str]:
    """What became of a job that was begun with ``wait_for_tracer``, and what strace wrote of it.

    Skips where strace is not installed, or may not look into another process.
    """
    assert waiting.code is None, waiting.said
    log = folder / "strace.txt"
    program = shutil.which("strace")
    if program is None:
        _end(forks, waiting)
        pytest.skip("strace is not installed")
    command = [program, "-f", "-qq", "-o", str(log), *options, "-p", str(waiting.pid)]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "TracerPid:\t0" in Path(f"/proc/{waiting.pid}/status").read_text():
        if strace.poll() is not None:
            _end(forks, waiting)
            pytest.skip(f"strace may not attach here: {strace.communicate()[1].strip()}")
        time.sleep(0.002)
    os.kill(waiting.pid, signal.SIGCONT)
    ended = forks.rest_of(waiting)
    strace.communicate(timeout=60)
    return ended, log.read_text()


def _end(forks: Forks, waiting: Outcome) -> None:
    os.kill(waiting.pid, signal.SIGKILL)
    forks.rest_of(waiting)
