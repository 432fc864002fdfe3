"""Folders that are complete or not there, and damage that is found before it is used."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import sealed_folder
from trainkit.data.sealed_folder import BLOCK_BYTES, SealedFolder, StoreUnusable, Stream, building, verify
from trainkit.errors import MachineError

NUMBERS = np.arange(3 * BLOCK_BYTES // 8 + 5)  # three blocks and a little
FLAGS = np.arange(1000) % 3 == 0


def write_folder(folder: Path, key: str = "k", note: str = "first", *, replace: bool = False) -> None:
    with building(folder, "documents", key, replace=replace) as builder:
        builder.write("numbers", NUMBERS)
        builder.write("flags", FLAGS)
        builder.write("nothing", np.empty(0, np.int32))
        builder.write_text("said.json", '"да"')
        builder.facts = {"note": note}


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        found = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([found ^ 16]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "store")
    return tmp_path / "store"


def test_what_was_written_comes_back(folder: Path) -> None:
    sealed = SealedFolder(folder, "documents")
    assert (sealed.key, sealed.facts) == ("k", {"note": "first"})
    assert np.array_equal(sealed.whole("numbers"), NUMBERS)
    assert np.array_equal(sealed.whole("flags"), FLAGS)
    assert sealed.whole("nothing").size == 0
    assert [sealed.array(name).dtype for name in ("numbers", "flags", "nothing")] == [np.int64, np.bool_, np.int32]
    assert sealed.text("said.json") == '"да"'
    verify(folder, "documents", "k")


@settings(max_examples=30)
@given(pieces=st.lists(st.integers(0, 200_000), max_size=6))
def test_sums_do_not_depend_on_how_a_file_was_appended_to(
    pieces: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = np.random.default_rng(0).integers(0, 256, sum(pieces), np.uint8)
    path = tmp_path_factory.mktemp("stream") / "bytes.bin"
    stream = Stream(path, "uint8")
    for part in np.split(content, np.cumsum(pieces)[:-1]) if pieces else []:
        stream.append(part)
    stream.bring_to_disk()
    stream.close()
    assert path.read_bytes() == content.tobytes()
    blocks = [content[at : at + BLOCK_BYTES].tobytes() for at in range(0, content.size, BLOCK_BYTES)]
    assert stream.sums().tolist() == [zlib.crc32(block) for block in blocks]


@pytest.mark.parametrize("name", ["numbers.bin", "flags.bin", "said.json", "sums.bin"])
def test_a_flipped_bit_is_found_by_verify(folder: Path, name: str) -> None:
    flip(folder / name, 3)
    with pytest.raises(StoreUnusable, match=rf"store: {name.replace('.', '[.]')} has changed since it was written"):
        verify(folder, "documents", "k")
    assert (folder / "manifest.json").exists()


@settings(max_examples=20)  # each writes a folder and waits for the disk
@given(byte=st.integers(0, NUMBERS.nbytes - 1))
def test_damage_is_found_when_its_block_is_first_read_and_not_before(
    byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sealed") / "store"
    write_folder(folder)
    flip(folder / "numbers.bin", byte)
    sealed = SealedFolder(folder, "documents")
    damaged = byte // BLOCK_BYTES
    for block in range(-(-NUMBERS.nbytes // BLOCK_BYTES)):
        first, last = block * BLOCK_BYTES // 8, min(NUMBERS.size, (block + 1) * BLOCK_BYTES // 8)
        if block != damaged:
            sealed.check("numbers", first, last)
    assert (folder / "manifest.json").exists()
    with pytest.raises(
        StoreUnusable, match=rf"numbers\.bin has changed .* from {damaged * BLOCK_BYTES:,}\); run again"
    ):
        sealed.check("numbers", byte // 8, byte // 8 + 1)


def test_damage_that_was_found_once_keeps_the_folder_from_being_opened(folder: Path) -> None:
    flip(folder / "flags.bin", 7)
    sealed = SealedFolder(folder, "documents")
    with pytest.raises(StoreUnusable, match="run again, and it is made anew"):
        sealed.whole("flags")
    with pytest.raises(StoreUnusable, match="run again, and it is made anew"):  # and again, for another process
        sealed.whole("flags")
    with pytest.raises(StoreUnusable, match="it was found to be damaged"):
        SealedFolder(folder, "documents")
    write_folder(folder, note="new")
    assert SealedFolder(folder, "documents").facts == {"note": "new"}


def test_damage_in_what_was_replaced_meanwhile_does_not_condemn_the_new_folder(folder: Path) -> None:
    flip(folder / "flags.bin", 7)
    old = SealedFolder(folder, "documents")
    old.array("flags")
    write_folder(folder, note="new")
    with pytest.raises(StoreUnusable, match="has changed"):
        old.check("flags", 0, 10)
    assert SealedFolder(folder, "documents").facts == {"note": "new"}


def test_damaged_sums_are_damage(folder: Path) -> None:
    flip(folder / "sums.bin", 0)
    sealed = SealedFolder(folder, "documents")
    with pytest.raises(StoreUnusable, match=r"sums\.bin has changed since it was written; run again"):
        sealed.whole("numbers")


def test_only_so_much_is_compared_at_once_and_small_files_first(folder: Path) -> None:
    flip(folder / "numbers.bin", 2 * BLOCK_BYTES + 1)
    verify(folder, "documents", "k", at_most_bytes=BLOCK_BYTES)
    with pytest.raises(StoreUnusable, match=r"numbers\.bin has changed"):
        verify(folder, "documents", "k", at_most_bytes=3 * BLOCK_BYTES)
    flip(folder / "flags.bin", 1)
    with pytest.raises(StoreUnusable, match=r"flags\.bin has changed"):
        verify(folder, "documents", "k", at_most_bytes=BLOCK_BYTES)


def test_a_block_is_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def crc32(content: bytes) -> int:
        compared.append(len(content))
        return zlib.crc32(content)

    monkeypatch.setattr(sealed_folder, "zlib", type("Counting", (), {"crc32": staticmethod(crc32)}))
    sealed = SealedFolder(folder, "documents")
    assert compared == []
    for _ in range(3):
        sealed.whole("numbers")
    assert compared == [BLOCK_BYTES] * 3 + [40]


def test_a_file_cut_short_is_found_by_opening(folder: Path) -> None:
    os.truncate(folder / "flags.bin", 5)
    with pytest.raises(StoreUnusable, match=r"flags\.bin has not the 1000 bytes"):
        SealedFolder(folder, "documents")


def test_a_missing_file_is_found_by_opening(folder: Path) -> None:
    (folder / "flags.bin").unlink()
    with pytest.raises(StoreUnusable, match=r"flags\.bin: No such file"):
        SealedFolder(folder, "documents")
    with pytest.raises(StoreUnusable, match="No such file"):
        SealedFolder(folder / "nowhere", "documents")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1, "format": 2}', "\x00\x01"])
def test_a_broken_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StoreUnusable, match=r"manifest\.json"):
        SealedFolder(folder, "documents")


def test_a_manifest_that_was_edited_is_refused(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("first", "frist", 1))
    with pytest.raises(StoreUnusable, match=r"manifest\.json has changed"):
        SealedFolder(folder, "documents")


def test_another_format_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_folder, "FORMAT_VERSION", sealed_folder.FORMAT_VERSION + 1)
    with pytest.raises(StoreUnusable, match="format 2, and this trainkit reads 3"):
        SealedFolder(folder, "documents")


def test_another_key_or_kind_is_refused(folder: Path) -> None:
    with pytest.raises(StoreUnusable, match="made from something else"):
        verify(folder, "documents", "other")
    with pytest.raises(StoreUnusable, match=r"manifest\.json"):
        SealedFolder(folder, "rows")


def test_what_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with building(tmp_path / "store", "documents", "k") as builder:
            builder.write("numbers", np.arange(10))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_of_two_makers_one_wins_and_the_other_uses_it(tmp_path: Path) -> None:
    with building(tmp_path / "store", "documents", "k") as builder:
        write_folder(tmp_path / "store", note="the winner")
        builder.facts = {"note": "the loser"}
    assert SealedFolder(tmp_path / "store", "documents").facts == {"note": "the winner"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_folder_is_replaced(folder: Path) -> None:
    (folder / "numbers.bin").write_bytes(b"")
    write_folder(folder, note="new")
    verify(folder, "documents", "k")
    assert SealedFolder(folder, "documents").facts == {"note": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["store"]


def test_the_same_documents_stay_where_they_are_to_be_replaced(folder: Path) -> None:
    (folder / "rows").mkdir()
    write_folder(folder, replace=True)
    assert (folder / "rows").exists()
    write_folder(folder, note="other", replace=True)
    assert not (folder / "rows").exists()


KILLED = """
import os, sys, signal
from pathlib import Path
import numpy as np
from trainkit.data.sealed_folder import building
with building(Path(sys.argv[1]), "documents", "k") as builder:
    stream = builder.stream("numbers", np.int64)
    stream.append(np.arange(100_000))
    if sys.argv[2] == "sealed":
        builder.seal("documents", "k")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["unsealed", "sealed"])
