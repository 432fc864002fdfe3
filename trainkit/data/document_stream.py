"""One source, encoded: blocks of its file → documents in flat arrays, on all cores, in the order of the file.

Legend: N documents of a block, K tokens of all of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from trainkit.data.conversations import Conversation, Dropped, MissingColumn, PromptCompletion, parse
from trainkit.data.formats import recognise
from trainkit.data.packed_store import DocumentBatch
from trainkit.data.sources import examples_in, read_blocks, read_source
from trainkit.data.workers import in_order, usable_cores
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from trainkit.data.bulk_encoding import BulkEncoder
    from trainkit.data.conversations import ParsedExample
    from trainkit.data.formats import Recognised
    from trainkit.data.sources import Block
    from trainkit.recipe.schema import Source

LOOKED_AT = 100
"""Examples from which a source's format is recognised."""
COMPARED_FIRST = 32
COMPARED_IN_A_BLOCK = 1
"""How many examples of the first block, and of every other, are encoded both fast and by the reference."""
NO_TOKENS = "no tokens"
LINES_NAMED = 3
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str).encode


@dataclass(frozen=True)
class EncodedBlock:
    """What became of the examples of one block.

    ``turns_N`` and ``ended_turns_N`` are the trained turns of each document, and those whose end is trained too;
    ``spoken_specials`` counts texts of special tokens that messages say; ``dropped`` are (reason, place) of examples
    that came to no document.
    """

    documents: DocumentBatch
    turns_N: NDArray[np.int64]
    ended_turns_N: NDArray[np.int64]
    spoken_specials: int
    examples_read: int
    bytes_read: int
    """Of files that are read line by line; 0 for others."""
    dropped: tuple[tuple[str, str], ...]


def recognised_source(source: Source) -> Recognised:
    """What the first examples of a source look like. Raises DataError for an empty one."""
    first = list(itertools.islice(read_source(source), LOOKED_AT))
    if not first:
        raise DataError(f"{source.path} holds no example")
    return recognise(source, first)


def encoded_blocks(
    source: Source, number: int, recognised: Recognised, bulk: BulkEncoder, warn: Callable[[str], None]
) -> Iterator[EncodedBlock]:
    """The documents of source ``number``, block after block; numbers of examples count within the source.

    ``warn`` is told when a process was killed and its blocks are encoded again. Raises MachineError where that does
    not help, DataError and ModelError, naming the first example that cannot be encoded, and EnginesDiffer.
    """

    def encode(numbered: tuple[int, Block]) -> EncodedBlock:
        index, block = numbered
        return _encoded_block(block, number, recognised, bulk, COMPARED_IN_A_BLOCK if index else COMPARED_FIRST)

    before = 0
    try:
        for block in in_order(encode, enumerate(read_blocks(source)), usable_cores(), warn):
            documents = replace(block.documents, examples_N=block.documents.examples_N + before)
            before += block.examples_read
            yield replace(block, documents=documents)
    except MissingColumn as error:
        raise DataError(f"{error}; {_without(error.column, source)}") from error


def _without(column: str, source: Source) -> str:
    """How many examples of a source have no such column. Reads it again, as far as it can be read."""
    read, places = 0, []
    with suppress(DataError):
        for example in read_source(source):
            read += 1
            if isinstance(example.record, dict) and column not in example.record:
                places.append(example.place)
    numbers = ", ".join(place.rpartition(":")[2].strip() for place in places[:LINES_NAMED])
    more = ", …" if len(places) > LINES_NAMED else ""
    return f"{len(places):,} of {read:,} lack it: {numbers}{more}"


def canonical_json(value: object) -> bytes:
    """One text for equal values, whatever the order of their keys."""
    return _CANONICAL(value).encode()


def _encoded_block(block: Block, source: int, recognised: Recognised, bulk: BulkEncoder, compared: int) -> EncodedBlock:
    examples = list(examples_in(block))
    kept: list[tuple[ParsedExample, str]] = []
    numbers: list[int] = []
    dropped: list[tuple[str, str]] = []
    for index, example in enumerate(examples):
        parsed = parse(example, recognised)
        if isinstance(parsed, Dropped):
            dropped.append((parsed.reason, example.place))
        else:
            kept.append((parsed, example.place))
            numbers.append(index)
    encoded = bulk.encode(kept, range(min(compared, len(kept))))
    dropped += [(NO_TOKENS, kept[index][1]) for index in np.flatnonzero(encoded.lengths_N == 0).tolist()]
    filled = np.flatnonzero(encoded.lengths_N).tolist()
    documents = DocumentBatch(
        ids_K=encoded.ids_K,
        trained_K=encoded.trained_K,
        lengths_N=encoded.lengths_N[filled],
        separators_N=encoded.separators_N[filled],
        has_prompt_N=np.array([_has_prompt(kept[index][0]) for index in filled], np.bool_),
        source=source,
        examples_N=np.array([numbers[index] for index in filled], np.int64),
        digests_N=np.array([_digest(kept[index][0]) for index in filled], np.uint64),
        places=[kept[index][1] for index in filled],
    )
    return EncodedBlock(
        documents,
        encoded.turns_N[filled],
        encoded.ended_turns_N[filled],
        int(encoded.spoken_specials_N.sum()),
        len(examples),
        block.bytes_of_lines,
        tuple(dropped),
    )


def _digest(parsed: ParsedExample) -> int:
    """A number that equal examples share, whatever else their records hold."""
    # No text holds a NUL, so that only equal parts make equal texts.
    if isinstance(parsed, Conversation):
        parts = [part for message in parsed.messages for part in (message.role, str(message.trained), message.content)]
        parts += [_CANONICAL(dict(message.extras)) for message in parsed.messages if message.extras]
        parts += [] if parsed.tools is None else [_CANONICAL(parsed.tools)]
    elif isinstance(parsed, PromptCompletion):
        parts = [parsed.prompt, parsed.completion]
    else:
        parts = [parsed.text]
    said = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "little")


def _has_prompt(example: ParsedExample) -> bool:
    """Whether something stands before the last answer, for a model to be given."""
    if isinstance(example, Conversation):
        return any(one.role == "assistant" for one in example.messages[1:])
    return isinstance(example, PromptCompletion) and example.prompt != ""
