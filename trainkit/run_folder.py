"""The name of every file a run leaves, and writing that is atomic.

Nothing in this module loads torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    Bytes = bytes | memoryview


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class RunFolder:
    """The layout of ``output_dir``; the properties only name, they do not create."""

    root: Path

    @property
    def marker(self) -> Path:
        """Says that trainkit made this folder, and the id of the run that owns it."""
        return self.root / "run.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here; empty."""
        return self.root / "run.lock"

    @property
    def recipe(self) -> Path:
        """The recipe as resolved, runnable by itself."""
        return self.root / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions, devices, seed."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Generations at each evaluation."""
        return self.root / "samples.jsonl"

    @property
    def ledger(self) -> Path:
        """Every token accounted for."""
        return self.root / "ledger.json"

    @property
    def checkpoints(self) -> Path:
        """Holds ``step-000200/`` and so on."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def final(self) -> Path:
        """The result: adapter or model, tokenizer, model card."""
        return self.root / "final"

    @property
    def summary(self) -> Path:
        """What ``fine-tune --json`` ends with."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """Self-contained HTML."""
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        """What processes but the first one print, a file each."""
        return self.root / "logs"

    @property
    def crash(self) -> Path:
        """The traceback of a bug."""
        return self.root / "crash.txt"

    def whole_files(self) -> tuple[Path, ...]:
        """Those that are written as a whole, by :func:`write_atomically`."""
        return (self.marker, self.recipe, self.environment, self.ledger, self.summary, self.report)

    def remove_leftovers(self) -> None:
        """Remove what a process left that was killed inside :func:`write_atomically`. Only for who holds the lock."""
        names = "|".join(re.escape(path.name) for path in self.whole_files())
        leftover = re.compile(rf"\.({names})\.[a-z0-9_]{{8}}")  # as tempfile.mkstemp makes them
        for path in self.root.iterdir():
            if leftover.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                with suppress(OSError):
                    path.unlink()


def expanded(path: str) -> Path:
    """``path``, of something to be read, with `~` replaced by the home folder.

    Where there is no such home it stays as it stands: nothing is found there, and it can be named as missing.

    >>> expanded("~nobody-at-all/data")
    PosixPath('~nobody-at-all/data')
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def leads_out(entry: Path, folder: Path) -> bool:
    """Whether ``entry`` of ``folder``, both as they are named, is a link to something that lies outside of the folder.

    A folder that somebody else made must not bring in files of this machine. Where the hub's cache keeps the content of
    a snapshot's files, ``blobs/`` two folders up, counts as inside.
    """
    if not entry.is_symlink():
        return False
    real = folder.resolve()
    blobs = [real.parent.parent / "blobs"] if real.parent.name == "snapshots" else []
    try:
        target = entry.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return True
    return not any(target.is_relative_to(inside) for inside in (real, *blobs))


def permissions_for_new_file() -> int:
    """The mode that ``open`` would give a new file under the current umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def fsync_folder(folder: Path) -> None:
    """Make renames and new names inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Written:
    """What a file holds: its size and the SHA-256 of its bytes."""

    size_bytes: int
    sha256: str


def write_new_file(path: Path, pieces: Iterable[Bytes]) -> Written:
    """Write a file that does not exist yet, and have it on disk; its name is not there before the folder is fsynced.

    The checksum is taken on the way, so that nothing is read again. Raises OSError as the file system does; a part of
    the file may be left then.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            digest.update(view)
            while view:  # a raw file may take less than it is given
                taken = file.write(view)
                size += taken
                view = view[taken:]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` with ``content``: a reader sees the old file or the new one, never a part.

    The bytes are on disk before the name is. Raises OSError as the file system does; nothing is left behind then.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(permissions_for_new_file())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ValueError for a number that is not finite."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
