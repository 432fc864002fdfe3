"""Where examples come from: a recipe's `Source` → its files or its hub id → a stream of examples.

A source is read anew at each call, in the same order: the lines of a file, the files of a folder by name, the rows
of a hub data set.
"""

from __future__ import annotations

import itertools
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.data.files import (
    BLOCK_RECORDS,
    KINDS,
    LinesBlock,
    RecordsBlock,
    kind_of,
    read_file_blocks,
    without_nested_nulls,
)
from trainkit.data.strict_json import fault_in_strings
from trainkit.data.wording import listed, nearest, shown
from trainkit.errors import DataError
from trainkit.run_folder import expanded, leads_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainkit.recipe.schema import Source

QUICKSTART = "quickstart"
_QUICKSTART_FOLDER = Path(__file__).parent.parent / "shipped" / "data" / QUICKSTART
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
# Files that describe a data set and hold none of it.
_COMPANIONS = re.compile(r"(\..*|_SUCCESS|(README|LICEN[CS]E|NOTICE|CITATION|SHA256SUMS)(\..*)?)", re.IGNORECASE)


Block = LinesBlock | RecordsBlock
"""A part of a source, which another process can decode."""


@dataclass(frozen=True, slots=True)
class Example:
    """One record as it was read, and where: ``train.jsonl:12``, ``train.json:61 (item 12)``, ``a.parquet: row 12``.

    ``record`` is a dict, a list (bare messages) or a string (text).
    """

    place: str
    record: object


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    name: str  # in messages: as the recipe writes it


def read_source(source: Source) -> Iterator[Example]:
    """Every example of the source, in order, as a stream. Raises DataError, naming the line where there is one."""
    files = _files(source)
    if not files:
        yield from _hub_examples(source)
    for file in files:
        for block in read_file_blocks(file.path, file.name):
            yield from examples_in(block)


def read_blocks(source: Source) -> Iterator[Block]:
    """The source in blocks that can be handed to other processes; raises as :func:`read_source` where it decodes."""
    files = _files(source)
    for file in files:
        yield from read_file_blocks(file.path, file.name)
    from_hub = () if files else _hub_examples(source)
    examples = ((example.place, example.record) for example in from_hub)
    while records := list(itertools.islice(examples, BLOCK_RECORDS)):
        yield RecordsBlock(records)


def examples_in(block: Block) -> Iterator[Example]:
    """The examples of a block. Raises DataError where its lines do not decode."""
    for place, record in block.records():
        yield Example(place, record)


def source_files(source: Source) -> tuple[Path, ...]:
    """The absolute local files behind the source, in reading order; () for a hub id. Raises DataError."""
    return tuple(file.path.absolute() for file in _files(source))


