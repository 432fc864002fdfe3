"""What the environment says of a launch, and which of several processes says why they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from trainkit.cli import run
from trainkit.launched import (
    AGENTS_FILE,
    OUR_LAUNCHER,
    Launched,
    check_environment,
    first_exit_code,
    is_first_to_fail,
    launched,
)

if TYPE_CHECKING:
    from pathlib import Path

Said = pytest.CaptureFixture[str]
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


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: 'abc' is no whole number of at least 1; unset it, or start the processes"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is no whole number of at least 1; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is no whole number of at least 1; "),
        ({"RANK": "-1"}, "RANK: '-1' is no whole number of at least 0; "),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK: 'a' is no whole number of at least 0; "),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: '0' is no whole number of at least 1; "),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: 2 of 2 processes (WORLD_SIZE); they count from 0; "),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK: is set, and WORLD_SIZE is not; unset it, or start the processes with "),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANK": "0"}, "LOCAL_RANK: is set, and MASTER_ADDR is not; "),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED: DeepSpeed is not supported; unset it"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM: Megatron is not supported; unset it"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG: tensor and context "),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND: compiling the model is not supported"),
        ({"ACCELERATE_TORCH_DEVICE": "xyz"}, "ACCELERATE_TORCH_DEVICE: choosing the device is not supported, only "),
    ],
    ids=str,
)
def test_a_variable_that_was_left_behind_is_named(
    environment: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(["fine-tune", "quickstart"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
    assert len(line) <= 200


def test_what_accelerate_launch_sets_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"}.items():
        monkeypatch.setenv(name, value)
    check_environment()
    for rank in (0, 1):
        for name, value in {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
        }.items():
            monkeypatch.setenv(name, value)
        check_environment()
        assert launched() == Launched(processes=2, rank=rank, local_rank=rank, local_processes=2)


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
