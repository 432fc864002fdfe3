"""A folder of results that appears whole or not at all, and in which nothing of somebody else's is ever lost.

It holds ``SHA256SUMS`` over its files, in the format of sha256sum(1): with it a reader can tell a damaged file, and we
can tell a folder that we wrote from one that a person put something into.

While it is made it lies in a hidden folder beside its place, which is locked by the process at work:

    .NAME.xxxxxxxx/
        MARK        says that the folder is ours; written first
        new/        the result in the making
        earlier/    the result that is being replaced, from its renaming to the end

What a killed process left of that goes when the result is written again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from trainkit.errors import MachineError, UsageError
from trainkit.model.checking import DIGESTS, recorded_digests, sha256
from trainkit.run_folder import DISK_FULL, fsync_folder, permissions_for_new_file

if TYPE_CHECKING:
    from collections.abc import Iterator


MARK = "made-by-trainkit"
FULL_SAYS = re.compile(r"No space left|quota exceeded")  # through a library that drops the number


@contextmanager
def new_folder(folder: Path, *, replace: bool, size_bytes: int) -> Iterator[Path]:
    """An empty folder to be filled with files; it becomes ``folder`` when the block ends well, else it vanishes.

    ``size_bytes`` is about what the files will take, for the message of a full disk.

    An existing ``folder`` is replaced if ``replace`` and if it holds exactly what was written by this function before;
    otherwise UsageError. Raises MachineError when the disk does not take it.
    """
    check_free(folder, replace=replace)
    workplace: Path | None = None
    staging: Path | None = None
    lock: int | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        workplace, lock = _locked_workplace(folder)
        (workplace / MARK).touch()
        staging = workplace / "new"
        staging.mkdir()
        yield staging
        _seal(staging)
        _take_place(staging, folder)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:160]
        if getattr(error, "errno", None) in DISK_FULL or FULL_SAYS.search(reason):
            missing = _missing_bytes(folder, staging, size_bytes)
            # A quota, or a lack of inodes, does not show in what the disk has free.
            needed = f"{missing:,} bytes more are needed" if missing > 0 else f"{size_bytes:,} bytes are needed in all"
            reason = f"the disk is full ({needed}); free some space"
        raise MachineError(f"{folder}: cannot be written: {reason}") from error
    finally:
        if workplace is not None:
            _remove_workplace(workplace, folder)
        if lock is not None:
            os.close(lock)


def check_free(folder: Path, *, replace: bool) -> None:
    """Raise UsageError unless ``folder`` may be written: absent, empty, or (``replace``) exactly as we left it."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: is no folder; move it away, or choose another place")
    there = {entry.name for entry in folder.iterdir()}
    if not there:
        return
    if not replace:
        raise UsageError(f"{folder}: exists already and is not overwritten; move it away, or give another --output")
    ours = {path.name for path in recorded_digests(folder)} | {DIGESTS}
    if foreign := sorted(there - ours):
        raise UsageError(f"{folder}: holds {foreign[0]}, which trainkit did not write; move it away")


def _missing_bytes(folder: Path, staging: Path | None, size_bytes: int) -> int:
    """How much more must be free for the whole of ``folder``, beside what of it is there."""
    written = [path.stat().st_blocks * 512 for path in staging.iterdir()] if staging and staging.is_dir() else []
    there = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    return size_bytes - sum(written) - there.f_bavail * there.f_frsize


def _seal(folder: Path) -> None:
    """Digests, ordinary permissions (safetensors writes 0600), and everything on disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / DIGESTS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")
    mode = permissions_for_new_file()
    for path in [*files, folder / DIGESTS]:
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.chmod(mode | (mode & 0o444) >> 2)  # who may read a folder may enter it
    fsync_folder(folder)


def _take_place(staging: Path, folder: Path) -> None:
    if folder.exists():
        folder.rename(staging.with_name("earlier"))
    staging.rename(folder)
    fsync_folder(folder.parent)


def _locked_workplace(folder: Path) -> tuple[Path, int]:
    """A new hidden folder beside ``folder``, and the descriptor that locks it while it is open."""
    while True:
        workplace = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        with suppress(FileNotFoundError):  # another process took the empty folder for a leftover before it was locked
            descriptor = os.open(workplace, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nobody else gets one either, and so removes nothing
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if workplace.exists():
                return workplace, descriptor
            os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove the workplaces for ``folder`` whose processes are dead; what is not known as ours stays."""
    name = re.compile(re.escape(f".{folder.name}.") + "[a-z0-9_]{8}")  # as tempfile.mkdtemp makes them
    for workplace in [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]:
        with suppress(OSError):  # it is no folder, its process lives, or it cannot be removed
            descriptor = os.open(workplace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (workplace / MARK).is_file():
                    _remove_workplace(workplace, folder)
                else:
                    workplace.rmdir()  # killed before it was marked; anything else is not empty
            finally:
                os.close(descriptor)


def _remove_workplace(workplace: Path, folder: Path) -> None:
    """Remove a workplace of ours; the earlier result goes back to its place where the new one did not take it."""
    earlier = workplace / "earlier"
    if earlier.is_dir() and not folder.exists():
        earlier.rename(folder)
    # The mark goes last: killed in the middle, the rest is still known as ours.
    for part in (workplace / "new", earlier):
        shutil.rmtree(part, ignore_errors=True)
    (workplace / MARK).unlink(missing_ok=True)
    with suppress(OSError):  # what could not be removed, or what somebody else put there
        workplace.rmdir()