def bytes_of_lines(source: Source) -> int | None:
    """The size of a source that is read line by line from plain jsonl files: how far reading is can be told in bytes.

    None for any other. Raises DataError.
    """
    files = [file.path for file in _files(source)]
    if not files or any(kind_of(path) != "jsonl" or path.suffix.lower() == ".gz" for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def _files(source: Source) -> tuple[_File, ...]:
    """What ``source.path`` means: the shipped data set, a file, the files of a folder, or () for a hub id."""
    if source.path == QUICKSTART:
        return (_shipped_file(source),)
    if not source.path:
        raise DataError("the `path:` of a data source is empty")
    written = shown(source.path, 120)[1:-1]
    path = expanded(source.path)
    try:
        if path.is_dir():
            return _folder_files(source, path)
        if path.exists():
            return (_single_file(source, path),)
    except OSError as error:
        raise DataError(f"{written} cannot be read: {error.strerror}") from error
    if _HUB_ID.fullmatch(source.path) and kind_of(path) is None:
        return ()
    if path.is_symlink():
        raise DataError(f"{written} is a link to {path.readlink()}, which is not there")
    raise DataError(f"{written}: no such file{_nearest(path)}")


def _shipped_file(source: Source) -> _File:
    split = source.split or "train"
    if split not in ("train", "eval") or source.name is not None:
        raise DataError(f"{QUICKSTART}: the shipped data set has the splits train and eval, and no `name:`")
    return _File(_QUICKSTART_FOLDER / f"{split}.jsonl", f"{QUICKSTART}/{split}.jsonl")


def _single_file(source: Source, path: Path) -> _File:
    if source.name is not None or source.split is not None:
        key = "split" if source.name is None else "name"
        raise DataError(f"{source.path}: `{key}:` is for a hub data set, and this is a file; leave it out")
    if not path.is_file():
        raise DataError(f"{source.path} is neither a file nor a folder; write what it gives into a file")
    if kind_of(path) is None:
        raise DataError(f"{source.path}: unknown file type; known are {', '.join(KINDS)} (text types also with .gz)")
    return _File(path, source.path)


def _folder_files(source: Source, folder: Path) -> tuple[_File, ...]:
    """The folder's files by name. What would be left unread (unknown types, folders) is refused by name.

    With ``split: test`` only the files called test, or test followed by ``.``, ``-`` or ``_`` are meant.
    """
    if source.name is not None:
        raise DataError(f"{source.path}: `name:` is for a hub data set, and this is a folder; leave it out")
    entries = sorted(entry for entry in folder.iterdir() if not _COMPANIONS.fullmatch(entry.name))
    if source.split is not None:
        wanted = re.compile(rf"{re.escape(source.split)}([._-].*)?")
        entries = [entry for entry in entries if wanted.fullmatch(entry.name)]
    files = [entry for entry in entries if entry.is_file() and kind_of(entry)]
    others = [entry.name + "/" * entry.is_dir() for entry in entries if entry not in files]
    if not files:
        split = f" for the split {source.split}" if source.split is not None else ""
        there = f"; it holds {listed(others, 5)}" if others else ""
        raise DataError(f"{source.path} is a folder without data files{split} ({', '.join(KINDS)}){there}")
    if others:
        raise DataError(
            f"{source.path}: cannot read {listed(others, 5)} in this folder (known are {', '.join(KINDS)}, no folders "
            "inside); move them out, or name single files as sources"
        )
    outside = [entry.name for entry in files if leads_out(entry, folder)]
    if outside:
        raise DataError(
            f"{source.path}: {listed(outside, 5)} in this folder links to a file outside of it, and is not followed; "
            "name the file itself as a source if it is meant to be read"
        )
    return tuple(_File(file, f"{source.path.rstrip('/')}/{file.name}") for file in files)


def _nearest(path: Path) -> str:
    """What a message adds about a missing path: the nearest name in its folder, or the folder that is missing too."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f" (nor is there a folder {path.parent})"
    close = nearest(path.name, names)
    return f" in {path.parent.absolute()}" if close is None else f"; did you mean {path.parent / close}?"


# --- the hub -------------------------------------------------------------------------------------------------------


def _hub_examples(source: Source) -> Iterator[Example]:
    dataset = _load_from_hub(source)
    for row, record in enumerate(dataset, start=1):
        place = f"{source.path}: row {row:,}"
        fault = fault_in_strings(record)
        if fault:
            raise DataError(f"{place}: {fault}")
        yield Example(place, without_nested_nulls(record))
    if not len(dataset):
        raise DataError(f"{source.path} has 0 examples in the split {source.split or 'train'}")


def _load_from_hub(source: Source) -> Any:
    """The data set, from the hub or from the cache of an earlier download. Raises DataError of one line."""
    import datasets

    reachable = _hub_answers(source.path)
    try:
        with _patience(reachable=reachable):
            return datasets.load_dataset(source.path, name=source.name, split=source.split or "train")
    except Exception as error:  # whatever the hub's own stack raises: its HTTP library changes with its version
        reason = " ".join(str(error).split())[:120]
        local = _nearest(Path(source.path)) if Path(source.path).parent.is_dir() else ""
        if reachable:
            raise DataError(f"{source.path} is no local file or folder, and the hub says: {reason}{local}") from error
        raise DataError(
            f"{source.path} is no local file or folder{local}, and the hub cannot be reached ({type(error).__name__}); "
            "download it where there is a network and give the local folder as `path:`"
        ) from error


def _hub_answers(dataset_id: str) -> bool:
    """Whether the hub gives any answer about the data set, be it that there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(dataset_id, timeout=10)
    except HfHubHTTPError as error:
        return error.response is not None
    except Exception:  # no route, no name, time-out, offline mode: the HTTP library's own classes
        return False
    return True


@contextmanager
def _patience(*, reachable: bool) -> Iterator[None]:
    """Without a hub, let `datasets` look into its cache at once instead of retrying for half a minute."""
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
