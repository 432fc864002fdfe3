"""Folders that are complete or not there, and rows assembled from them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainkit.data import sealed_folder
from trainkit.data.ledger import Ledger
from trainkit.data.packed_store import (
    TOKENS_AT_ONCE,
    DocumentBatch,
    Documents,
    DocumentWriter,
    PackedRows,
    PlacedPieces,
    PlannedRows,
    read_prompts,
    write_rows,
)
from trainkit.data.row_plan import count_trained
from trainkit.data.sealed_folder import BLOCK_BYTES, StoreUnusable, building

DOCUMENTS = [list(range(100, 110)), [7], [50, 51, 52]]


def one(ids: NDArray[np.integer[Any]], place: str, *, number: int = 0, separator: bool = False) -> DocumentBatch:
    """A batch of one document, all of it trained."""
    return DocumentBatch(
        ids_K=ids.astype(np.int32),
        trained_K=np.ones(ids.size, np.bool_),
        lengths_N=np.array([ids.size]),
        separators_N=np.array([separator]),
        has_prompt_N=np.array([number == 1]),
        source=0,
        examples_N=np.array([number * 10]),
        digests_N=np.array([2**64 - 1 - number], np.uint64),
        places=[place],
    )


def write_documents(folder: Path, key: str = "k", note: str = "first") -> None:
    with building(folder, "documents", key) as builder:
        writer = DocumentWriter(builder)
        for number, ids in enumerate(DOCUMENTS):
            writer.append_many(one(np.array(ids), f"файл.jsonl:{number + 1}", number=number, separator=number == 2))
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
    assert rows.longest(5) == [0, 1]
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
    for ask in (rows.row, rows.trained_tokens, rows.documents_of):
        with pytest.raises(IndexError, match="there are 2"):
            ask(index)


def test_the_longest_rows_are_found_without_reading_any(tmp_path: Path) -> None:
    pieces = PlacedPieces(*(np.array(values) for values in ([0, 2, 0, 1], [0, 11, 5, 10], [4, 2, 5, 1], [0] * 4)))
    rows = PackedRows(
        Documents.open(make_rows(tmp_path / "store").parent.parent),
        replace(plan(), pieces=pieces, offsets_R=np.array([0, 1, 3, 4]), targets_R=np.zeros(3, np.int64)),
    )
    assert [rows.longest(n) for n in (1, 2, 9)] == [[1], [1, 0], [1, 0, 2]]


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="no evaluation rows"):
        PackedRows.open(make_rows(tmp_path / "store"), "evaluation")


def test_a_store_without_documents_opens(tmp_path: Path) -> None:
    with building(tmp_path / "store", "documents", "k") as builder:
        DocumentWriter(builder).finish({})
    assert len(Documents.open(tmp_path / "store")) == 0


batches_of_documents = st.lists(
    st.lists(st.tuples(st.lists(st.booleans(), min_size=1, max_size=9), st.booleans()), max_size=6), max_size=5
)


@settings(max_examples=20)  # each writes a folder and waits for the disk
@given(made=batches_of_documents)
def test_documents_of_many_batches_come_back_as_they_were_written(
    made: list[list[tuple[list[bool], bool]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("batches") / "store"
    with building(folder, "documents", "k") as builder:
        writer = DocumentWriter(builder)
        for source, batch in enumerate(made):
            lengths = np.array([len(flags) for flags, _ in batch], np.int64)
            writer.append_many(
                DocumentBatch(
                    ids_K=np.arange(lengths.sum(), dtype=np.int32) + 100 * source,
                    trained_K=np.array([flag for flags, _ in batch for flag in flags], np.bool_),
                    lengths_N=lengths,
                    separators_N=np.array([separator for _, separator in batch], np.bool_),
                    has_prompt_N=lengths > 2,
                    source=source,
                    examples_N=np.arange(lengths.size) + 7,
                    digests_N=np.arange(lengths.size, dtype=np.uint64) + np.uint64(2**63),
                    places=[f"dé {source}.json:{n} (item {n})" for n in range(lengths.size)],
                )
            )
        assert len(writer) == sum(map(len, made))
        writer.finish({})
    documents = Documents.open(folder)
    everything = [(source, n, *one) for source, batch in enumerate(made) for n, one in enumerate(batch)]
    assert len(documents) == len(everything)
    first_of_source = 0
    for number, (source, n, flags, separator) in enumerate(everything):
        begin, end = documents.offsets_N[number : number + 2].tolist()
        first_of_source = begin if n == 0 else first_of_source
        assert documents.tokens_K[begin:end].tolist() == [
            at - first_of_source + 100 * source for at in range(begin, end)
        ]
        assert documents.trained_K[begin:end].tolist() == flags
        assert documents.targets_N[number] == sum(flags[1:])
        assert documents.separators_N[number] == separator
        assert documents.trained_separators_N[number] == (separator and len(flags) > 1 and flags[-1])
        assert documents.prompts_N[number] == (len(flags) > 2)
        assert documents.sources_N[number] == source
        assert documents.examples_N[number] == n + 7
        assert documents.digests_N[number] == 2**63 + n
        assert documents.place(number) == f"dé {source}.json:{n} (item {n})"


def test_a_name_that_is_no_unicode_is_still_a_place(tmp_path: Path) -> None:
    with building(tmp_path / "store", "documents", "k") as builder:
        writer = DocumentWriter(builder)
        writer.append_many(one(np.arange(3), "caf\udce9.jsonl:1"))
        writer.finish({})
    assert Documents.open(tmp_path / "store").place(0) == "caf\\udce9.jsonl:1"


def holes(folder: Path, tokens: int) -> None:
    """Make the first tokens of a store a hole in the file, before those that are there; the sums are those of zeros."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sums = np.fromfile(folder / "sums.bin", "<u4")
    longer: list[NDArray[np.uint32]] = []
    for name, listed in manifest["files"].items():
        path = folder / name
        blocks = -(-listed["bytes"] // BLOCK_BYTES)
        found = sums[listed["first_block"] : listed["first_block"] + blocks]
        if name in {"tokens.bin", "trained.bin"}:
            size = tokens * np.dtype(listed["type"]).itemsize
            assert size % BLOCK_BYTES == 0
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.truncate(0)
                file.seek(size)
                file.write(content)
            listed["bytes"] += size
            zeros = np.full(size // BLOCK_BYTES, zlib.crc32(bytes(BLOCK_BYTES)), np.uint32)
            found = np.concatenate([zeros, found])
        listed["first_block"] = sum(one.size for one in longer)
        longer.append(found)
    content = np.concatenate(longer).astype("<u4").tobytes()
    (folder / "sums.bin").write_bytes(content)
    del manifest["sha256"]
    manifest["sha256_of_sums"] = hashlib.sha256(content).hexdigest()
    manifest["sha256"] = sealed_folder._checksum_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_tokens_beyond_32_bits_are_read_from_where_they_are(tmp_path: Path) -> None:
    """A store of 10 x 2^30 tokens, 50 GB of which are holes: it opens at once, and its last rows are right."""
    beyond = 10 * 2**30
    write_documents(tmp_path / "store")
    holes(tmp_path / "store", beyond)
    far = plan()
    far = replace(far, pieces=replace(far.pieces, begin_P=far.pieces.begin_P + beyond))
    rows_folder = tmp_path / "store" / "rows" / "r"
    with building(rows_folder, "rows", "r") as builder:
        write_rows(builder, {"train": far}, "[]", {})
    rows = PackedRows.open(rows_folder)
    assert rows.plan.pieces.begin_P.dtype == np.int64
    assert rows.row(0).ids_T.tolist() == list(range(100, 108))
    assert rows.row(1).ids_T.tolist() == [50, 51, 52, 105, 106, 107, 108, 109]
    assert rows.row(1).trained_T.tolist() == [False, True, True, False, False, False, True, True]
    ends = np.array([2**31 + 5, beyond + 3]), np.array([2**31 + 9, beyond + 11])
    assert count_trained(rows.documents, *ends).tolist() == [0, 8]
    assert sum((tmp_path / "store" / name).stat().st_blocks for name in ("tokens.bin", "trained.bin")) < 10_000


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin"])
def test_a_row_is_never_made_of_damaged_tokens(tmp_path: Path, name: str) -> None:
    folder = make_rows(tmp_path / "store")
    flip(tmp_path / "store" / name, 2)
    rows = PackedRows.open(folder)
    assert rows.trained_tokens(0) == 7
    with pytest.raises(StoreUnusable, match=rf"store: {name} has changed .*; run again, and it is made anew"):
        rows.row(0)
    with pytest.raises(StoreUnusable, match="it was found to be damaged"):
        PackedRows.open(folder)


@pytest.mark.parametrize("name", ["begins", "lengths", "overlaps", "documents", "rows", "targets"])
def test_no_row_is_looked_up_in_a_damaged_index(tmp_path: Path, name: str) -> None:
    folder = make_rows(tmp_path / "store")
    flip(folder / f"train-{name}.bin", 1)
    with pytest.raises(StoreUnusable, match=f"train-{name}"):
        PackedRows.open(folder).row(1)
    damaged = make_rows(tmp_path / "other")
    flip(damaged / f"train-{name}.bin", 1)
    with pytest.raises(StoreUnusable, match=f"train-{name}"):
        _ = PackedRows.open(damaged).plan


@pytest.mark.parametrize("name", ["offsets", "targets", "digests", "places", "place-ends"])
def test_numbers_and_places_of_documents_are_compared_too(tmp_path: Path, name: str) -> None:
    write_documents(tmp_path / "store")
    flip(tmp_path / "store" / f"{name}.bin", 0)
    documents = Documents.open(tmp_path / "store")
    with pytest.raises(StoreUnusable, match=rf"{name}\.bin"):
        documents.place(0) if name.startswith("place") else getattr(documents, f"{name}_N")


def test_rows_that_span_many_blocks_are_compared_in_all_of_them(tmp_path: Path) -> None:
    folder, length = tmp_path / "store", 5 * TOKENS_AT_ONCE
    with building(folder, "documents", "k") as builder:
        writer = DocumentWriter(builder)
        writer.append_many(one(np.arange(length), "a.txt"))
        writer.finish({})
    documents = Documents.open(folder)
    pieces = PlacedPieces(np.zeros(1, np.int32), np.array([7]), np.array([length - 9]), np.zeros(1, np.int32))
    long = replace(plan(), pieces=pieces, offsets_R=np.array([0, 1]), targets_R=np.array([length - 10]))
    rows = PackedRows(documents, long)
    assert np.array_equal(rows.row(0).ids_T, np.arange(7, length - 2))
    flip(folder / "tokens.bin", 3 * TOKENS_AT_ONCE * 4 + 100)
    with pytest.raises(StoreUnusable, match=r"tokens\.bin"):
        PackedRows(Documents.open(folder), long).row(0)


MEASURED = """
import sys, threading, time
from pathlib import Path
import numpy as np
from trainkit.data.packed_store import DocumentBatch, Documents, DocumentWriter, PackedRows, write_rows
from trainkit.data.packing_quality import packing_quality
from trainkit.data.row_plan import Selection, plan_rows
from trainkit.data.sealed_folder import building
from trainkit.recipe.schema import Packing, Source

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()

folder, documents, mean = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
with building(folder, "documents", "k") as builder:
    writer = DocumentWriter(builder)
    for first in range(0, documents, 2_000_000 // mean):
        lengths = rng.integers(1, 2 * mean, min(2_000_000 // mean, documents - first))
        lengths[::1000] = 5000  # some are cut
        flags = np.ones(lengths.sum(), np.bool_)
        yes = np.ones(lengths.size, np.bool_)
        number = np.arange(first, first + lengths.size)
        places = [f"train.jsonl:{n}" for n in range(lengths.size)]
        ids = np.arange(flags.size, dtype=np.int32)
        digests = number.astype(np.uint64)
        writer.append_many(DocumentBatch(ids, flags, lengths, yes, yes, 0, number, digests, places))
    writer.finish({})
store = Documents.open(folder)
everything = Selection((Source(path="train.jsonl"),), 0, np.arange(len(store)), {})
plan = plan_rows(store, everything, Packing(sequence_length=2048), 42)
with building(folder / "rows" / "r", "rows", "r") as builder:
    write_rows(builder, {"train": plan}, "[]", {})
rows = PackedRows.open(folder / "rows" / "r")
packing_quality(rows)
for index in range(0, len(rows), max(1, len(rows) // 1000)):
    rows.row(index)
print(store.tokens_K.size, peak - before)
"""


def check_memory(folder: Path, documents: int, mean_length: int, most_bytes: int) -> None:
    """Write, plan, index and read a store in a process of its own, and compare what it held beyond the page cache."""
    program = [sys.executable, "-c", MEASURED, str(folder), str(documents), str(mean_length)]
    said = subprocess.run(program, check=True, capture_output=True, text=True).stdout.split()
    tokens, held_bytes = map(int, said)
    assert 5 * tokens > 2 * most_bytes, "the store is larger than the bound"
    assert held_bytes < most_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no RssAnon here")
def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    check_memory(tmp_path / "store", documents=40_000, mean_length=1200, most_bytes=80 * 2**20)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no RssAnon here")
@pytest.mark.parametrize(("documents", "mean_length"), [(1_000_000, 1000), (9_500_000, 105)])
def test_a_billion_tokens_are_packed_within_a_gibibyte(tmp_path: Path, documents: int, mean_length: int) -> None:
    check_memory(tmp_path / "store", documents, mean_length, most_bytes=2**30)
    shutil.rmtree(tmp_path / "store")
