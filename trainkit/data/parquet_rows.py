"""Packed rows as parquet files, for trainers that read those: TRL, or whatever reads `datasets`.

One record a row: ``input_ids``, ``labels`` (the id where the token is a target, else -100), ``seq_lengths`` (tokens of
each segment; TRL's name) and ``documents`` (the place of each segment's example). Labels are not shifted. A file is
written under a hidden name, a group of rows at a time, and renamed when it is complete and on disk; its metadata says
which rows it holds, so that ours can be told from a file of somebody else's.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainkit.errors import MachineError, UsageError
from trainkit.run_folder import fsync_folder, permissions_for_new_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from trainkit.data.packed_store import PackedRows, Part

FORMAT_VERSION = 1
SUFFIX = ".parquet"
MARK = b"trainkit"
"""Key of our entry in a file's metadata."""
NOT_TRAINED = -100
"""What transformers and TRL leave out of the loss."""
TOKENS_IN_GROUP = 2**20
"""A row group is assembled in memory: about 12 bytes a token, and as much again while it is compressed."""
ABANDONED_AFTER_SECONDS = 60.0

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "seq_lengths": pa.list_(pa.int32()),
        "documents": pa.list_(pa.string()),
    }
)


def rows_in_file(path: Path) -> dict[str, Any] | None:
    """What the metadata of a parquet file of ours says (``format``, ``key``, ``part``, ``ledger``), else None."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        said = json.loads(metadata[MARK])
    except (OSError, ValueError, KeyError):  # pa.ArrowInvalid is a ValueError
        return None
    return said if isinstance(said, dict) else None


def is_intact(path: Path) -> bool:
    """Whether every page of the file agrees with its checksum; reads all of it, a group at a time."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (OSError, ValueError):
        return False
    return True


def files_in(output: Path) -> dict[Part, Path]:
    """The files that ``output`` stands for: in a folder, or a file with the held-out rows in another beside it.

    >>> from pathlib import Path
    >>> [str(path) for path in files_in(Path("packed")).values()]
    ['packed/train.parquet', 'packed/evaluation.parquet']
    >>> [str(path) for path in files_in(Path("rows.parquet")).values()]
    ['rows.parquet', 'rows-evaluation.parquet']
    """
    if output.suffix == SUFFIX:
        return {"train": output, "evaluation": output.with_name(f"{output.stem}-evaluation{SUFFIX}")}
    return {"train": output / f"train{SUFFIX}", "evaluation": output / f"evaluation{SUFFIX}"}


def write_rows_files(
    files: Mapping[Part, Path],
    parts: Mapping[Part, PackedRows],
    key: str,
    on_progress: Callable[[str, int, int | None], None],
    *,
    replace: bool,
) -> dict[Part, bool]:
    """Write each part that there is into its file; says for each whether the file was there already.

    A file that holds the very same rows stays, unless ``replace``, which also takes a file of ours away where there is
    no such part. Raises UsageError for a file that holds other rows, or whose pages are damaged, and MachineError where
    the place cannot be written.
    """
    kept: dict[Part, bool] = {}
    for part, path in files.items():
        check_ours(path)
        if path.exists() and not replace:
            _refuse_other_rows(path, part if part in parts else None, key)
        kept[part] = path.exists() and not replace
    # The training rows come last: where they are there, everything is.
    for part in sorted(parts, reverse=True, key=("train", "evaluation").index):
        if not kept[part]:
            path = files[part]
            write_rows_file(path, parts[part], part, key, partial(on_progress, f"writing {path.name}"))
    for part, path in files.items():
        if part not in parts:
            path.unlink(missing_ok=True)
    return {part: kept[part] for part in parts}


def check_ours(path: Path) -> None:
    """Raise UsageError where something lies in the place of ``path`` that we did not write."""
    if os.path.lexists(path) and (not path.is_file() or rows_in_file(path) is None):
        raise UsageError(f"{path}: lies there already and is no file that trainkit wrote; give another --output")


def _refuse_other_rows(path: Path, part: Part | None, key: str) -> None:
    said = rows_in_file(path) or {}
    if [said.get(name) for name in ("format", "key", "part")] != [FORMAT_VERSION, key, part]:
        raise UsageError(
            f"{path}: holds other rows (of other data, or packed in another way); --force replaces them, or give "
            "another --output"
        )
    if not is_intact(path):
        raise UsageError(f"{path}: has changed since it was written; --force writes it anew")


def write_rows_file(
    path: Path, rows: PackedRows, part: Part, key: str, on_progress: Callable[[int, int | None], None]
) -> None:
    """Write all rows, in their order, as ``path``, which appears when it is complete, in place of what was there.

    Memory does not grow with the number of rows. ``on_progress`` is told rows done and rows in all. Raises
    MachineError where the place cannot be written.
    """
    mark = {"format": FORMAT_VERSION, "key": key, "part": part, "ledger": rows.ledger.to_json()}
    schema = SCHEMA.with_metadata({MARK: json.dumps(mark, allow_nan=False).encode()})
    rows_in_group = max(1, TOKENS_IN_GROUP // rows.sequence_length)
    on_progress(0, len(rows))
    with _complete_or_not_there(path) as file:
        writer = pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=["documents"],  # token ids have too many values for one
            write_statistics=False,
            write_page_checksum=True,
        )
        try:
            for first in range(0, len(rows), rows_in_group):
                last = min(first + rows_in_group, len(rows))
                writer.write_batch(_record_batch(rows, first, last, schema), row_group_size=rows_in_group)
                on_progress(last, len(rows))
            writer.close()
        finally:
            writer.is_open = False  # else its finaliser would end what was broken off


def _record_batch(rows: PackedRows, first: int, last: int, schema: pa.Schema) -> pa.RecordBatch:
    """Rows ``first`` to ``last`` (not included)."""
    assembled = [rows.row(index) for index in range(first, last)]
    ids = np.concatenate([row.ids_T for row in assembled])
    trained = np.concatenate([row.trained_T for row in assembled])
    token_offsets = _offsets([row.ids_T.size for row in assembled])
    piece_offsets = _offsets([row.segment_lengths.size for row in assembled])
    places = [place for index in range(first, last) for place in rows.documents_of(index)]
    columns = [
        pa.ListArray.from_arrays(token_offsets, ids),
        pa.ListArray.from_arrays(token_offsets, np.where(trained, ids, np.int32(NOT_TRAINED))),
        pa.ListArray.from_arrays(piece_offsets, np.concatenate([row.segment_lengths for row in assembled])),
        pa.ListArray.from_arrays(piece_offsets, pa.array(places, pa.string())),
    ]
    return pa.record_batch(columns, schema=schema)


def _offsets(lengths: list[int]) -> pa.Array:
    return pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))


@contextmanager
def _complete_or_not_there(path: Path) -> Iterator[BinaryIO]:
    """A hidden sibling to be filled, which becomes ``path`` when the block ends well, else it vanishes."""
    new_folder = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_temporary_prefix(path))
        temporary = path.with_name(os.path.basename(name))  # noqa: PTH119 - mkstemp gives an absolute name
        try:
            # Held while this process lives: what has the prefix and no lock was abandoned.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fchmod(descriptor, permissions_for_new_file())
                os.fsync(descriptor)
                temporary.replace(path)
            fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            if new_folder:
                with suppress(OSError):
                    path.parent.rmdir()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineError(f"{path}: cannot be written: {reason}; make room, or give another --output") from error


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.building-"


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of ``path``; a file whose writer lives is locked."""
    for left in path.parent.glob(f"{_temporary_prefix(path)}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime < ABANDONED_AFTER_SECONDS:
                continue
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
