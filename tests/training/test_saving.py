"""Saving beside training: what is written is the state of its step, and a failure is said and loses nothing."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.training.test_checkpoint import RUN, assert_same, state_at
from trainkit.errors import MachineError
from trainkit.run_folder import fsync_folder
from trainkit.training import checkpoint, saving
from trainkit.training.checkpoint import Share, TrainingState, load_checkpoint, newest_checkpoint, problems_of
from trainkit.training.retention import Retention
from trainkit.training.saving import SMALL_FILES_BYTES, Saver, check_space

KEEP = Retention(keep_last=2)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_state_of_its_step_is_saved_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, may_write = state_at(1), threading.Event()
    expected = state.on_host()
    real = checkpoint.write_checkpoint
    monkeypatch.setattr(saving, "write_checkpoint", lambda *args: (may_write.wait(), real(*args))[1])
    with Saver(tmp_path / "checkpoints", RUN) as saver:
        saver.save(state, KEEP)
        for weight in state.weights.values():
            weight.zero_()
        for entry in state.optimizer["state"].values():
            entry["exp_avg"].zero_()
        assert not (tmp_path / "checkpoints" / "step-000001").exists()
        may_write.set()
    loaded = load_checkpoint(tmp_path / "checkpoints" / "step-000001")
    assert_same(dict(expected.weights), dict(loaded.weights))
    assert_same(expected.optimizer, loaded.optimizer_state())
    assert saver.checkpoints == 1
    assert saver.copied_bytes == saver.size_bytes == state.tensor_bytes() > 0


def test_one_at_a_time_in_order_and_old_ones_go(tmp_path: Path) -> None:
    with Saver(tmp_path, RUN) as saver:
        for step in range(1, 6):
            saver.save(state_at(step), KEEP)
    assert names(tmp_path) == ["step-000004", "step-000005"]
    assert saver.checkpoints == 5
    assert saver.paused_seconds > 0


def test_without_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SPARE_MEMORY", 1e12)
    with Saver(tmp_path, RUN) as saver:
        saver.save(state_at(1), KEEP)
        assert names(tmp_path) == ["step-000001"]
        assert saver.copied_bytes == 0


def test_a_failure_beside_training_is_raised_by_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Saver(tmp_path, RUN) as saver:
        saver.save(state_at(1), KEEP)
        saver.wait()
        monkeypatch.setattr(saving, "write_checkpoint", broken)
        saver.save(state_at(2), KEEP)
        saver.settle()
        with pytest.raises(MachineError, match=r"checkpoint of step 2 .*Input/output error; newest good one: .*000001"):
            saver.check()
        saver.check()


def test_a_bug_in_the_other_thread_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(saving, "write_checkpoint", broken)
    with Saver(tmp_path, RUN) as saver:
        saver.save(state_at(1), KEEP)
        with pytest.raises(ZeroDivisionError):
            saver.wait()


def test_the_second_ctrl_c_waits_for_nothing_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 64)
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    saver = Saver(tmp_path, RUN)

    def interrupted() -> None:
        with saver:
            saver.save(replace(state_at(1), weights={"large": torch.zeros(2**16)}), KEEP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def interrupted_at(instruction: int, saver: Saver, state: TrainingState) -> int:
    """Save twice, with a Ctrl+C before the instruction of that number; returns how many there were."""
    passed = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        nonlocal passed
        if frame.f_code.co_filename not in {saving.__file__, threading.__file__}:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            passed += 1
            if passed == instruction:
                raise KeyboardInterrupt
        return trace

    with saver:
        sys.settrace(trace)
        try:
            saver.save(state, KEEP)
            saver.save(replace(state, step=state.step + 1), KEEP)
        finally:
            sys.settrace(None)
    return passed


def test_the_second_ctrl_c_may_come_at_any_instruction_of_a_save(tmp_path: Path) -> None:
    state = state_at(1)
    instructions = interrupted_at(0, Saver(tmp_path / "whole", RUN), state)
    assert instructions > 200
    for instruction in range(1, instructions + 1, 3):
        root = tmp_path / str(instruction)
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(instruction, Saver(root, RUN), state)
        # Read at once: what is published is whole, nothing else stays, and no thread goes on writing.
        assert {problems_of(folder, RUN) for folder in root.glob("*")} <= {None}


def test_a_real_write_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    state = replace(state_at(2), weights={"large": torch.zeros(100_000)})
    with Saver(tmp_path, RUN) as saver:
        saver.save(state_at(1), KEEP)
        saver.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            saver.save(state, KEEP)
            with pytest.raises(MachineError, match=r"could not be saved: File too large; newest good one: .*000001"):
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-000001"]


# Room on the disk


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the file system say how much is free."""
    real = os.statvfs

    def only(size_bytes: int) -> None:
        def statvfs(path: Any) -> Any:
            fields = list(real(path))
            fields[1], fields[4] = 1, size_bytes  # f_frsize, f_bavail
            return os.statvfs_result(fields)

        monkeypatch.setattr(os, "statvfs", statvfs)

    return only


