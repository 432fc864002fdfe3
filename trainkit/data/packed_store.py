"""Documents' tokens once, and rows as an index into them.

    <documents>/                 made once for a tokenizer and a set of data files
        tokens.bin               int32, all documents end to end
        trained.bin              bool, beside it: is this token a target?
        offsets.bin ...          one number a document: where it begins, its source, its digest, ...
        places.bin               UTF-8: which example each document is
        rows/<key>/              an index for one way to pack; another sequence_length or seed adds only such a folder
            train-begins.bin ... one number a piece, and where each row begins
            evaluation-...       the same for the held-out rows, where there are any
            prompts.json

Both are sealed folders (:mod:`trainkit.data.sealed_folder`): opening takes the same time whatever their size, and what
is read of them has been compared with its sums. Positions have 64 bits wherever 32 are not enough.

Legend: N documents, K tokens of all documents, P pieces, R rows, T tokens in a row, S segments in a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.data.ledger import Ledger
from trainkit.data.sealed_folder import BLOCK_BYTES, SealedFolder, StoreUnusable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trainkit.data.packing import Positions
    from trainkit.data.sealed_folder import FolderBuilder

DOCUMENT_ARRAYS = {
    "tokens": "int32",
    "trained": "bool",
    "offsets": "int64",
    "targets": "int64",
    "separators": "bool",
    "trained-separators": "bool",
    "sources": "int32",
    "examples": "int64",
    "digests": "uint64",
    "prompts": "bool",
    "place-ends": "int64",
    "places": "uint8",
}
"""The arrays of a documents folder, and what a number of each is."""
TOKENS_AT_ONCE = BLOCK_BYTES // 4
"""Tokens that are compared with their sums together."""
ROWS_AT_ONCE = 4096
"""Rows whose index is compared with its sums together."""

Part = Literal["train", "evaluation"]


@dataclass(frozen=True)
class Row:
    """One row, assembled: T tokens (at most sequence_length, no padding), the targets among them, and its S segments.

    ``trained_T[t]`` says that token t is predicted from those before it in its segment; the first token of a segment
    never is.
    """

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    segment_lengths: NDArray[np.int32]


class Documents:
    """All documents of a store, mapped; ``facts`` is what their maker noted beside them.

    A property compares its whole array with its sums when it is read for the first time; tokens are compared block by
    block. All of it raises StoreUnusable for damage.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, NDArray[Any]],
        facts: Mapping[str, Any],
        sealed: SealedFolder | None = None,
    ) -> None:
        """``arrays`` has the names of DOCUMENT_ARRAYS; ``sealed`` is where they lie, unless they are in memory only."""
        self.folder = folder
        self.facts = facts
        self._arrays = arrays
        self._sealed = sealed
        self.tokens_K: NDArray[np.int32] = arrays["tokens"]
        """Not compared: see :meth:`pieces`."""
        self.trained_K: NDArray[np.bool_] = arrays["trained"]
        """Not compared: see :meth:`check_trained`."""
        blocks = -(-self.tokens_K.size // TOKENS_AT_ONCE)
        self._checked = bytearray(blocks) if sealed else bytearray(b"\1") * blocks

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Map the documents in ``folder``, in constant time. Raises StoreUnusable."""
        sealed = SealedFolder(folder, "documents")
        return cls(folder, {name: sealed.array(name) for name in DOCUMENT_ARRAYS}, sealed.facts, sealed)

    def __len__(self) -> int:
        return self._arrays["targets"].size

    @property
    def offsets_N(self) -> NDArray[np.int64]:
        """Shape (N+1,): document n is tokens ``offsets_N[n]`` to ``offsets_N[n + 1]``."""
        return self._whole("offsets")

    @property
    def targets_N(self) -> NDArray[np.int64]:
        """Trained tokens of each document, its first token left out."""
        return self._whole("targets")

    @property
    def separators_N(self) -> NDArray[np.bool_]:
        """Whether the last token is a separator that was added to the example."""
        return self._whole("separators")

    @property
    def trained_separators_N(self) -> NDArray[np.bool_]:
        """Whether the last token is such a separator, and a target."""
        return self._whole("trained-separators")

    @property
    def sources_N(self) -> NDArray[np.int32]:
        """Number of the source in the recipe, training sources first."""
        return self._whole("sources")

    @property
    def examples_N(self) -> NDArray[np.int64]:
        """Number of the example within its source, from 0."""
        return self._whole("examples")

    @property
    def digests_N(self) -> NDArray[np.uint64]:
        """Of the example's content; equal examples have equal digests."""
        return self._whole("digests")

    @property
    def prompts_N(self) -> NDArray[np.bool_]:
        """Whether the example has a prompt that can be answered."""
        return self._whole("prompts")

    def place(self, document: int) -> str:
        """Which example a document is, as ``train.jsonl:12``."""
        ends_N, places = self._arrays["place-ends"], self._arrays["places"]
        self._check("place-ends", max(0, document - 1), document + 1)
        begin, end = int(ends_N[document - 1]) if document else 0, int(ends_N[document])
        self._check("places", begin, end)
        return places[begin:end].tobytes().decode()

    def pieces(self, begins: Sequence[int], lengths: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """A copy of the tokens from each of ``begins`` on, end to end, and whether each is trained.

        Every block that they stand in has been compared with its sum.
        """
        # Joining memoryviews takes a third of the time of np.concatenate.
        all_ids, all_trained = self.tokens_K.data, self.trained_K.data
        unchecked = self._checked.find
        ids, trained = [], []
        for begin, length in zip(begins, lengths, strict=True):
            end = begin + length
            if unchecked(0, begin // TOKENS_AT_ONCE, (end - 1) // TOKENS_AT_ONCE + 1) >= 0:
                self._check_tokens(begin, end)
            ids.append(all_ids[begin:end])
            trained.append(all_trained[begin:end])
        return np.frombuffer(bytearray().join(ids), "<i4"), np.frombuffer(bytearray().join(trained), np.bool_)

    def _check_tokens(self, begin: int, end: int) -> None:
        stop_block = (end - 1) // TOKENS_AT_ONCE + 1
        block = self._checked.find(0, begin // TOKENS_AT_ONCE, stop_block)
        while block >= 0:
            start = block * TOKENS_AT_ONCE
            stop = min(start + TOKENS_AT_ONCE, self.tokens_K.size)
            self._check("tokens", start, stop)
            self._check("trained", start, stop)
            self._checked[block] = 1
            block = self._checked.find(0, block + 1, stop_block)

    def check_trained(self, begin: int, end: int) -> None:
        """Compare ``trained_K`` alone with its sums from ``begin`` to ``end``, each block once."""
        self._check("trained", begin, end)

    def _whole(self, name: str) -> NDArray[Any]:
        self._check(name, 0, self._arrays[name].size)
        return self._arrays[name]

    def _check(self, name: str, begin: int, end: int) -> None:
        if self._sealed is not None:
            self._sealed.check(name, begin, end)


@dataclass(frozen=True)
class PlacedPieces:
    """Parts of documents, row after row; every array has shape (P,)."""

    document_P: Positions
    begin_P: Positions
    """Position of the first token among all tokens of the store."""
    length_P: NDArray[np.int32]
    overlap_P: NDArray[np.int32]
    """How many of the first tokens repeat the end of the piece before."""


@dataclass(frozen=True)
class PlannedRows:
    """Which pieces make which row: row r is ``pieces[offsets_R[r]:offsets_R[r + 1]]``; ``offsets_R`` is (R+1,).

    ``targets_R`` is the number of trained tokens of each row.
    """

    pieces: PlacedPieces
    offsets_R: NDArray[np.int64]
    targets_R: NDArray[np.integer]
    sequence_length: int
    train_on_overlap: bool
    ledger: Ledger


class PackedRows:
    """The rows of one part of a store. A row does not exist before :meth:`row` assembles it.

    What it is made of is compared with its sums the first time: its methods raise StoreUnusable for damage.
    """

    def __init__(
        self, documents: Documents, plan: PlannedRows, sealed: SealedFolder | None = None, part: Part = "train"
    ) -> None:
        """``sealed`` is where ``plan`` lies as ``part``, unless it is in memory only."""
        self.documents = documents
        self._plan = plan
        self._sealed = sealed
        self._part = part
        groups = -(-plan.targets_R.size // ROWS_AT_ONCE)
        self._checked = bytearray(groups) if sealed else bytearray(b"\1") * groups

    @classmethod
    def open(cls, folder: Path, part: Part = "train") -> PackedRows:
        """Map the rows in ``folder``, a rows folder inside its documents folder, in constant time.

        Raises StoreUnusable.
        """
        sealed = SealedFolder(folder, "rows")
        facts = sealed.facts
        if part not in facts["ledgers"]:
            raise StoreUnusable(f"{folder} holds no {part} rows")
        plan = PlannedRows(
            pieces=PlacedPieces(
                document_P=sealed.array(f"{part}-documents"),
                begin_P=sealed.array(f"{part}-begins"),
                length_P=sealed.array(f"{part}-lengths"),
                overlap_P=sealed.array(f"{part}-overlaps"),
            ),
            offsets_R=sealed.array(f"{part}-rows"),
            targets_R=sealed.array(f"{part}-targets"),
            sequence_length=facts["sequence_length"],
            train_on_overlap=facts["train_on_overlap"],
            ledger=Ledger.from_json(facts["ledgers"][part]),
        )
        return cls(Documents.open(folder.parent.parent), plan, sealed, part)

    def __len__(self) -> int:
        return self._plan.targets_R.size

    @property
    def sequence_length(self) -> int:
        """Slots of a row."""
        return self._plan.sequence_length

    @property
    def ledger(self) -> Ledger:
        """Where every token of these rows' sources went."""
        return self._plan.ledger

    @cached_property
    def plan(self) -> PlannedRows:
        """All pieces of all rows; the whole index has been compared with its sums."""
        if self._sealed is not None:
            for name in ("documents", "begins", "lengths", "overlaps", "rows", "targets"):
                self._sealed.whole(f"{self._part}-{name}")
        return self._plan

    def row(self, index: int) -> Row:
        """Assemble row ``index``; the arrays are the caller's own. Raises IndexError."""
        first, last = self._pieces_of(index)
        pieces = self._plan.pieces
        lengths_S = pieces.length_P[first:last].copy()
        ids_T, trained_T = self.documents.pieces(pieces.begin_P[first:last].tolist(), lengths_S.tolist())
        starts_S = lengths_S.cumsum() - lengths_S
        trained_T[starts_S] = False
        if not self._plan.train_on_overlap:
            overlaps_S = pieces.overlap_P[first:last]
            for segment in overlaps_S.nonzero()[0].tolist():
                start = starts_S.item(segment)
                trained_T[start : start + overlaps_S.item(segment)] = False
        return Row(ids_T, trained_T, lengths_S)

    def trained_tokens(self, index: int) -> int:
        """Targets in row ``index``. Raises IndexError."""
        self._pieces_of(index)
        return int(self._plan.targets_R[index])

    def longest(self, number: int) -> list[int]:
        """The ``number`` rows with the most tokens, or all where there are fewer; the first of equally long ones."""
        tokens_R = np.add.reduceat(self.plan.pieces.length_P, self.plan.offsets_R[:-1])
        return [int(row) for row in np.argsort(-tokens_R, kind="stable")[:number]]

    def documents_of(self, index: int) -> tuple[str, ...]:
        """The places of the examples in row ``index``, in its order. Raises IndexError."""
        first, last = self._pieces_of(index)
        return tuple(self.documents.place(document) for document in self._plan.pieces.document_P[first:last].tolist())

    def _pieces_of(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._plan.targets_R.size:
            raise IndexError(f"there is no row {index}; there are {len(self)}")
        if not self._checked[index // ROWS_AT_ONCE]:
            self._check_index(index // ROWS_AT_ONCE)
        return self._plan.offsets_R.item(index), self._plan.offsets_R.item(index + 1)

    def _check_index(self, group: int) -> None:
        """Compare the index of one group of rows with its sums."""
        assert self._sealed is not None
        begin = group * ROWS_AT_ONCE
        end = min(begin + ROWS_AT_ONCE, len(self))
        self._sealed.check(f"{self._part}-rows", begin, end + 1)
        self._sealed.check(f"{self._part}-targets", begin, end)
        first, last = self._plan.offsets_R.item(begin), self._plan.offsets_R.item(end)
        for name in ("documents", "begins", "lengths", "overlaps"):
            self._sealed.check(f"{self._part}-{name}", first, last)
        self._checked[group] = 1


@dataclass(frozen=True)
class DocumentBatch:
    """Documents on their way into a store, their tokens end to end; every document has at least one token.

    The first token of a document is never a target, whatever ``trained_K`` says of it.
    """

    ids_K: NDArray[np.int32]
    trained_K: NDArray[np.bool_]
    lengths_N: NDArray[np.integer]
    separators_N: NDArray[np.bool_]
    """Whether the last token is a separator that was added to the example."""
    has_prompt_N: NDArray[np.bool_]
    """Whether the example has a prompt that can be answered."""
    source: int
    """Number of the source that all of them are from."""
    examples_N: NDArray[np.integer]
    """Number of the example within the source, from 0."""
    digests_N: NDArray[np.uint64]
    """Of the example's content; equal examples have equal digests."""
    places: Sequence[str]
    """Which example each is, as ``train.jsonl:12``."""

    @cached_property
    def ends_N(self) -> NDArray[np.int64]:
        """Where each document ends among the tokens."""
        return np.cumsum(self.lengths_N, dtype=np.int64)

    @cached_property
    def begins_N(self) -> NDArray[np.int64]:
        """Where each document begins among the tokens."""
        return self.ends_N - self.lengths_N

    @cached_property
    def targets_N(self) -> NDArray[np.int64]:
        """Trained tokens of each document, without the first, which nothing predicts."""
        if not self.begins_N.size:
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.trained_K, self.begins_N, dtype=np.int64) - self.trained_K[self.begins_N]

    def document(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of one document, both (T,)."""
        part = slice(int(self.begins_N[number]), int(self.ends_N[number]))
        return self.ids_K[part], self.trained_K[part]


class DocumentWriter:
    """Takes documents in batches. All of it goes to disk at once: no memory grows with what was written."""

    def __init__(self, builder: FolderBuilder) -> None:
        self._builder = builder
        self._streams = {name: builder.stream(name, dtype) for name, dtype in DOCUMENT_ARRAYS.items()}
        self._streams["offsets"].append(np.zeros(1, np.int64))
        self._documents = 0
        self._tokens = 0
        self._place_bytes = 0

    def append_many(self, batch: DocumentBatch) -> None:
        """Add the documents of ``batch``, in its order. Raises MachineError when the disk does not take them."""
        lengths_N = np.asarray(batch.lengths_N, np.int64)
        ends_N = batch.ends_N
        assert batch.ids_K.size == batch.trained_K.size == (ends_N[-1] if ends_N.size else 0)
        assert lengths_N.min(initial=1) > 0, batch.places[int(lengths_N.argmin())]
        places = [place.encode(errors="backslashreplace") for place in batch.places]
        place_ends_N = np.cumsum(np.fromiter(map(len, places), np.int64, len(places)))
        columns: dict[str, NDArray[Any]] = {
            "offsets": self._tokens + ends_N,
            "targets": batch.targets_N,
            "separators": batch.separators_N,
            "trained-separators": batch.separators_N & batch.trained_K[ends_N - 1] & (lengths_N > 1),
            "sources": np.full(lengths_N.size, batch.source),
            "examples": batch.examples_N,
            "digests": batch.digests_N,
            "prompts": batch.has_prompt_N,
            "place-ends": self._place_bytes + place_ends_N,
        }
        assert all(values.size == lengths_N.size for values in columns.values()), "a number for each document"
        of_tokens = {"tokens": batch.ids_K, "trained": batch.trained_K}
        for name, values in (of_tokens | columns).items():
            self._streams[name].append(values)
        self._streams["places"].append(b"".join(places))
        self._documents += lengths_N.size
        self._tokens += batch.ids_K.size
        self._place_bytes += int(place_ends_N[-1]) if places else 0

    def __len__(self) -> int:
        return self._documents

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Note ``facts`` beside the documents."""
        self._builder.facts = facts


def write_rows(
    builder: FolderBuilder, parts: Mapping[Part, PlannedRows], prompts: str, facts: Mapping[str, Any]
) -> None:
    """Write the index of all parts, which share sequence_length and train_on_overlap; ``prompts`` is a JSON text."""
    for part, plan in parts.items():
        builder.write(f"{part}-documents", plan.pieces.document_P)
        builder.write(f"{part}-begins", plan.pieces.begin_P)
        builder.write(f"{part}-lengths", plan.pieces.length_P)
        builder.write(f"{part}-overlaps", plan.pieces.overlap_P)
        builder.write(f"{part}-rows", plan.offsets_R)
        builder.write(f"{part}-targets", plan.targets_R)
    builder.write_text("prompts.json", prompts)
    builder.facts = {
        **facts,
        "sequence_length": parts["train"].sequence_length,
        "train_on_overlap": parts["train"].train_on_overlap,
        "ledgers": {part: plan.ledger.to_json() for part, plan in parts.items()},
    }


def read_prompts(folder: Path) -> Any:
    """The JSON value that was written as prompts beside rows. Raises StoreUnusable."""
    return json.loads(SealedFolder(folder, "rows").text("prompts.json"))


def read_facts(folder: Path, kind: Literal["documents", "rows"]) -> Mapping[str, Any]:
    """What the maker noted. Raises StoreUnusable."""
    return SealedFolder(folder, kind).facts
