"""Folders of large arrays that are complete or not there, and never read past damage.

    <folder>/
        NAME.bin ...      arrays, little-endian, memory-mapped
        NAME.json ...     texts
        sums.bin          uint32: the CRC-32 of every 64 KiB of every file, file after file
        manifest.json     written last: format, kind, key, the files, what the maker noted, and a sum of itself

A folder is filled under a temporary name, flushed to disk and then renamed: a process that is killed leaves nothing
that would ever be found, and of two that make the same folder one wins and the other uses it.

Opening looks at the manifest and at the sizes, so it takes the same time whatever lies there. A block is compared with
its sum when something in it is asked for the first time; :func:`verify` compares all of them. docs/decisions/011 says
why.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from array import array
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.errors import DataError, MachineError
from trainkit.run_folder import fsync_folder, permissions_for_new_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import DTypeLike, NDArray

FORMAT_VERSION = 2
BLOCK_BYTES = 2**16
MANIFEST = "manifest.json"
CONDEMNED = "condemned.json"
"""The name of a manifest whose files were found to be damaged."""
SUMS = "sums.bin"
TEMPORARY_PREFIX = ".building-"
ABANDONED_AFTER_SECONDS = 60.0
BUFFER_BYTES = 2**18

Kind = Literal["documents", "rows"]


class StoreUnusable(DataError):  # noqa: N818 - it reads as what it says
    """A folder that is damaged, incomplete, or of another format: to be made anew, never to be trusted."""


@dataclass(frozen=True)
class _File:
    """A file as the manifest lists it; ``type`` is numpy's name of its numbers, or "text"."""

    bytes: int
    type: str
    first_block: int
    """Where its sums begin in sums.bin."""

    @property
    def end_block(self) -> int:
        return self.first_block + -(-self.bytes // BLOCK_BYTES)


class SealedFolder:
    """An open folder: its arrays are mapped when asked for, and compared with their sums before they are used."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        """Open ``folder`` in constant time. Raises StoreUnusable."""
        manifest, self._manifest_inode = _read_manifest(folder, kind)
        self.folder = folder
        self.key: str = manifest["key"]
        self.facts: Mapping[str, Any] = manifest["facts"]
        self._sha256_of_sums: str = manifest["sha256_of_sums"]
        self._files = {name: _File(**listed) for name, listed in manifest["files"].items()}
        self._arrays: dict[str, NDArray[Any]] = {}
        self._checked = bytearray(max((file.end_block for file in self._files.values()), default=0))

    def array(self, name: str) -> NDArray[Any]:
        """The array ``name``, mapped and not compared: what is used of it has to be :meth:`check`-ed."""
        if name not in self._arrays:
            self._arrays[name] = self._mapped(f"{name}.bin", self._files[f"{name}.bin"].type)
        return self._arrays[name]

    def check(self, name: str, begin: int, end: int) -> None:
        """Compare the blocks that hold elements ``begin`` to ``end`` of an array, each of them once.

        Raises StoreUnusable for damage, and then takes the folder's manifest away: whoever opens it next makes it anew.
        """
        size = self.array(name).itemsize
        self._check_bytes(f"{name}.bin", begin * size, end * size)

    def whole(self, name: str) -> NDArray[Any]:
        """The whole array, compared. Raises StoreUnusable as :meth:`check` does."""
        found = self.array(name)
        self.check(name, 0, found.size)
        return found

    def text(self, name: str) -> str:
        """The text that was written as ``name``, compared. Raises StoreUnusable as :meth:`check` does."""
        self._check_bytes(name, 0, self._files[name].bytes)
        return self._mapped(name, "uint8").tobytes().decode()

    def damage(self, at_most_bytes: int | None = None) -> str | None:
        """What is wrong with the first file that has changed since it was written; None where every sum agrees.

        With ``at_most_bytes`` only so much is read, small files first.
        """
        left = sum(file.bytes for file in self._files.values()) if at_most_bytes is None else at_most_bytes
        for name, file in sorted(self._files.items(), key=lambda item: item[1].bytes):
            looked_at = min(left, file.bytes)
            found = self._damage_in(name, 0, looked_at)
            if found is not None:
                return found
            left -= looked_at
        return None

    def _check_bytes(self, name: str, begin: int, end: int) -> None:
        found = self._damage_in(name, begin, end)
        if found is not None:
            remade = "run again, and it is made anew" if self._condemn() else "delete the folder and run again"
            raise StoreUnusable(f"{self.folder}: {found}; {remade}")

    def _damage_in(self, name: str, begin: int, end: int) -> str | None:
        """What is wrong from byte ``begin`` to ``end``; blocks that agree are noted, and not looked at again."""
        if begin >= end:
            return None
        file = self._files[name]
        stop = file.first_block + (end - 1) // BLOCK_BYTES + 1
        block = self._checked.find(0, file.first_block + begin // BLOCK_BYTES, stop)
        if block < 0:
            return None
        if self._sums is None:
            return f"{SUMS} has changed since it was written"
        # The very mapping that is read from, and not the file once more.
        content = self._bytes_of(name).data
        while block >= 0:
            at = (block - file.first_block) * BLOCK_BYTES
            if zlib.crc32(content[at : at + BLOCK_BYTES]) != self._sums[block]:
                return f"{name} has changed since it was written (within {BLOCK_BYTES:,} bytes from {at:,})"
            self._checked[block] = 1
            block = self._checked.find(0, block + 1, stop)
        return None

    def _bytes_of(self, name: str) -> NDArray[np.uint8]:
        if self._files[name].type == "text":
            return self._mapped(name, "uint8")
        return self.array(name.removesuffix(".bin")).view(np.uint8)

    @cached_property
    def _sums(self) -> NDArray[np.uint32] | None:
        """The sums themselves, read when the first is needed; None where they are damaged."""
        content = (self.folder / SUMS).read_bytes()
        agrees = hashlib.sha256(content).hexdigest() == self._sha256_of_sums
        return np.frombuffer(content, "<u4") if agrees else None

    def _mapped(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        if not self._files[name].bytes:  # mmap refuses empty files
            return np.empty(0, dtype)
        # A plain view: slicing np.memmap itself costs microseconds each time.
        return np.memmap(self.folder / name, np.dtype(dtype).newbyteorder("<"), mode="r").view(np.ndarray)

    def _condemn(self) -> bool:
        """Take the manifest away, unless another process did or has put a new folder here; whether it is gone."""
        manifest = self.folder / MANIFEST
        try:
            if manifest.stat().st_ino == self._manifest_inode:
                manifest.rename(self.folder / CONDEMNED)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


class Stream:
    """A file that grows by what is appended to it, and the sums of its blocks."""

    def __init__(self, path: Path, kind: str) -> None:
        with _disk_trouble_named(path.parent):
            self._file = path.open("wb", buffering=BUFFER_BYTES)
        self.path = path
        self.type = kind
        self.bytes = 0
        self._sums = array("I")
        self._sum_of_last = 0

    def append(self, values: NDArray[Any] | bytes) -> None:
        """Write ``values`` behind what was there. Raises MachineError when the disk does not take them."""
        if isinstance(values, bytes):
            content = memoryview(values)
        else:
            content = np.ascontiguousarray(values, np.dtype(self.type).newbyteorder("<")).view(np.uint8).data
        with _disk_trouble_named(self.path.parent):
            self._file.write(content)
        begin = 0
        while begin < len(content):
            end = min(len(content), begin + BLOCK_BYTES - self.bytes % BLOCK_BYTES)
            self._sum_of_last = zlib.crc32(content[begin:end], self._sum_of_last)
            self.bytes += end - begin
            if self.bytes % BLOCK_BYTES == 0:
                self._sums.append(self._sum_of_last)
                self._sum_of_last = 0
            begin = end

    def sums(self) -> NDArray[np.uint32]:
        """The CRC-32 of every block, of the last one too where it is not full."""
        last = [self._sum_of_last] if self.bytes % BLOCK_BYTES else []
        return np.array([*self._sums, *last], "<u4")

    def bring_to_disk(self) -> None:
        """Returns when nothing of the file is only in memory."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file, as it is."""
        with suppress(OSError):
            self._file.close()


class FolderBuilder:
    """Writes the files of one folder and remembers their sums; made by :func:`building`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: Mapping[str, Any] = {}
        self._streams: list[Stream] = []

    def stream(self, name: str, dtype: DTypeLike) -> Stream:
        """The array ``name``, to be appended to. Raises MachineError when the disk does not take it."""
        self._streams.append(Stream(self.folder / f"{name}.bin", np.dtype(dtype).name))
        return self._streams[-1]

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole array; it comes back with the type that it has."""
        self.stream(name, values.dtype).append(values)

    def write_text(self, name: str, content: str) -> None:
        """Write a text as the file ``name``."""
        self._streams.append(Stream(self.folder / name, "text"))
        self._streams[-1].append(content.encode())

    def close(self) -> None:
        """Let go of the files, as they are."""
        for stream in self._streams:
            stream.close()

    def seal(self, kind: Kind, key: str) -> None:
        """Bring every file to disk, and then the manifest that vouches for them."""
        files: dict[str, _File] = {}
        sums: list[NDArray[np.uint32]] = []
        for stream in self._streams:
            files[stream.path.name] = _File(stream.bytes, stream.type, sum(one.size for one in sums))
            sums.append(stream.sums())
        with _disk_trouble_named(self.folder):
            content = np.concatenate([np.empty(0, "<u4"), *sums]).tobytes()
            (self.folder / SUMS).write_bytes(content)
            manifest = {
                "format": FORMAT_VERSION,
                "kind": kind,
                "key": key,
                "files": {name: asdict(file) for name, file in files.items()},
                "sha256_of_sums": hashlib.sha256(content).hexdigest(),
                "facts": self.facts,
            }
            text = json.dumps(manifest | {"sha256": _checksum_of(manifest)}, allow_nan=False)
            (self.folder / MANIFEST).write_text(text, encoding="utf-8")
            for stream in self._streams:
                stream.bring_to_disk()
            for name in (SUMS, MANIFEST):
                with (self.folder / name).open("rb+") as file:
                    os.fsync(file.fileno())
            # The temporary folder was private; the finished one is as open as the umask lets new folders be.
            readable = permissions_for_new_file()
            self.folder.chmod(readable | (readable & 0o444) >> 2)
            fsync_folder(self.folder)


@contextmanager
def building(final: Path, kind: Kind, key: str, *, replace: bool = False) -> Iterator[FolderBuilder]:
    """Fill a folder that appears as ``final`` when the block ends, complete, or not at all.

    Where ``final`` is there by then and sound, it stays and ours is thrown away; where it is damaged, ours replaces it.
    With ``replace`` ours takes its place, unless it holds the very same documents: they stay, for the rows of other
    packings in their folder point into them. Raises MachineError when the place cannot be written.
    """
    with _disk_trouble_named(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final.parent)
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=final.parent))
        # Held while this process lives: what has the prefix and no lock was abandoned.
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    builder = FolderBuilder(folder)
    try:
        yield builder
        builder.seal(kind, key)
        with _disk_trouble_named(final.parent):
            _move_into_place(folder, final, kind, key, replace=replace)
    finally:
        builder.close()
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def verify(folder: Path, kind: Kind, key: str, *, at_most_bytes: int | None = None) -> None:
    """Compare every file with its sums, or the first ``at_most_bytes`` of them. Raises StoreUnusable for what is wrong.

    The folder stays as it is.
    """
    opened = SealedFolder(folder, kind)
    if opened.key != key:
        raise StoreUnusable(f"{folder}: it was made from something else")
    found = opened.damage(at_most_bytes)
    if found is not None:
        raise StoreUnusable(f"{folder}: {found}")


