"""What the environment says of a launch, and which of several processes says why they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from trainkit.launched import AGENTS_FILE, OUR_LAUNCHER, first_exit_code, is_first_to_fail

if TYPE_CHECKING:
    from pathlib import Path

ASKED = "from trainkit.launched import is_first_to_fail; print(is_first_to_fail(3))"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files, for the processes that a test starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """What torch's agent makes for an attempt of two processes."""
    for rank in ("0", "1"):
        (tmp_path / "none_a1b2" / "attempt_0" / rank).mkdir(parents=True)
    return tmp_path / "none_a1b2" / "attempt_0"


def of_agent(attempt: Path, rank: int) -> dict[str, str]:
    return {"WORLD_SIZE": "2", "RANK": str(rank), AGENTS_FILE: str(attempt / str(rank) / "error.json")}


def starts(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ASKED], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def is_first(environment: dict[str, str]) -> bool:
    return starts(environment).communicate()[0] == "True\n"


def test_without_a_launcher_every_command_says_why_it_fails(temporary: Path) -> None:
    """WORLD_SIZE may have been left in a shell, from which one command after another is started."""
    assert [is_first({"WORLD_SIZE": "2"}) for _ in range(2)] == [True, True]
    assert list(temporary.iterdir()) == []


def test_of_the_processes_of_an_agent_one_speaks(attempt: Path, temporary: Path) -> None:
    together = [starts(of_agent(attempt, rank)) for rank in (0, 1)]
    assert sorted(process.communicate()[0] for process in together) == ["False\n", "True\n"]
    assert list(temporary.iterdir()) == []


def test_whoever_has_spoken_is_not_the_first_again(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in of_agent(attempt, 1).items():
        monkeypatch.setenv(name, value)
    assert [is_first_to_fail(5), is_first_to_fail(5)] == [True, False]


def test_an_attempt_has_a_message_of_its_own(attempt: Path) -> None:
    again = attempt.with_name("attempt_1")
    (again / "1").mkdir(parents=True)
    assert [is_first(of_agent(attempt, 0)), is_first(of_agent(again, 1))] == [True, True]


def test_an_agents_variables_that_were_left_behind_silence_nobody(attempt: Path) -> None:
    """Neither the same process, started once more, nor another one that comes later."""
    assert is_first(of_agent(attempt, 0))
    assert is_first(of_agent(attempt, 0))
    mark = attempt / "trainkit.failed"
    os.utime(mark, (time.time() - 10, time.time() - 10))
    assert is_first(of_agent(attempt, 1))


def test_an_agents_folder_that_is_gone_silences_nobody(tmp_path: Path) -> None:
    assert [is_first(of_agent(tmp_path / "gone", rank)) for rank in (0, 1)] == [True, True]


def test_our_launcher_learns_the_exit_code_and_leaves_nothing(attempt: Path, temporary: Path) -> None:
    ours = {OUR_LAUNCHER: str(os.getpid()), "TMPDIR": str(temporary)}
    assert [is_first(of_agent(attempt, rank) | ours) for rank in (0, 1)] == [True, False]
    assert [path.name for path in attempt.iterdir() if path.is_file()] == []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(temporary))
        assert [first_exit_code(), first_exit_code()] == [3, None]
    assert list(temporary.iterdir()) == []