def test_without_room_the_missing_bytes_are_said(tmp_path: Path, free: Callable[[int], None]) -> None:
    state = state_at(1)
    free(state.tensor_bytes() + SMALL_FILES_BYTES - 7)
    with Saver(tmp_path, RUN) as saver:
        saver.save(state, KEEP)
        with pytest.raises(
            MachineError, match=r"No space left on device \(7 bytes more are needed\); there is none yet"
        ):
            saver.wait()
    assert names(tmp_path) == []


def test_where_it_is_tight_older_ones_go_first_and_the_newest_stays(
    tmp_path: Path, free: Callable[[int], None]
) -> None:
    with Saver(tmp_path, RUN) as saver:
        for step in (1, 2, 3):
            saver.save(state_at(step), Retention(keep_last=3))
        saver.wait()
        free(0)
        saver.save(state_at(4), Retention(keep_last=3, best_step=1))
        with pytest.raises(MachineError, match=r"No space left.*newest good one: .*step-000003"):
            saver.wait()
    assert names(tmp_path) == ["step-000001", "step-000003"]
    assert newest_checkpoint(tmp_path, RUN) == (tmp_path / "step-000003", [])


def test_what_a_run_leaves_must_fit_before_it_begins(tmp_path: Path, free: Callable[[int], None]) -> None:
    weights = {"w": torch.zeros(1000)}
    one = 4000 + 8000 + SMALL_FILES_BYTES
    for optimizer, state in (("adamw", one), ("sgd", one - 8000)):
        free(3 * state + 4000)
        check_space(tmp_path / "not" / "yet", None, weights, optimizer=optimizer, checkpoints=2)
        free(3 * state + 4000 - 5)
        with pytest.raises(MachineError, match=r"2 checkpoints.*; free 5 bytes, or set checkpoints\.keep_last lower"):
            check_space(tmp_path / "not" / "yet", None, weights, optimizer=optimizer, checkpoints=2)


def test_what_its_own_checkpoints_take_counts_as_free(tmp_path: Path, free: Callable[[int], None]) -> None:
    with Saver(tmp_path, RUN) as saver:
        saver.save(state_at(1), KEEP)
    own = sum(path.stat().st_size for path in (tmp_path / "step-000001").iterdir())
    needed = 3 * SMALL_FILES_BYTES + 3 * 400 + 400
    free(needed - own)
    weights = {"w": torch.zeros(100)}
    check_space(tmp_path, RUN, weights, optimizer="sgd", checkpoints=2)
    with pytest.raises(MachineError):
        check_space(tmp_path, "another", weights, optimizer="sgd", checkpoints=2)


# Tidying up


def test_what_a_kill_left_goes_also_where_no_save_follows(tmp_path: Path) -> None:
    with Saver(tmp_path, RUN) as saver:
        for step in (1, 2, 3):
            saver.save(state_at(step), Retention(keep_last=3))
    (tmp_path / ".step-000004.0a1b2c3d.partial").mkdir()
    Saver(tmp_path, RUN).tidy(KEEP, newest_step=3)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    Saver(tmp_path / "not yet", RUN).tidy(KEEP, newest_step=3)


def test_a_deletion_that_fails_is_said_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(saving, "retire_checkpoints", broken)
    with Saver(tmp_path, RUN) as saver:
        saver.save(state_at(1), KEEP)
        with pytest.raises(MachineError, match="older checkpoints could not be deleted: Permission denied; that of st"):
            saver.wait()
        saver.tidy(KEEP, newest_step=1)
    assert newest_checkpoint(tmp_path, RUN) == (tmp_path / "step-000001", [])


# Shares of several processes


def shared(rank: int, step: int = 1) -> TrainingState:
    """A state of which each of two processes holds one row of every tensor."""
    return replace(state_at(step), share=Share(rank, 2, {"weight": (rank, 2), "bias": (rank, 2)}, {}))


def test_once_its_list_is_there_a_process_touches_the_folder_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process may have given it its final name by then."""
    (tmp_path / "staging").mkdir()
    seen = []

    def looking(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        fsync_folder(folder)

    monkeypatch.setattr(checkpoint, "fsync_folder", looking)
    checkpoint.write_checkpoint(tmp_path, RUN, shared(rank=1), staging="staging")
    assert seen == [["optimizer-00002-of-00002.safetensors", "weights-00002-of-00002.safetensors"]]
    assert "part-00002.json" in names(tmp_path / "staging")


def test_the_share_of_a_process_that_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = time.monotonic()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:6071")

    def one_process_is_lost() -> None:
        with Saver(tmp_path / "checkpoints", RUN) as saver:
            saver.save(shared(rank=0), KEEP)
            raise lost

    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        one_process_is_lost()
    assert time.monotonic() - started < 60
    assert names(tmp_path / "checkpoints") == []


def test_shares_that_went_with_a_full_disk_are_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others wrote is in the folder that was deleted; older checkpoints stay as they are."""
    with Saver(tmp_path, RUN) as saver:
        for step in (1, 2):
            saver.save(state_at(step), KEEP)
        saver.wait()

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(saving, "write_checkpoint", full)
        saver.save(shared(rank=0, step=3), Retention(keep_last=1))
        with pytest.raises(MachineError, match=r"the checkpoint of step 3 .* could not be saved: No space left"):
            saver.wait()
    assert names(tmp_path) == ["step-000001", "step-000002"]
