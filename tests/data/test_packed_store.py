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
