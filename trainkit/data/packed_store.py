"""Documents' tokens once, and rows as an index into them: two kinds of folders that are complete or not there.

    <documents>/                 made once for a tokenizer and a set of data files
        tokens.bin               int32, all documents end to end
        trained.bin              bool, beside it: is this token a target?
        offsets.bin ...          one number a document: where it begins, its source, its digest, ...
        places.bin               UTF-8: which example each document is
        manifest.json            written last: format, key, and the size and SHA-256 of every file
        rows/<key>/              an index for one way to pack; another sequence_length or seed adds only such a folder
            train-starts.bin ... one number a piece, and where each row begins
            evaluation-...       the same for the held-out rows, where there are any
            prompts.json
            manifest.json

A folder is filled under a temporary name, flushed to disk and then renamed: a process that is killed leaves nothing
that would ever be found, and of two that make the same folder one wins and the other uses it. All files are
little-endian and memory-mapped; positions have 64 bits. Opening checks the manifest and the sizes, in constant time;
``verify`` also checks the sums, which reads everything once.

Legend: N documents, K tokens of all documents, P pieces, R rows, T tokens in a row, S segments in a row.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.data.ledger import Ledger
from trainkit.data.packing import Pieces
from trainkit.errors import DataError, MachineError
from trainkit.run_folder import fsync_folder, permissions_for_new_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import DTypeLike, NDArray

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".building-"
ABANDONED_AFTER_SECONDS = 60.0
DOCUMENT_FILES = (
    "tokens",
    "trained",
    "offsets",
    "targets",
    "separators",
    "sources",
    "examples",
    "digests",
    "prompts",
    "place-ends",
    "places",
)

Part = Literal["train", "evaluation"]


class StoreUnusable(DataError):  # noqa: N818 - it reads as what it says
    """A folder that is damaged, incomplete, or of another format: to be made anew, never to be trusted."""


@dataclass(frozen=True)
class Row:
    """One row, assembled: T tokens (at most sequence_length, no padding), the targets among them, and its S segments.

    ``trained_T[t]`` says that token t is predicted from those before it in its segment; the first token of a segment
    never is.
    """

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    segment_lengths: NDArray[np.int32]


@dataclass(frozen=True)
class Documents:
    """All documents of a store, memory-mapped; ``facts`` is what their maker noted beside them."""

    folder: Path
    tokens_K: NDArray[np.int32]
    trained_K: NDArray[np.bool_]
    offsets_N: NDArray[np.int64]
    """Shape (N+1,): document n is ``tokens_K[offsets_N[n]:offsets_N[n + 1]]``."""
    targets_N: NDArray[np.int64]
    """Trained tokens of each document."""
    separators_N: NDArray[np.bool_]
    """Whether the last token is a separator that was added to the example."""
    sources_N: NDArray[np.int32]
    examples_N: NDArray[np.int64]
    """Number of the example within its source, from 0."""
    digests_N: NDArray[np.uint64]
    """Of the example's content; equal examples have equal digests."""
    prompts_N: NDArray[np.bool_]
    """Whether the example has a prompt that can be answered."""
    place_ends_N: NDArray[np.int64]
    places: NDArray[np.uint8]
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Map the documents in ``folder``, in constant time. Raises StoreUnusable."""
        manifest = _read_manifest(folder, "documents")
        return cls(
            folder=folder,
            tokens_K=_mapped(folder, "tokens", np.int32),
            trained_K=_mapped(folder, "trained", np.bool_),
            offsets_N=_mapped(folder, "offsets", np.int64),
            targets_N=_mapped(folder, "targets", np.int64),
            separators_N=_mapped(folder, "separators", np.bool_),
            sources_N=_mapped(folder, "sources", np.int32),
            examples_N=_mapped(folder, "examples", np.int64),
            digests_N=_mapped(folder, "digests", np.uint64),
            prompts_N=_mapped(folder, "prompts", np.bool_),
            place_ends_N=_mapped(folder, "place-ends", np.int64),
            places=_mapped(folder, "places", np.uint8),
            facts=manifest["facts"],
        )

    def __len__(self) -> int:
        return int(self.targets_N.size)

    def place(self, document: int) -> str:
        """Which example a document is, as ``train.jsonl:12``."""
        begin = int(self.place_ends_N[document - 1]) if document else 0
        return self.places[begin : int(self.place_ends_N[document])].tobytes().decode()


@dataclass(frozen=True)
class PlannedRows:
    """Which pieces make which row: row r is ``pieces[offsets_R[r]:offsets_R[r + 1]]``; ``offsets_R`` is (R+1,).

    ``targets_R`` is the number of trained tokens of each row.
    """

    pieces: Pieces
    offsets_R: NDArray[np.int64]
    targets_R: NDArray[np.int64]
    sequence_length: int
    train_on_overlap: bool
    ledger: Ledger


@dataclass(frozen=True)
class PackedRows:
    """The rows of one part of a store. ``rows[i]`` does not exist before :meth:`row` assembles it."""

    documents: Documents
    plan: PlannedRows

    @classmethod
    def open(cls, folder: Path, part: Part = "train") -> PackedRows:
        """Map the rows in ``folder``, a rows folder inside its documents folder. Raises StoreUnusable."""
        facts = _read_manifest(folder, "rows")["facts"]
        if part not in facts["ledgers"]:
            raise StoreUnusable(f"{folder} holds no {part} rows")
        plan = PlannedRows(
            pieces=Pieces(
                document_P=_mapped(folder, f"{part}-documents", np.int64),
                start_P=_mapped(folder, f"{part}-starts", np.int64),
                length_P=_mapped(folder, f"{part}-lengths", np.int32),
                overlap_P=_mapped(folder, f"{part}-overlaps", np.int32),
            ),
            offsets_R=_mapped(folder, f"{part}-rows", np.int64),
            targets_R=_mapped(folder, f"{part}-targets", np.int64),
            sequence_length=facts["sequence_length"],
            train_on_overlap=facts["train_on_overlap"],
            ledger=Ledger.from_json(facts["ledgers"][part]),
        )
        return cls(Documents.open(folder.parent.parent), plan)

    def __len__(self) -> int:
        return int(self.plan.targets_R.size)

    @property
    def sequence_length(self) -> int:
        """Slots of a row."""
        return self.plan.sequence_length

    @property
    def ledger(self) -> Ledger:
        """Where every token of these rows' sources went."""
        return self.plan.ledger

    def row(self, index: int) -> Row:
        """Assemble row ``index``; the arrays are the caller's own. Raises IndexError."""
        first, last = self._pieces_of(index)
        pieces, documents = self.plan.pieces, self.documents
        begins = (documents.offsets_N[pieces.document_P[first:last]] + pieces.start_P[first:last]).tolist()
        lengths_S = pieces.length_P[first:last].copy()
        spans = [slice(begin, begin + length) for begin, length in zip(begins, lengths_S.tolist(), strict=True)]
        trained_T = np.concatenate([documents.trained_K[span] for span in spans])
        starts_S = np.cumsum(lengths_S) - lengths_S
        trained_T[starts_S] = False
        if not self.plan.train_on_overlap:
            overlaps_S = pieces.overlap_P[first:last]
            for segment in np.flatnonzero(overlaps_S).tolist():
                start = int(starts_S[segment])
                trained_T[start : start + int(overlaps_S[segment])] = False
        return Row(np.concatenate([documents.tokens_K[span] for span in spans]), trained_T, lengths_S)

    def trained_tokens(self, index: int) -> int:
        """Targets in row ``index``. Raises IndexError."""
        self._pieces_of(index)
        return int(self.plan.targets_R[index])

    def tokens(self, index: int) -> int:
        """Tokens in row ``index``, without padding. Raises IndexError."""
        first, last = self._pieces_of(index)
        return int(self.plan.pieces.length_P[first:last].sum())

    def documents_of(self, index: int) -> tuple[str, ...]:
        """The places of the examples in row ``index``, in its order. Raises IndexError."""
        first, last = self._pieces_of(index)
        return tuple(self.documents.place(document) for document in self.plan.pieces.document_P[first:last].tolist())

    def _pieces_of(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index}; there are {len(self)}")
        return int(self.plan.offsets_R[index]), int(self.plan.offsets_R[index + 1])


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


