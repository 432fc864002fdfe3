"""Saving beside training: a copy of the state in host memory, and a thread that writes it while the next steps run.

Training pauses for the copy, and for an earlier save that is still under way. Where there is no memory for a copy, it
pauses for the whole save. A checkpoint is committed by its last rename, so that a kill at any moment, in this thread or
in the other, leaves the earlier ones as they are.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import psutil

from trainkit.errors import MachineError
from trainkit.run_folder import DISK_FULL, fsync_folder
from trainkit.training.checkpoint import (
    SavingAbandoned,
    newest_checkpoint,
    problems_of,
    staging_name,
    step_folders,
    write_checkpoint,
)
from trainkit.training.processes import is_of_lost_process
from trainkit.training.retention import Retention, delete_oldest, retire_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    import torch

    from trainkit.training.checkpoint import TrainingState

SMALL_FILES_BYTES = 2**17  # JSON, generator states, rounding up to blocks
SPARE_MEMORY = 1.25  # times the copy must be free, so that it is not what makes a run swap
MOMENTS_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "adafactor": 0.1, "sgd": 0.0}  # a trained parameter, about


class Saver:
    """Writes checkpoints of one run under ``root``, one at a time, in order.

    With several processes that hold shares of the tensors, each has a Saver, and ``from_first`` brings all of them what
    the first one gives. A context manager: leaving it waits for a save under way, unless the reason is the second
    Ctrl+C, which waits for nothing, or a process that is gone and would be waited for.

    ``paused_seconds`` is the time in which no step ran because of saving; ``checkpoints`` were committed, which took
    ``written_seconds``, beside training or not; ``size_bytes`` are the tensors of the last, and
    ``copied_bytes`` those of the largest copy.
    """

    def __init__(self, root: Path, run_id: str, from_first: Callable[[Any], Any] = lambda value: value) -> None:
        self._root = root
        self._run_id = run_id
        self._from_first = from_first
        # The thread takes its work from a queue, and "nothing is being saved" is an answer through that queue: a second
        # Ctrl+C may strike between any two instructions, and no state is left that it could find half changed.
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._beside = False
        self._failure: BaseException | None = None
        self._abandoned = threading.Event()
        self._shared = False
        self.paused_seconds = 0.0
        self.written_seconds = 0.0
        self.checkpoints = 0
        self.size_bytes = 0
        self.copied_bytes = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._work_off, name="saving", daemon=True).start()
        self._beside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt) or (self._shared and is_of_lost_process(error)):
            self._abandoned.set()
        self.settle()
        self._beside = False
        self._work.put(None)

    def save(self, state: TrainingState, retention: Retention) -> float:
        """Begin to save ``state``; returns how many seconds training paused for it.

        Raises MachineError when an earlier save failed, or this one where nothing goes on beside it.
        """
        started = time.perf_counter()
        self.wait()
        first = state.share.rank == 0
        self._shared = state.share.processes > 1
        staging = self._from_first(staging_name(self._root, self._run_id, state.step) if first else None)
        if staging is None:
            return 0.0
        if self._beside and state.tensor_bytes() * SPARE_MEMORY <= psutil.virtual_memory().available:
            self._work.put(partial(self._save_noting_failure, state.on_host(), staging, retention))
            self.copied_bytes = max(self.copied_bytes, state.tensor_bytes())
        else:
            self._save(state, staging, retention)
        paused = time.perf_counter() - started
        self.paused_seconds += paused
        return paused

    def tidy(self, retention: Retention, newest_step: int) -> None:
        """Remove what a killed process left behind the checkpoint of ``newest_step``, as a save would at its end."""
        with suppress(OSError):  # the next save says it, and a run that has no more of them needs no room
            retire_checkpoints(self._root, self._run_id, retention, newest_step)

    def wait(self) -> None:
        """Return when nothing is being saved. Raises MachineError when the save failed."""
        self.settle()
        self.check()

    def check(self) -> None:
        """Raise MachineError when a save beside training has failed."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def settle(self) -> None:
        """Return when nothing is being saved; a failure is kept for :meth:`check`."""
        if not self._beside:
            return
        settled: SimpleQueue[None] = SimpleQueue()  # an Event's own wait() cannot be interrupted everywhere
        self._work.put(partial(settled.put, None))
        settled.get()

    def _work_off(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # the copy of a saved state, while the next one is waited for

    def _save_noting_failure(self, state: TrainingState, staging: str, retention: Retention) -> None:
        try:
            self._save(state, staging, retention)
        except SavingAbandoned:
            pass
        except BaseException as error:  # raised in the other thread
            self._failure = error

    def _save(self, state: TrainingState, staging: str, retention: Retention) -> None:
        started = time.perf_counter()
        size_bytes = state.tensor_bytes()
        try:
            if state.share.rank:
                write_checkpoint(self._root, self._run_id, state, self._abandoned.is_set, staging)
            else:
                _make_folder(self._root)
                self._write(state, staging, retention, size_bytes * state.share.processes)
        except OSError as error:
            raise MachineError(self._failed(error, state, size_bytes)) from error
        try:
            if state.share.rank == 0:
                retire_checkpoints(self._root, self._run_id, retention, state.step)
        except OSError as error:
            raise MachineError(
                f"{self._root}: older checkpoints could not be deleted: {error.strerror}; that of step {state.step} is "
                "good. Mend that, then give the same command again"
            ) from error
        self.checkpoints += 1
        self.written_seconds += time.perf_counter() - started
        self.size_bytes = size_bytes

    def _write(self, state: TrainingState, staging: str, retention: Retention, size_bytes: int) -> None:
        """Write the checkpoint; where there is no room for it, older ones that need not stay go first."""
        while True:
            begun = False
            try:
                _check_room(self._root, size_bytes)
                begun = True
                write_checkpoint(self._root, self._run_id, state, self._abandoned.is_set, staging)
            except OSError as error:
                if begun and self._shared:  # what the others wrote is gone with the unfinished folder
                    raise
                if error.errno not in DISK_FULL or not delete_oldest(self._root, self._run_id, retention, state.step):
                    raise
            else:
                return

    def _failed(self, error: OSError, state: TrainingState, size_bytes: int) -> str:
        what = error.strerror or type(error).__name__
        if error.errno in DISK_FULL:
            missing = max(_missing_bytes(self._root, size_bytes), 1)
            what = f"{what} ({missing:,} bytes more are needed)"
        newest, _ = newest_checkpoint(self._root, self._run_id)
        kept = f"newest good one: {newest}" if newest else "there is none yet"
        return (
            f"{self._root}: the checkpoint of step {state.step} ({size_bytes / 2**20:.1f} MiB) could not be saved: "
            f"{what}; {kept}. Mend that, then give the same command again"
        )


def _make_folder(root: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True)
        fsync_folder(root.parent)


def _check_room(root: Path, size_bytes: int) -> None:
    if _missing_bytes(root, size_bytes) > 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _missing_bytes(root: Path, size_bytes: int) -> int:
    """How much more must be free for a checkpoint with this many bytes of tensors."""
    there = os.statvfs(root)
    return size_bytes + SMALL_FILES_BYTES - there.f_bavail * there.f_frsize


def check_space(
    folder: Path, run_id: str | None, weights: Mapping[str, torch.Tensor], *, optimizer: str, checkpoints: int
) -> None:
    """Raise MachineError when what a run will leave in ``folder`` does not fit on its disk.

    That is ``checkpoints`` at a time, one that is being written, and the result. ``folder`` may not exist yet; what the
    checkpoints of ``run_id`` take already counts as free, since they are among those.
    """
    parameters = sum(weight.numel() for weight in weights.values())
    state_bytes = int(sum(weight.nbytes for weight in weights.values()) + parameters * MOMENTS_BYTES[optimizer])
    result_bytes = sum(weight.nbytes for weight in weights.values())
    needed = (checkpoints + 1) * (state_bytes + SMALL_FILES_BYTES) + result_bytes
    there = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    free = there.f_bavail * there.f_frsize + _own_bytes(folder, run_id)
    if free < needed:
        raise MachineError(
            f"output_dir: {folder}: {checkpoints} checkpoints, one in the making and the result take "
            f"{needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free; free {needed - free:,} bytes, or set "
            "checkpoints.keep_last lower"
        )


def _own_bytes(folder: Path, run_id: str | None) -> int:
    if run_id is None:
        return 0
    own = [path for path in step_folders(folder) if problems_of(path, run_id, checksums=False) is None]
    return sum(file.stat().st_size for path in own for file in path.iterdir())