def _read_manifest(folder: Path, kind: Kind) -> tuple[dict[str, Any], int]:
    """The manifest, after checking itself and the sizes of its files, and its inode. Raises StoreUnusable."""
    if (folder / CONDEMNED).exists() and not (folder / MANIFEST).exists():
        raise StoreUnusable(f"{folder}: it was found to be damaged")
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as file:
            inode = os.fstat(file.fileno()).st_ino
            manifest = json.load(file)
        claimed = manifest.pop("sha256")
        if manifest["format"] != FORMAT_VERSION:
            raise StoreUnusable(f"{folder}: format {manifest['format']}, and this trainkit reads {FORMAT_VERSION}")
        if claimed != _checksum_of(manifest) or manifest["kind"] != kind:
            raise StoreUnusable(f"{folder}: {MANIFEST} has changed since it was written")
        for name, listed in manifest["files"].items():
            if Path(name).name != name or (folder / name).is_symlink():
                raise StoreUnusable(f"{folder}: {MANIFEST} names a file outside of it")
            if (folder / name).stat().st_size != listed["bytes"]:
                raise StoreUnusable(f"{folder}: {name} has not the {listed['bytes']} bytes that were written")
    except OSError as error:
        raise StoreUnusable(f"{folder}: {Path(error.filename or MANIFEST).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreUnusable(f"{folder}: {MANIFEST} cannot be read") from error
    return dict(manifest), inode


def _checksum_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _move_into_place(folder: Path, final: Path, kind: Kind, key: str, *, replace: bool) -> None:
    for _ in range(8):
        try:
            folder.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            fsync_folder(final.parent)
            return
        if _may_stay(final, folder, kind, key, replace=replace):
            return
        replaced = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=final.parent))
        with suppress(FileNotFoundError):  # somebody else may be replacing it too
            final.rename(replaced / "replaced")
        shutil.rmtree(replaced, ignore_errors=True)
    raise MachineError(f"{final}: it is replaced again and again by others; let one finish, or set TRAINKIT_CACHE")


def _may_stay(found: Path, ours: Path, kind: Kind, key: str, *, replace: bool) -> bool:
    """Whether what was ``found`` in the place of ``ours`` is as good as it."""
    if replace and kind == "rows":
        return False
    try:
        verify(found, kind, key)
        return not replace or _read_manifest(found, kind)[0] == _read_manifest(ours, kind)[0]
    except StoreUnusable:
        return False


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed processes left; a folder whose maker lives is locked."""
    for folder in parent.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < ABANDONED_AFTER_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextmanager
def _disk_trouble_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise MachineError(
            f"cannot write packed data in {folder}: {error.strerror}; {'make room, or ' if full else ''}"
            "give another folder (the environment variable TRAINKIT_CACHE, pack-data's --output)"
        ) from error