class DocumentWriter:
    """Takes documents in batches. All of it goes to disk at once: no memory grows with what was written."""

    def __init__(self, builder: FolderBuilder) -> None:
        self._builder = builder
        self._append_to = {name: builder.stream(f"{name}.bin") for name in DOCUMENT_FILES}
        self._append_to["offsets"](np.zeros(1, "<i8").tobytes())
        self._documents = 0
        self._tokens = 0
        self._place_bytes = 0

    def append_many(self, batch: DocumentBatch) -> None:
        """Add the documents of ``batch``, in its order. Raises MachineError when the disk does not take them."""
        lengths_N = np.asarray(batch.lengths_N, np.int64)
        ends_N = np.cumsum(lengths_N)
        assert batch.ids_K.size == batch.trained_K.size == (ends_N[-1] if ends_N.size else 0)
        assert lengths_N.min(initial=1) > 0, batch.places[int(lengths_N.argmin())]
        places = [place.encode(errors="backslashreplace") for place in batch.places]
        place_ends_N = np.cumsum(np.fromiter(map(len, places), np.int64, len(places)))
        columns: dict[str, NDArray[Any]] = {
            "tokens": np.asarray(batch.ids_K, "<i4"),
            "trained": np.asarray(batch.trained_K, np.bool_),
            "offsets": (self._tokens + ends_N).astype("<i8"),
            "targets": _targets(batch.trained_K, ends_N - lengths_N).astype("<i8"),
            "separators": np.asarray(batch.separators_N, np.bool_),
            "sources": np.full(lengths_N.size, batch.source, "<i4"),
            "examples": np.asarray(batch.examples_N, "<i8"),
            "digests": np.asarray(batch.digests_N, "<u8"),
            "prompts": np.asarray(batch.has_prompt_N, np.bool_),
            "place-ends": (self._place_bytes + place_ends_N).astype("<i8"),
        }
        of_documents = [values.size for name, values in columns.items() if name not in {"tokens", "trained"}]
        assert of_documents == [len(places)] * len(of_documents)
        for name, values in columns.items():
            self._append_to[name](values.tobytes())
        self._append_to["places"](b"".join(places))
        self._documents += lengths_N.size
        self._tokens += batch.ids_K.size
        self._place_bytes += int(place_ends_N[-1]) if places else 0

    def append(
        self,
        ids_T: NDArray[np.integer],
        trained_T: NDArray[np.bool_],
        *,
        separator: bool,
        source: int,
        example: int,
        digest: int,
        has_prompt: bool,
        place: str,
    ) -> None:
        """Add one document of at least one token; :meth:`append_many` is far faster for many of them."""
        self.append_many(
            DocumentBatch(
                ids_K=np.asarray(ids_T, np.int32),
                trained_K=np.asarray(trained_T, np.bool_),
                lengths_N=np.array([len(ids_T)]),
                separators_N=np.array([separator]),
                has_prompt_N=np.array([has_prompt]),
                source=source,
                examples_N=np.array([example]),
                digests_N=np.array([digest], np.uint64),
                places=[place],
            )
        )

    def __len__(self) -> int:
        return self._documents

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Note ``facts`` beside the documents."""
        self._builder.facts = facts


def _targets(trained_K: NDArray[np.bool_], begins_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Trained tokens of each document that begins at ``begins_N``, without the first, which nothing predicts."""
    if not begins_N.size:
        return np.zeros(0, np.int64)
    return np.add.reduceat(trained_K, begins_N, dtype=np.int64) - trained_K[begins_N]


