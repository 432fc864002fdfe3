"""Folders that are complete or not there, and rows assembled from them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainkit.data import sealed_folder
from trainkit.data.ledger import Ledger
from trainkit.data.packed_store import (
    Documents,
    DocumentWriter,
    PackedRows,
    PlacedPieces,
    PlannedRows,
    read_prompts,
    write_rows,
)
from trainkit.data.sealed_folder import StoreUnusable, building, verify
from trainkit.errors import MachineError

DOCUMENTS = [list(range(100, 110)), [7], [50, 51, 52]]


def write_documents(folder: Path, key: str = "k", note: str = "first") -> None:
    with building(folder, "documents", key) as builder:
        writer = DocumentWriter(builder)
        for number, ids in enumerate(DOCUMENTS):
            writer.append(
                np.array(ids, np.int32),
                np.ones(len(ids), np.bool_),
                separator=number == 2,
                source=0,
                example=number * 10,
                digest=2**64 - 1 - number,
                has_prompt=number == 1,
                place=f"файл.jsonl:{number + 1}",
            )
        writer.finish({"note": note})


def plan(train_on_overlap: bool = False) -> PlannedRows:
    """Two rows of eight: [8 tokens of document 0] and [document 2, the rest of document 0 with 3 repeated]."""
    return PlannedRows(
        pieces=PlacedPieces(
            document_P=np.array([0, 2, 0]),
            begin_P=np.array([0, 11, 5]),
            length_P=np.array([8, 3, 5], np.int32),
            overlap_P=np.array([0, 0, 3], np.int32),
        ),
        offsets_R=np.array([0, 1, 3]),
        targets_R=np.array([7, 4]),
        sequence_length=8,
        train_on_overlap=train_on_overlap,
        ledger=Ledger(sequence_length=8, rows=2, pieces=3, documents=2, read=12),
    )


def make_rows(folder: Path, **options: bool) -> Path:
    write_documents(folder)
    rows = folder / "rows" / "r"
    with building(rows, "rows", "r") as builder:
        write_rows(builder, {"train": plan(**options)}, json.dumps(["prompt"]), {"sentence": "made"})
    return rows


def test_documents_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_documents(tmp_path / "store")
    documents = Documents.open(tmp_path / "store")
    assert len(documents) == 3
    assert [
        documents.tokens_K[a:b].tolist() for a, b in zip(documents.offsets_N, documents.offsets_N[1:], strict=False)
    ] == DOCUMENTS
    assert documents.targets_N.tolist() == [9, 0, 2]  # a first token is never a target
    assert documents.separators_N.tolist() == [False, False, True]
    assert documents.examples_N.tolist() == [0, 10, 20]
    assert documents.digests_N.tolist() == [2**64 - 1, 2**64 - 2, 2**64 - 3]
    assert documents.prompts_N.tolist() == [False, True, False]
    assert [documents.place(n) for n in range(3)] == ["файл.jsonl:1", "файл.jsonl:2", "файл.jsonl:3"]
    assert documents.facts == {"note": "first"}
    assert documents.offsets_N.dtype == np.int64


def test_rows_are_assembled_from_pieces(tmp_path: Path) -> None:
    rows = PackedRows.open(make_rows(tmp_path / "store"))
    assert len(rows) == 2
    first, second = rows.row(0), rows.row(1)
    assert first.ids_T.tolist() == list(range(100, 108))
    assert first.trained_T.tolist() == [False] + [True] * 7
    assert second.ids_T.tolist() == [50, 51, 52, 105, 106, 107, 108, 109]
    assert second.trained_T.tolist() == [False, True, True, False, False, False, True, True]
    assert second.segment_lengths.tolist() == [3, 5]
    assert [str(a.dtype) for a in (first.ids_T, first.trained_T, first.segment_lengths)] == ["int32", "bool", "int32"]
    assert [rows.trained_tokens(i) for i in range(2)] == [7, 4]
    assert [rows.tokens(i) for i in range(2)] == [8, 8]
    assert rows.documents_of(1) == ("файл.jsonl:3", "файл.jsonl:1")
    assert rows.sequence_length == 8
    assert rows.ledger.read == 12
    assert read_prompts(tmp_path / "store" / "rows" / "r") == ["prompt"]


def test_overlap_is_trained_on_request_but_never_the_first_token_of_a_segment(tmp_path: Path) -> None:
    rows = PackedRows.open(make_rows(tmp_path / "store", train_on_overlap=True))
    assert rows.row(1).trained_T.tolist() == [False, True, True, False, True, True, True, True]


def test_a_row_is_a_copy(tmp_path: Path) -> None:
    rows = PackedRows.open(make_rows(tmp_path / "store"))
    rows.row(0).ids_T[:] = 0
    rows.row(0).trained_T[:] = False
    rows.row(0).segment_lengths[:] = 0
    assert rows.row(0).ids_T.tolist() == list(range(100, 108))
    assert rows.row(0).segment_lengths.tolist() == [8]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_row_that_is_not_there(tmp_path: Path, index: int) -> None:
    rows = PackedRows.open(make_rows(tmp_path / "store"))
    for ask in (rows.row, rows.tokens, rows.trained_tokens, rows.documents_of):
        with pytest.raises(IndexError, match="there are 2"):
            ask(index)


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="no evaluation rows"):
        PackedRows.open(make_rows(tmp_path / "store"), "evaluation")


def test_a_store_without_documents_opens(tmp_path: Path) -> None:
    with building(tmp_path / "store", "documents", "k") as builder:
        DocumentWriter(builder).finish({})
    assert len(Documents.open(tmp_path / "store")) == 0


def test_opening_does_not_read_the_tokens(tmp_path: Path) -> None:
    """A store of 40 GB (a hole in the file) opens at once: sizes are checked, sums only by verify."""
    write_documents(tmp_path / "store")
    tokens = tmp_path / "store" / "tokens.bin"
    os.truncate(tokens, 40 * 2**30)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["tokens.bin"]["bytes"] = 40 * 2**30
    manifest["sha256"] = sealed_folder._checksum_of(manifest)
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    documents = Documents.open(tmp_path / "store")
    assert int(documents.tokens_K[10 * 2**30 - 1]) == 0
    assert documents.tokens_K[:3].tolist() == [100, 101, 102]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "places.bin"])
def test_a_flipped_bit_is_found_by_verify(tmp_path: Path, name: str) -> None:
    write_documents(tmp_path / "store")
    verify(tmp_path / "store", "documents", "k")
    path = tmp_path / "store" / name
    content = bytearray(path.read_bytes())
    content[3] ^= 16
    path.write_bytes(content)
    with pytest.raises(StoreUnusable, match=f"{name} has changed"):
        verify(tmp_path / "store", "documents", "k")


def test_a_file_cut_short_is_found_by_opening(tmp_path: Path) -> None:
    write_documents(tmp_path / "store")
    os.truncate(tmp_path / "store" / "trained.bin", 5)
    with pytest.raises(StoreUnusable, match=r"trained\.bin has not the 14 bytes"):
        Documents.open(tmp_path / "store")


def test_a_missing_file_is_found_by_opening(tmp_path: Path) -> None:
    write_documents(tmp_path / "store")
    (tmp_path / "store" / "targets.bin").unlink()
    with pytest.raises(StoreUnusable, match=r"targets\.bin: No such file"):
        Documents.open(tmp_path / "store")
    with pytest.raises(StoreUnusable, match="No such file"):
        Documents.open(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1, "format": 2}', "\x00\x01"])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    write_documents(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(text)
    with pytest.raises(StoreUnusable, match=r"manifest\.json"):
        Documents.open(tmp_path / "store")


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "store", note="first")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("first", "frist"))
    with pytest.raises(StoreUnusable, match=r"manifest\.json has changed"):
        Documents.open(tmp_path / "store")


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "store")
    monkeypatch.setattr(sealed_folder, "FORMAT_VERSION", sealed_folder.FORMAT_VERSION + 1)
    with pytest.raises(StoreUnusable, match="format 2, and this trainkit reads 3"):
        Documents.open(tmp_path / "store")


def test_another_key_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "store")
    with pytest.raises(StoreUnusable, match="made from something else"):
        verify(tmp_path / "store", "documents", "other")


def test_what_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with building(tmp_path / "store", "documents", "k") as builder:
            builder.write("tokens", np.arange(10))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_of_two_makers_one_wins_and_the_other_uses_it(tmp_path: Path) -> None:
    with building(tmp_path / "store", "documents", "k") as builder:
        write_documents(tmp_path / "store", note="the winner")
        DocumentWriter(builder).finish({"note": "the loser"})
    assert Documents.open(tmp_path / "store").facts == {"note": "the winner"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_store_is_replaced(tmp_path: Path) -> None:
    write_documents(tmp_path / "store", note="damaged")
    (tmp_path / "store" / "tokens.bin").write_bytes(b"")
    write_documents(tmp_path / "store", note="new")
    verify(tmp_path / "store", "documents", "k")
    assert Documents.open(tmp_path / "store").facts == {"note": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


KILLED = """
import os, sys, signal
from pathlib import Path
import numpy as np
from trainkit.data.packed_store import DocumentWriter
from trainkit.data.sealed_folder import building
with building(Path(sys.argv[1]), "documents", "k") as builder:
    writer = DocumentWriter(builder)
    about = dict(separator=False, source=0, example=0, digest=1, has_prompt=False, place="x")
    writer.append(np.arange(9), np.ones(9, bool), **about)
    writer.finish({})
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
    write_documents(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_is_being_filled_is_not_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_folder, "ABANDONED_AFTER_SECONDS", -1.0)
    with building(tmp_path / "slow", "documents", "k") as builder:
        write_documents(tmp_path / "quick")
        assert builder.folder.exists()
        DocumentWriter(builder).finish({})
    assert len(Documents.open(tmp_path / "slow")) == 0


def test_a_place_that_cannot_be_written_is_a_matter_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MachineError, match=r"cannot write packed data.*TRAINKIT_CACHE"):
        write_documents(tmp_path / "file" / "store")


def test_a_full_disk_is_a_matter_of_the_machine_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def fill() -> None:
        with building(tmp_path / "store", "documents", "k") as builder:
            (builder.folder / "tokens.bin").symlink_to("/dev/full")
            builder.write("tokens", np.zeros(2**20, np.int64))
            builder.seal("documents", "k")

    with pytest.raises(MachineError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_umask_lets_new_files_be(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_documents(tmp_path / "store")
    finally:
        os.umask(before)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "store" / "tokens.bin").stat().st_mode & 0o777 == 0o640
