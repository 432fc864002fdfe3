"""A disk that is full, broken or read-only: nothing that was good is lost, and the same command goes on afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.forks import Fault, Forks, Outcome, Story, published, tell
from tests.faults.saves import RUN, saves, state_of
from tests.faults.test_kill import points_of
from tests.faults.tracing import traced
from trainkit.errors import MachineError
from trainkit.training import saving
from trainkit.training.checkpoint import newest_checkpoint, step_name
from trainkit.training.retention import Retention
from trainkit.training.run_record import check_output
from trainkit.training.saving import Saver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.faults.conftest import Tally

SIZES = 64
NUMBERS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
SYSCALLS = ("mkdir", "openat", "write", "fsync", "rename", "unlink", "rmdir")


@contextlib.contextmanager
def tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own; skips where it cannot be mounted (not root: run under `unshare -Urm`)."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here ({done.stderr.strip()}); run under `unshare -Urm`")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def leave_free(ballast: Path, free_bytes: int) -> None:
    there = os.statvfs(ballast.parent)
    ballast.write_bytes(bytes(max(there.f_bavail * there.f_frsize - free_bytes, 0)))


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_an_output_dir_that_takes_no_files_is_refused_at_once(tmp_path: Path, state: str) -> None:
    with tmpfs(tmp_path / "disk", 2**20) as disk:
        (disk / "run").mkdir()
        leave_free(disk / "ballast", 0)
        if state == "read-only":
            (disk / "ballast").write_bytes(b"")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        reason = {
            "full": r"No space left on device \(tried in .*\); free some space, or name a new folder$",
            "read-only": r"Read-only file system \(tried in .*\); name a new folder$",
        }[state]
        for name in ("run", "not/there/yet"):
            with pytest.raises(MachineError, match=reason):
                check_output(str(disk / name))
        assert {path.name for path in disk.rglob("*")} == {"run", "ballast"}


@pytest.mark.goal("A6 a save with 0 to 100 % of its size free, beside the check of the room")
@pytest.mark.parametrize("looked", [True, False], ids=["room is looked at", "the write itself fails"])
def test_a_save_on_a_disk_of_any_size(
    tmp_path: Path, looked: bool, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    if not looked:
        monkeypatch.setattr(saving, "_check_room", lambda *_: None)
    with tmpfs(tmp_path / "disk", 2**23) as disk:
        root = disk / "checkpoints"
        for number in range(SIZES):
            with Saver(root, RUN) as saver:
                saver.save(state_of(1, 2**15), Retention(1))
            one = size_of(root / step_name(1))
            leave_free(disk / "ballast", one * number // (SIZES - 1))
            started, said = time.monotonic(), ""
            try:
                with Saver(root, RUN) as saver:
                    saver.save(state_of(2, 2**15), Retention(1))
                    saver.wait()
            except MachineError as error:
                said = str(error)
            problems = [] if time.monotonic() - started < 10 else ["took more than 10 s"]
            full = number < SIZES - 2
            if full and not re.search(r"\(\d[\d,]* bytes more are needed\); newest good one: .*step-000001\.", said):
                problems.append(f"said {said!r}")
            if newest_checkpoint(root, RUN) != (root / step_name(1 if said else 2), []):
                problems.append(f"left {sorted(path.name for path in root.iterdir())}")
            (disk / "ballast").unlink()
            with Saver(root, RUN) as saver:
                saver.save(state_of(2, 2**15), Retention(1))
            if [path.name for path in root.iterdir()] != [step_name(2)]:
                problems.append(f"afterwards {sorted(path.name for path in root.iterdir())}")
            shutil.rmtree(root)
            tally.count(f"{number} of {SIZES - 1}", problems)
    tally.note(at_least=SIZES)


@pytest.fixture(scope="session")
def full_story(forks: Forks, small: dict[str, Any]) -> Story:
    """Every weight trains: a checkpoint of a hundred pages of memory and more."""
    recipe = {name: section for name, section in small.items() if name != "adapter"}
    recipe["training"] = {**small["training"], "learning_rate": 1e-3}
    recipe["checkpoints"] = {"every_steps": 2, "keep_last": 1, "keep_best": False}  # none may go to make room
    return tell(forks, forks.folder / "full", recipe)


def went_on(story: Story, folder: Path, ended: Outcome, fault: Fault | None = None) -> list[str]:
    """What is wrong when the same command is given after the trouble is over."""
    problems = [] if ended.code in {0, 5} else [f"exit code {ended.code}: {ended.said[-400:]}"]
    if ended.code == 5 and "Traceback" in ended.said:
        problems.append("a traceback")
    saved = published(folder)
    again = story.forks.run(story.command(folder))
    if again.code != 0:
        return [*problems, f"afterwards exit code {again.code}: {again.said[-400:]}"]
    if "already finished" not in again.said and again.continued_after != (saved[-1] if saved else None):
        problems.append(f"continued after {again.continued_after}, saved were {saved}")
    if fault and fault.operation == "rmdir":  # nothing comes back for an empty folder of a run that is finished
        for path in [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]:
            path.rmdir()
    found = story.differences(folder)
    if "has gaps" in ended.said or "may have gaps" in ended.said:  # it was said, and training went on
        found = [line for line in found if not line.startswith(("metrics.jsonl", "samples.jsonl"))]
    return problems + found


@pytest.mark.goal("A6 a run on a disk that fills up in a save, 0 to 100 % of a checkpoint free")
@pytest.mark.parametrize("number", [20, *(pytest.param(k, marks=pytest.mark.long) for k in range(SIZES) if k != 20)])
def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(
    full_story: Story, tmp_path: Path, number: int, tally: Tally
) -> None:
    with tmpfs(tmp_path / "disk", 2**24) as disk:
        folder = disk / "run"
        size = size_of(full_story.forks.folder / "full" / "checkpoints" / step_name(12))
        fault = Fault(
            at=1,
            operation="mkdir",
            path=r"\.step-000006",  # after the room was looked at
            ballast=str(disk / "ballast"),
            free_bytes=size * number // (SIZES - 1),
        )
        ended = full_story.forks.run(full_story.command(folder), fault=fault)
        problems = []
        at_export = re.search(
            r"/final: cannot be written: the disk is full \(\d[\d,]* bytes more are needed\); free", ended.said
        )
        said = re.search(r"\(\d[\d,]* bytes more are needed\); newest good one: .*/step-\d{6}\.", ended.said)
        if ended.code == 5 and not said and not at_export:
            problems.append(f"said {ended.said[-300:]}")
        if ended.seconds > 10 + 10 * full_story.seconds:
            problems.append(f"took {ended.seconds:.0f} s")
        (disk / "ballast").unlink()
        tally.count(f"{number} of {SIZES - 1}", problems + went_on(full_story, folder, ended))
    tally.note()


def operations_of_a_save(forks: Forks, root: Path) -> list[str]:
    record = root.with_name("points.txt")
    for first, options in ((1, {}), (3, {"record": str(record), "fault": Fault(at=0, path=re.escape(str(root)))})):
        assert forks.call(saves, str(root), first, first + 1 - first // 3, 2, 10, **options).code == 0
    shutil.rmtree(root)
    return record.read_text().splitlines()


def prepared(forks: Forks, root: Path) -> None:
    assert forks.call(saves, str(root), 1, 2, 2, 10).code == 0


def problems_of_save(forks: Forks, root: Path, ended: Outcome) -> list[str]:
    """What is wrong after the save of step 3 behind good ones of 1 and 2, of which it failed or did not."""
    problems = []
    if ended.code not in {0, 5} or (ended.code == 5 and "good" not in ended.said):
        problems.append(f"exit code {ended.code}: {ended.said[-300:]}")
    found, skipped = newest_checkpoint(root, RUN)
    if found is None or found.name not in ({step_name(3)} if ended.code == 0 else {step_name(2), step_name(3)}):
        problems.append(f"newest is {found}, {skipped}")
    again = forks.call(saves, str(root), 3, 4, 2, 10)
    names = sorted(path.name for path in root.iterdir())
    if again.code != 0 or names != [step_name(3), step_name(4)]:
        problems.append(f"afterwards {names}: {again.said}")
    return problems


@pytest.mark.goal("A6 every file operation of a save and of retention fails in turn")
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        errno.EROFS,
        *(pytest.param(number, marks=pytest.mark.long) for number in (errno.EIO, errno.EACCES)),
    ],
)
def test_every_operation_of_a_save_fails(
    forks: Forks, tmp_path: Path, number: int, lasting: bool, tally: Tally
) -> None:
    root = tmp_path / "checkpoints"
    operations = operations_of_a_save(forks, root)
    for at, operation in enumerate(operations, 1):
        prepared(forks, root)
        fault = Fault(at=at, path=re.escape(str(root)), errno=number, lasting=lasting)
        ended = forks.call(saves, str(root), 3, 3, 2, 10, fault=fault)
        tally.count(operation, problems_of_save(forks, root, ended))
        shutil.rmtree(root)
    tally.note(at_least=25)


@pytest.mark.goal("A6 every system call of a save and of retention fails in turn (strace)")
@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS[:3], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", SYSCALLS)
def test_every_system_call_of_a_save_fails(forks: Forks, tmp_path: Path, call: str, number: int, tally: Tally) -> None:
    root = tmp_path / "checkpoints"
    for when in range(1, 60):
        prepared(forks, root)
        waiting = forks.call(saves, str(root), 3, 3, 2, 10, wait_for_tracer=True)
        failing = f"inject={call}:error={errno.errorcode[number]}:when={when}"
        ended, log = traced(forks, waiting, tmp_path, ["-y", "-e", f"trace={','.join(SYSCALLS)}", "-e", failing])
        if "(INJECTED)" not in log:
            break
        if re.search(rf"{re.escape(str(root))}.*INJECTED", log):  # not how much memory there is, in /proc
            tally.count(f"{call} {when}", problems_of_save(forks, root, ended))
        shutil.rmtree(root)
    tally.note()


@pytest.mark.goal("A6 any file operation of a run fails once: packing, training, saving, export")
@pytest.mark.parametrize("block", ["some", *(pytest.param(block, marks=pytest.mark.long) for block in range(4))])
def test_any_file_operation_of_a_run_fails(story: Story, tmp_path: Path, block: str | int, tally: Tally) -> None:
    faults = points_of(story, tmp_path)
    first, every = (11, 24) if block == "some" else (int(block), 4)
    for index, fault in list(enumerate(faults))[first::every]:
        folder, cache = tmp_path / "recorded", tmp_path / "cache"
        number = NUMBERS[(index + index // 4) % 4]
        ended = story.forks.run(story.command(folder), cache=cache, fault=replace(fault, signal=0, errno=number))
        name = f"{errno.errorcode[number]} {fault.operation} {fault.at} {fault.path}"
        tally.count(name, went_on(story, folder, ended, fault))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
    tally.note(at_least=12)


@pytest.mark.goal("A6 a disk that becomes read-only in the middle of a run")
@pytest.mark.parametrize("at", [60, *(pytest.param(at, marks=pytest.mark.long) for at in range(5, 900, 45))])
def test_a_disk_that_becomes_read_only(story: Story, tmp_path: Path, at: int, tally: Tally) -> None:
    folder = tmp_path / "run"
    fault = Fault(at=at, path=re.escape(str(folder)), errno=errno.EROFS, lasting=True)
    ended = story.forks.run(story.command(folder), fault=fault)
    problems = [] if ended.code == 5 else [f"exit code {ended.code}"]
    tally.count(f"from operation {at}", problems + went_on(story, folder, ended))
    tally.note()


@pytest.mark.goal("A7 two runs in one folder: one is refused, until the other is dead")
def test_a_lock_holds_as_long_as_its_process_lives(story: Story, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "run"
    command = story.command(folder)
    at_step_5 = Fault(at=7, path=r"metrics\.jsonl$", operation="write", signal=signal.SIGSTOP)
    first = story.forks.run(command, fault=at_step_5)
    assert first.code is None
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    second = story.forks.run(command)
    problems = [] if second.code == 2 and "another trainkit process is running in" in second.said else [second.said]
    if before != {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}:
        problems.append("the second changed something")
    os.kill(first.pid, signal.SIGKILL)
    assert story.forks.rest_of(first).code == -signal.SIGKILL
    assert story.forks.run(command).code == 0
    tally.count("two runs", problems + story.differences(folder))
    tally.note()
