"""A folder of results that appears whole or not at all, and in which nothing of somebody else's is ever lost.

It holds ``SHA256SUMS`` over its files, in the format of sha256sum(1): with it a reader can tell a damaged file, and we
can tell a folder that we wrote from one that a person put something into.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from trainkit.errors import MachineError, UsageError
from trainkit.model.checking import DIGESTS, recorded_digests, sha256
from trainkit.run_folder import fsync_folder, permissions_for_new_file

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def new_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """A hidden sibling to be filled with files; it becomes ``folder`` when the block ends well, else it vanishes.

    An existing ``folder`` is replaced if ``replace`` and if it holds exactly what was written by this function before;
    otherwise UsageError. Raises MachineError when the disk does not take it.
    """
    check_free(folder, replace=replace)
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield staging
        _seal(staging)
        _take_place(staging, folder)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full; free some space" if full else str(error).splitlines()[0][:160]
        raise MachineError(f"{folder}: cannot be written: {reason}") from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging)


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
    if not folder.exists():
        staging.rename(folder)
        fsync_folder(folder.parent)
        return
    earlier = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.earlier."))
    folder.rename(earlier)
    staging.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(earlier)
