"""Runs command lines in forks of one process that has loaded everything once, and makes things go wrong in them.

A line of JSON on stdin is a job (:class:`tests.faults.forks.Job`), a line on stdout what came of it. A fork costs
milliseconds where a new process costs seconds of imports, so hundreds of kills can be afforded. The process that forks
has no threads; its children are real processes that real signals reach.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = {
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "os.chmod": "chmod",
    "os.truncate": "truncate",
}


class Points:
    """Counts the file operations of this process that change something under a path, and acts at a chosen one.

    An operation is counted before it is done: to act at number n is to act after n - 1 of them.
    """

    def __init__(self, fault: dict[str, Any], record: str | None) -> None:
        self._fault = fault
        self._pattern = re.compile(fault["path"])
        self._operations = re.compile(fault["operation"])
        self._lock = threading.Lock()
        self._count = 0
        self._acting: set[int] = set()
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if record else None

    def reached(self, operation: str, path: str) -> None:
        """Called right before ``operation`` on ``path``. Raises OSError where the fault is that it fails."""
        if threading.get_ident() in self._acting:
            return
        with self._lock:
            if not self._operations.fullmatch(operation) or not self._pattern.search(path):
                return
            self._count += 1
            if self._record is not None:
                os.write(self._record, f"{operation} {path}\n".encode())
            at, count = self._fault["at"], self._count
        # Without the lock: what is waited for may be the other thread's work.
        if count == at:
            self._acting.add(threading.get_ident())
            try:
                self._act()
            finally:
                self._acting.discard(threading.get_ident())
        if self._fault["errno"] and (count == at or (self._fault["lasting"] and 0 < at < count)):
            raise OSError(self._fault["errno"], os.strerror(self._fault["errno"]))

    def _act(self) -> None:
        wanted = self._fault
        if wanted["wait_for"]:
            while not Path(wanted["wait_for"]).exists():
                time.sleep(0.001)
        if wanted["signal"]:
            os.kill(os.getpid(), wanted["signal"])
        if wanted["ballast"]:
            fill(Path(wanted["ballast"]), wanted["free_bytes"])

    def watch(self) -> None:
        """Begin to count."""
        sys.addaudithook(self._audit)
        real_fsync, real_pwrite = os.fsync, os.pwrite

        def fsync(descriptor: int) -> None:
            self.reached("fsync", path_of(descriptor))
            real_fsync(descriptor)

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            self.reached("write", path_of(descriptor))
            return real_pwrite(descriptor, data, offset)

        os.fsync, os.pwrite = fsync, pwrite  # type: ignore[assignment]
        from trainkit.run_folder import write_new_file as real_write
        from trainkit.training import checkpoint

        def write_new_file(path: Path, pieces: Iterable[Any]) -> Any:
            return real_write(path, self._counted(path, pieces))

        vars(checkpoint)["write_new_file"] = write_new_file

    def _counted(self, path: Path, pieces: Iterable[Any]) -> Iterator[Any]:
        for piece in pieces:
            self.reached("write", str(path))
            yield piece

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & WRITES:
                self.reached("open", os.fsdecode(path))
        elif event in AUDITED:
            path = arguments[0]
            if isinstance(path, int):
                self.reached(AUDITED[event], path_of(path))
                return
            folder = arguments[-1] if event in {"os.remove", "os.rmdir"} else -1  # the dir_fd that rmtree gives
            where = path_of(folder) + "/" if isinstance(folder, int) and folder >= 0 else ""
            self.reached(AUDITED[event], where + os.fsdecode(path))


def path_of(descriptor: int) -> str:
    """What an open descriptor is of."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def fill(ballast: Path, free_bytes: int) -> None:
    """Let a file grow until only ``free_bytes`` are free on its file system."""
    there = os.statvfs(ballast.parent)
    room = there.f_bavail * there.f_frsize - free_bytes
    with contextlib.suppress(OSError):
        if room > 0:
            ballast.write_bytes(bytes(room))


def without_estimate() -> None:
    """Leave out the prediction of memory: half the time of so small a run, and nothing of it is in its files."""
    from trainkit.commands import fine_tune
    from trainkit.memory.fit import Fit

    def given(recipe: Any, *_: object) -> Fit:
        return Fit(recipe.training.micro_batch_size, None, ())

    vars(fine_tune)["fit"] = given


def child(job: dict[str, Any]) -> int:
    """Do the job in this process; the exit code."""
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    call: Callable[..., int] | None = None
    if job["call"]:
        module, name = job["call"].split(":")
        call = getattr(importlib.import_module(module), name)
    if job["wait_for_tracer"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    without_estimate()
    Points(job["fault"], job["record"]).watch()
    if call is not None:
        return call(*job["arguments"])
    from trainkit.cli import run

    code = run(job["arguments"])
    if job["modules"]:
        Path(job["modules"]).write_text("\n".join(sorted(sys.modules)))
    return code


def fork(job: dict[str, Any]) -> int:
    """Begin the job in a child of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        code = child(job)
    except BaseException:  # a child must never return into the server's loop
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, signals: list[tuple[float, int]], limit_seconds: float) -> dict[str, Any]:
    """What became of a child, which gets each of ``signals`` so many seconds after its beginning."""
    started = time.monotonic()
    left = sorted(signals)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        seconds = time.monotonic() - started
        if found and os.WIFSTOPPED(status):
            return {"code": None, "seconds": seconds, "pid": pid}
        if found:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "pid": pid}
        while left and left[0][0] <= seconds:
            os.kill(pid, left.pop(0)[1])
        if seconds > limit_seconds:
            os.kill(pid, signal.SIGKILL)
            limit_seconds = float("inf")
        time.sleep(min(0.001, max(left[0][0] - seconds, 0)) if left else 0.001)


def load(modules: Path) -> None:
    """Import what a child has imported, so that the next ones need not."""
    for name in modules.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def main() -> None:
    """Answer jobs until stdin ends."""
    importlib.import_module("trainkit.commands.fine_tune")
    importlib.import_module("trainkit.cli")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            pid = job["continue_pid"] or fork(job)
            answer = wait(pid, job["signals"], job["limit_seconds"])
            if job["modules"] and answer["code"] == 0:
                load(Path(job["modules"]))
        except OSError as error:
            answer = {"error": f"{errno.errorcode.get(error.errno or 0)} {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