def write_rows(
    builder: FolderBuilder, parts: Mapping[Part, PlannedRows], prompts: str, facts: Mapping[str, Any]
) -> None:
    """Write the index of all parts, which share sequence_length and train_on_overlap; ``prompts`` is a JSON text."""
    for part, plan in parts.items():
        builder.write(f"{part}-documents", plan.pieces.document_P.astype("<i8"))
        builder.write(f"{part}-starts", plan.pieces.start_P.astype("<i8"))
        builder.write(f"{part}-lengths", plan.pieces.length_P.astype("<i4"))
        builder.write(f"{part}-overlaps", plan.pieces.overlap_P.astype("<i4"))
        builder.write(f"{part}-rows", plan.offsets_R.astype("<i8"))
        builder.write(f"{part}-targets", plan.targets_R.astype("<i8"))
    builder.stream("prompts.json")(prompts.encode())
    builder.facts = {
        **facts,
        "sequence_length": parts["train"].sequence_length,
        "train_on_overlap": parts["train"].train_on_overlap,
        "ledgers": {part: plan.ledger.to_json() for part, plan in parts.items()},
    }


class FolderBuilder:
    """Writes the files of one folder and remembers their sizes and sums; made by :func:`building`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: Mapping[str, Any] = {}
        self._files: dict[str, tuple[Any, Any]] = {}

    def stream(self, name: str) -> Callable[[bytes], None]:
        """A function that appends to the file ``name``. Raises MachineError when the disk does not take it."""
        with _disk_trouble_named(self.folder):
            file = (self.folder / name).open("wb", buffering=2**20)
        checksum = hashlib.sha256()
        self._files[name] = (file, checksum)

        def append(content: bytes) -> None:
            checksum.update(content)
            with _disk_trouble_named(self.folder):
                file.write(content)

        return append

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole array as ``name``.bin."""
        self.stream(f"{name}.bin")(values.tobytes())

    def close(self) -> None:
        """Let go of the files, as they are."""
        for file, _ in self._files.values():
            with suppress(OSError):
                file.close()

    def seal(self, kind: str, key: str) -> None:
        """Bring every file to disk, and then the manifest that vouches for them."""
        with _disk_trouble_named(self.folder):
            listed = {}
            for file, checksum in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                listed[Path(file.name).name] = {"bytes": file.tell(), "sha256": checksum.hexdigest()}
            manifest = {"format": FORMAT_VERSION, "kind": kind, "key": key, "files": listed, "facts": self.facts}
            with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(manifest | {"sha256": _checksum_of(manifest)}, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            # The temporary folder was private; the finished one is as open as the umask lets new folders be.
            readable = permissions_for_new_file()
            self.folder.chmod(readable | (readable & 0o444) >> 2)
            fsync_folder(self.folder)


@contextmanager
def building(
    final: Path, kind: Literal["documents", "rows"], key: str, *, replace: bool = False
) -> Iterator[FolderBuilder]:
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


def verify(folder: Path, kind: Literal["documents", "rows"], key: str) -> None:
    """Read every file and compare its sum. Raises StoreUnusable with what is wrong."""
    manifest = _read_manifest(folder, kind)
    if manifest["key"] != key:
        raise StoreUnusable(f"{folder}: it was made from something else")
    for name, listed in manifest["files"].items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StoreUnusable(f"{folder}: {name}: {error.strerror}") from error
        if found != listed["sha256"]:
            raise StoreUnusable(f"{folder}: {name} has changed since it was written")


def read_prompts(folder: Path) -> Any:
    """The JSON value that was written as prompts."""
    return json.loads((folder / "prompts.json").read_text(encoding="utf-8"))


def read_facts(folder: Path, kind: Literal["documents", "rows"]) -> Mapping[str, Any]:
    """What the maker noted. Raises StoreUnusable."""
    facts: Mapping[str, Any] = _read_manifest(folder, kind)["facts"]
    return facts


def _read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest, after checking itself and the sizes of its files. Raises StoreUnusable."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        if manifest["format"] != FORMAT_VERSION:
            raise StoreUnusable(f"{folder}: format {manifest['format']}, and this trainkit reads {FORMAT_VERSION}")
        if claimed != _checksum_of(manifest) or manifest["kind"] != kind:
            raise StoreUnusable(f"{folder}: {MANIFEST} has changed since it was written")
        for name, listed in manifest["files"].items():
            if (folder / name).stat().st_size != listed["bytes"]:
                raise StoreUnusable(f"{folder}: {name} has not the {listed['bytes']} bytes that were written")
    except OSError as error:
        raise StoreUnusable(f"{folder}: {Path(error.filename or MANIFEST).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreUnusable(f"{folder}: {MANIFEST} cannot be read") from error
    return dict(manifest)


def _checksum_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _mapped(folder: Path, name: str, dtype: DTypeLike) -> NDArray[Any]:
    path = folder / f"{name}.bin"
    if path.stat().st_size == 0:  # mmap refuses empty files
        return np.empty(0, dtype)
    # A plain view: slicing np.memmap itself costs microseconds each time.
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r").view(np.ndarray)


def _move_into_place(folder: Path, final: Path, kind: Literal["documents", "rows"], key: str, *, replace: bool) -> None:
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


def _may_stay(found: Path, ours: Path, kind: Literal["documents", "rows"], key: str, *, replace: bool) -> bool:
    """Whether what was ``found`` in the place of ``ours`` is as good as it."""
    if replace and kind == "rows":
        return False
    try:
        verify(found, kind, key)
        return not replace or _read_manifest(found, kind) == _read_manifest(ours, kind)
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
        raise MachineError(
            f"cannot write packed data in {folder}: {error.strerror}; "
            "make room or give another folder in the environment variable TRAINKIT_CACHE"
        ) from error
