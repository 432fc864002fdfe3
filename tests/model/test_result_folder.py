"""A folder of results is whole or not there, and what a kill left of one in the making goes, and nothing else."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from trainkit.errors import MachineError, UsageError
from trainkit.model.result_folder import MARK, new_folder


def write(folder: Path, content: str) -> None:
    with new_folder(folder, replace=True, size_bytes=9) as staging:
        (staging / "weights").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_whole_and_replaces_what_we_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    for content in ("first", "second"):
        write(folder, content)
        assert (folder / "weights").read_text() == content
        assert names(tmp_path) == ["final"]
        assert names(folder) == ["SHA256SUMS", "weights"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, which trainkit did not write"):
        write(folder, "third")


def killed(folder: Path, name: str, *, earlier: bool = False, marked: bool = True) -> Path:
    """What a process leaves that is killed while it writes ``folder``."""
    workplace = folder.with_name(f".{folder.name}.{name}")
    (workplace / "new").mkdir(parents=True)
    (workplace / "new" / "weights").write_text("half")
    if marked:
        (workplace / MARK).touch()
    if earlier:
        folder.rename(workplace / "earlier")
    return workplace


def test_what_kills_left_goes_with_the_next_one(tmp_path: Path) -> None:
    killed(tmp_path / "final", "abcd1234")
    (tmp_path / ".final.efgh5678").mkdir()
    write(tmp_path / "final", "whole")
    assert names(tmp_path) == ["final"]


def test_what_may_be_somebody_elses_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    killed(elsewhere / "final", "abcd1234")
    (tmp_path / ".final.linked00").symlink_to(elsewhere / ".final.abcd1234")
    killed(tmp_path / "final", "notmarkd", marked=False)
    killed(tmp_path / "final", "a-longer-name")
    killed(tmp_path / "other", "abcd1234")
    (tmp_path / ".final.afile000").write_text("mine")
    living = killed(tmp_path / "final", "living00")
    noted = killed(tmp_path / "final", "noted000")
    (noted / "notes.txt").write_text("mine")
    before = names(tmp_path)
    descriptor = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write(tmp_path / "final", "whole")
    finally:
        os.close(descriptor)
    assert names(tmp_path) == sorted([*before, "final"])
    assert names(living) == [MARK, "new"]
    assert names(noted) == ["notes.txt"]
    assert names(elsewhere / ".final.abcd1234") == [MARK, "new"]


def test_the_result_that_a_kill_had_put_aside_is_back_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    write(folder, "good")
    killed(folder, "abcd1234", earlier=True)
    assert not folder.exists()
    with new_folder(folder, replace=True, size_bytes=9):
        assert (folder / "weights").read_text() == "good"


def test_where_the_new_one_cannot_take_its_place_the_earlier_one_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "final"
    write(folder, "good")
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            write(folder, "better")
    assert (folder / "weights").read_text() == "good"
    assert names(tmp_path) == ["final"]


def test_a_workplace_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look between its making and its locking."""
    real, made = tempfile.mkdtemp, list[str]()

    def taken(**keywords: Any) -> str:
        made.append(real(**keywords))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    write(tmp_path / "final", "whole")
    assert len(made) == 2
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), SafetensorError("I/O error: No space left (28)")])
def test_a_full_disk_says_how_many_bytes_are_missing(tmp_path: Path, error: Exception) -> None:
    folder = tmp_path / "not" / "yet" / "final"
    free = shutil.disk_usage(tmp_path).free

    def write_in_vain() -> None:
        with new_folder(folder, replace=True, size_bytes=free + 10**9) as staging:
            (staging / "weights").write_bytes(b"x" * 5 * 2**20)
            raise error

    with pytest.raises(MachineError) as raised:
        write_in_vain()
    said = re.fullmatch(
        rf"{folder}: cannot be written: the disk is full \(([\d,]+) bytes more are needed\); free some space",
        str(raised.value),
    )
    assert said
    assert int(said[1].replace(",", "")) == pytest.approx(10**9, abs=10**8)  # others write to this disk too
    assert names(folder.parent) == []