def test_a_killed_maker_leaves_nothing_that_is_found_and_the_next_one_cleans_up(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store"), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(sealed_folder, "ABANDONED_AFTER_SECONDS", 0.0)
    write_folder(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_is_being_filled_is_not_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_folder, "ABANDONED_AFTER_SECONDS", -1.0)
    with building(tmp_path / "slow", "documents", "k") as builder:
        write_folder(tmp_path / "quick")
        assert builder.folder.exists()
    assert SealedFolder(tmp_path / "slow", "documents").facts == {}


def test_a_place_that_cannot_be_written_is_a_matter_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MachineError, match=r"cannot write packed data.*TRAINKIT_CACHE"):
        write_folder(tmp_path / "file" / "store")


def test_a_full_disk_is_a_matter_of_the_machine_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def fill() -> None:
        with building(tmp_path / "store", "documents", "k") as builder:
            (builder.folder / "numbers.bin").symlink_to("/dev/full")
            builder.write("numbers", np.zeros(2**20, np.int64))

    with pytest.raises(MachineError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room_bytes", [100, 2 * BLOCK_BYTES, NUMBERS.nbytes - 1])
def test_a_disk_that_is_full_in_the_middle_leaves_nothing(tmp_path: Path, room_bytes: int) -> None:
    """The kernel refuses to let any file grow past a limit, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
    try:
        with pytest.raises(MachineError, match=r"cannot write packed data in .*: File too large; make room"):
            write_folder(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


BOTH = """
import sys, time
from pathlib import Path
import numpy as np
from trainkit.data.sealed_folder import building, verify
for round in range(20):
    while time.time() < float(sys.argv[2]) + round / 50:
        pass
    with building(Path(sys.argv[1]) / str(round), "documents", "k") as builder:
        builder.write("numbers", np.arange(1000))
    verify(Path(sys.argv[1]) / str(round), "documents", "k")
"""


def test_two_processes_that_make_the_same_folders_do_not_disturb_each_other(tmp_path: Path) -> None:
    import time

    arguments = [sys.executable, "-c", BOTH, str(tmp_path), str(time.time() + 0.8)]
    both = [subprocess.Popen(arguments) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(20)))


def test_files_are_as_readable_as_the_umask_lets_new_files_be(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "store")
    finally:
        os.umask(before)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()} == {0o640}


def test_the_manifest_says_what_another_program_needs_to_read_the_files(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = manifest["files"]["numbers.bin"]
    assert listed == {"bytes": NUMBERS.nbytes, "type": "int64", "first_block": 0}
    assert manifest["files"]["flags.bin"]["first_block"] == 4
    assert np.fromfile(folder / "numbers.bin", listed["type"]).tolist() == NUMBERS.tolist()
    sums = np.fromfile(folder / "sums.bin", "<u4")
    assert sums[0] == zlib.crc32((folder / "numbers.bin").read_bytes()[:BLOCK_BYTES])
