"""From a recipe's sources to packed rows, once: the result is kept and found again by a key that cannot be stale.

sources → recognised → parsed → encoded → the documents' store → train or held out → rows → ledger

What happens to each example on its way into the store is in :mod:`trainkit.data.document_stream`.

The key is a hash of everything that the rows depend on: the bytes of the data files, the encoder's own fingerprint
(tokenizer, template, what is trained), the data and packing sections, the seed, and the format of the store. Documents
have a shorter key of their own, so that another sequence_length, mix or seed does not tokenise again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.data.bulk_encoding import fast_or_by_reference
from trainkit.data.conversations import Conversation, Dropped, Message, PlainText, PromptCompletion, parse
from trainkit.data.document_stream import canonical_json, encoded_blocks, recognised_source
from trainkit.data.mask_gate import MaskGate
from trainkit.data.packed_store import (
    Documents,
    DocumentWriter,
    PackedRows,
    read_facts,
    read_prompts,
    write_rows,
)
from trainkit.data.row_plan import TOO_LONG, Selection, held_out, plan_rows
from trainkit.data.sealed_folder import FORMAT_VERSION, StoreUnusable, building, verify
from trainkit.data.sources import bytes_of_lines, read_source, source_files
from trainkit.errors import DataError, MachineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trainkit.data.bulk_encoding import BulkEncoder
    from trainkit.data.conversations import ParsedExample
    from trainkit.data.encoding import Encoder
    from trainkit.data.packed_store import Part, PlannedRows
    from trainkit.recipe.schema import Data, Recipe, Source

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a stage, what is done of it, and of how much (None: not known); done == total ends it."""

MANY_PASSES = 3.0
PLACES_NAMED = 3
COMPARED_AT_ONCE = 2**28
"""Bytes of a folder found again that are compared with their sums at once; the rest are when they are first read."""


@dataclass(frozen=True)
class PreparedData:
    """Rows to train on and to evaluate on, what was seen on the way, and the key that stands for all of it.

    ``prompts`` are held-out examples, as (place, example), for answers to be generated; in an order drawn by the seed.
    ``folder`` is where the rows lie, and ``found_again`` whether they lay there before.
    """

    train: PackedRows
    evaluation: PackedRows | None
    prompts: tuple[tuple[str, ParsedExample], ...]
    sentences: tuple[str, ...]
    key: str
    folder: Path
    found_again: bool


def default_cache() -> Path:
    """Where prepared data is kept: $TRAINKIT_CACHE, or trainkit/ in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("TRAINKIT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "trainkit"
    except RuntimeError as error:
        raise MachineError(
            "there is no home folder; set the environment variable TRAINKIT_CACHE to a folder"
        ) from error


def prepare(
    recipe: Recipe, encoder: Encoder, cache: Path, on_progress: Progress, *, anew: bool = False
) -> PreparedData:
    """Make the rows that ``recipe`` asks for under ``cache``, or find them there; see :class:`PreparedData`.

    What is found in the cache is compared with its sums, up to COMPARED_AT_ONCE bytes of a folder at once and the rest
    when it is first read; what is found to be damaged at once is made anew, with a sentence that says so. ``anew``
    looks for nothing: everything is encoded and packed again, and takes the place of what was there. Raises DataError
    for whatever the sources hold that cannot be trained on, and MachineError where the cache cannot be written.
    """
    sources = _all_sources(recipe.data)
    before = _states_of_files(sources)
    documents_key = _documents_key(sources, encoder, recipe, on_progress)
    key = _hash_of(documents_key, _what_rows_depend_on(recipe))
    # How many prompts are kept beside the rows does not make them other rows.
    number_of_prompts = max(recipe.evaluation.samples, recipe.evaluation.exact_match)
    rows_key = _hash_of(key, number_of_prompts)
    documents_folder = cache / documents_key
    rows_folder = documents_folder / "rows" / rows_key
    warnings: list[str] = []

    found = not anew and _is_sound(documents_folder, "documents", documents_key, warnings)
    if not found:
        warnings += _write_documents(
            documents_folder, documents_key, sources, encoder, on_progress, before, replace=anew
        )
    found = found and _is_sound(rows_folder, "rows", rows_key, warnings)
    if not found:
        documents = Documents.open(documents_folder)
        on_progress("packing", 0, 1)
        parts = _plan_parts(recipe, documents)
        prompts = _prompts(recipe, documents, parts.get("evaluation"), sources, number_of_prompts)
        with building(rows_folder, "rows", rows_key, replace=anew) as builder:
            write_rows(builder, parts, prompts, {"sentences": _sentences(recipe, documents, parts)})
        on_progress("packing", 1, 1)

    train = PackedRows.open(rows_folder)
    evaluation = PackedRows.open(rows_folder, "evaluation") if recipe.data.eval is not None else None
    _check_dropped(recipe, sources, [part for part in (train, evaluation) if part])
    return PreparedData(
        train=train,
        evaluation=evaluation,
        prompts=tuple((place, _example_from_json(value)) for place, value in read_prompts(rows_folder)),
        sentences=(
            *warnings,
            *(source["sentence"] for source in train.documents.facts["sources"]),
            *_encoding_sentences(train.documents, sources),
            *read_facts(rows_folder, "rows")["sentences"],
            f"{'found again' if found else 'kept'} in {rows_folder}",
        ),
        key=key,
        folder=rows_folder,
        found_again=found,
    )


def _all_sources(data: Data) -> tuple[Source, ...]:
    """Training sources, then the evaluation sources where they are others."""
    return data.train + (data.eval if isinstance(data.eval, tuple) else ())


# --- keys ----------------------------------------------------------------------------------------------------------


def _documents_key(sources: Sequence[Source], encoder: Encoder, recipe: Recipe, on_progress: Progress) -> str:
    """Stands for the tokens of all examples: what was read, and how it is encoded."""
    read = [{**asdict(source), "weight": None, "content": _content_hash(source, on_progress)} for source in sources]
    return _hash_of(FORMAT_VERSION, encoder.fingerprint, recipe.data.train_on, recipe.packing.separator, read)


def _what_rows_depend_on(recipe: Recipe) -> list[Any]:
    """The recipe's part of the rows' key; ``max_dropped`` refuses rows and never changes them."""
    data = asdict(replace(recipe.data, max_dropped=0))
    return [data, asdict(recipe.packing), recipe.training.seed]


def _content_hash(source: Source, on_progress: Progress) -> list[str]:
    """A hash of each file's bytes, or one of all records of a hub data set, whose files are not ours to know."""
    files = source_files(source)
    if not files:
        total = hashlib.sha256()
        for example in read_source(source):
            total.update(canonical_json(example.record))
        return [total.hexdigest()]
    hashes = []
    for index, file in enumerate(files):
        on_progress("checking files", index, len(files))
        try:
            with file.open("rb") as content:
                hashes.append(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}")
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error
    on_progress("checking files", len(files), len(files))
    return hashes


def _states_of_files(sources: Sequence[Source]) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file."""
    states = {}
    for file in itertools.chain.from_iterable(source_files(source) for source in sources):
        with suppress(OSError):  # a file that is gone differs from one that is there
            status = file.stat()
            states[file] = status.st_size, status.st_mtime_ns
    return states


def _refuse_changed_files(sources: Sequence[Source], before: Mapping[Path, tuple[int, int]]) -> None:
    """Tokens of a file that changed while it was read would be kept under the key of its old content."""
    after = _states_of_files(sources)
    changed = [file for file in before.keys() | after.keys() if before.get(file) != after.get(file)]
    if changed:
        raise DataError(f"{min(changed)} changed while it was read; run again when it is complete")


def _hash_of(*values: object) -> str:
    return hashlib.sha256(canonical_json(values)).hexdigest()[:32]


def _is_sound(folder: Path, kind: Literal["documents", "rows"], key: str, warnings: list[str]) -> bool:
    if not folder.exists():
        return False
    try:
        verify(folder, kind, key, at_most_bytes=COMPARED_AT_ONCE)
    except StoreUnusable as error:
        warnings.append(f"warning: {error}; made anew")
        return False
    return True


# --- examples to documents -----------------------------------------------------------------------------------------


def _write_documents(
    folder: Path,
    key: str,
    sources: Sequence[Source],
    encoder: Encoder,
    on_progress: Progress,
    before: Mapping[Path, tuple[int, int]],
    *,
    replace: bool,
) -> list[str]:
    """Encode every source into a documents' store; returns what a person should know of how.

    Raises DataError where files are not as they were ``before``.
    """
    warnings: list[str] = []

    def write(bulk: BulkEncoder) -> None:
        with building(folder, "documents", key, replace=replace) as builder:
            writer = DocumentWriter(builder)
            seen = [_encode_source(*source, bulk, writer, on_progress, warnings) for source in enumerate(sources)]
            writer.finish({"sources": seen})
            _refuse_changed_files(sources, before)

    _, how = fast_or_by_reference(encoder, write)
    return [*warnings, how] if how else warnings


def _mebibytes(size: int) -> int:
    """Whole MiB, rounded up, so that the last comes with the end."""
    return -(-size // 2**20)


def _encode_source(
    number: int,
    source: Source,
    bulk: BulkEncoder,
    writer: DocumentWriter,
    on_progress: Progress,
    warnings: list[str],
) -> dict[str, Any]:
    """Write the tokens of every example; returns what was seen: the source's sentence, counts, first drops.

    Adds to ``warnings`` what a person should know of how that went.
    Raises DataError where the masks of the whole source cannot be meant (:class:`MaskGate`).
    """
    recognised = recognised_source(source)
    gate = MaskGate(bulk.tokenizer)
    dropped: Counter[str] = Counter()
    places: defaultdict[str, list[str]] = defaultdict(list)
    read = spoken_specials = bytes_read = 0
    size = bytes_of_lines(source)
    stage = f"encoding {source.path}" + ("" if size is None else ", MiB")
    on_progress(stage, 0, None if size is None else _mebibytes(size))
    for block in encoded_blocks(source, number, recognised, bulk, warnings.append):
        gate.observe(block)
        writer.append_many(block.documents)
        for reason, place in block.dropped:
            dropped[reason] += 1
            if dropped[reason] <= PLACES_NAMED:
                places[reason].append(place)
        read += block.examples_read
        spoken_specials += block.spoken_specials
        bytes_read += block.bytes_read
        if size is None:
            on_progress(stage, read, None)
        elif bytes_read < size:
            on_progress(stage, bytes_read // 2**20, _mebibytes(size))
    done = read if size is None else _mebibytes(size)
    on_progress(stage, done, done)
    gate.check()
    return {
        "sentence": recognised.sentence,
        "read": read,
        "dropped": dropped,
        "places": places,
        "spoken_specials": spoken_specials,
    }


# --- documents to rows ---------------------------------------------------------------------------------------------


def _plan_parts(recipe: Recipe, documents: Documents) -> dict[Part, PlannedRows]:
    """The training rows, and the held-out rows where the recipe asks for them."""
    data, seed = recipe.data, recipe.training.seed
    lost = [source["dropped"] for source in documents.facts["sources"]]
    training_sources = len(data.train)
    from_training = np.flatnonzero(documents.sources_N < training_sources)
    lost_in_training = _added(lost[:training_sources])
    _refuse_none_left(data.train, from_training.size, lost_in_training)
    selections: dict[Part, Selection] = {"train": Selection(data.train, 0, from_training, lost_in_training)}
    if isinstance(data.eval, float):
        held = held_out(documents.digests_N[from_training], data.eval, seed)
        _refuse_one_sided(data, held)
        selections["train"] = replace(selections["train"], documents_N=from_training[~held])
        selections["evaluation"] = Selection(_each_once(data.train), 0, from_training[held], {})
    elif data.eval is not None:
        from_evaluation = np.flatnonzero(documents.sources_N >= training_sources)
        lost_in_evaluation = _added(lost[training_sources:])
        _refuse_none_left(data.eval, from_evaluation.size, lost_in_evaluation)
        sources = _each_once(data.eval)
        selections["evaluation"] = Selection(sources, training_sources, from_evaluation, lost_in_evaluation)
    return {part: plan_rows(documents, selection, recipe.packing, seed) for part, selection in selections.items()}


def _each_once(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Evaluation measures every held-out document once; weights are for training."""
    return tuple(replace(source, weight=None) for source in sources)


def _refuse_none_left(sources: Sequence[Source], documents: int, lost: Mapping[str, int]) -> None:
    if not documents:
        paths = ", ".join(source.path for source in sources)
        raise DataError(f"{paths}: none of {sum(lost.values())} examples is left to train on ({_counted(lost)})")


def _refuse_one_sided(data: Data, held: NDArray[np.bool_]) -> None:
    if held.size == 1:
        raise DataError(
            f"{data.train[0].path} is one document, so data.eval: {data.eval} cannot hold out a part of it; give "
            "`data.eval` a source of its own, or cut the text into several files"
        )
    if held.all() or not held.any():
        which = "all" if held.all() else "none"
        raise DataError(
            f"data.eval: {data.eval} holds out {which} of the {held.size} examples; give another fraction, or a source"
        )


def _check_dropped(recipe: Recipe, sources: Sequence[Source], parts: Sequence[PackedRows]) -> None:
    """Raise DataError where more examples than ``data.max_dropped`` came to nothing, other than by being too long."""
    read = sum(part.ledger.examples_read for part in parts)
    dropped = _added([part.ledger.examples_dropped for part in parts])
    dropped.pop(TOO_LONG, None)
    lost = sum(dropped.values())
    if lost <= recipe.data.max_dropped * read:
        return
    documents = parts[0].documents
    places = [place for source in documents.facts["sources"] for first in source["places"].values() for place in first]
    in_rows = np.concatenate([part.plan.pieces.document_P for part in parts])
    missing = np.setdiff1d(np.arange(len(documents)), in_rows)
    if recipe.packing.long_documents == "drop":
        missing = missing[np.diff(documents.offsets_N)[missing] <= recipe.packing.sequence_length]
    places += [documents.place(document) for document in missing[:PLACES_NAMED].tolist()]
    raise DataError(
        f"{', '.join(source.path for source in sources)}: {lost:,} of {read:,} examples leave nothing to "
        f"train ({_counted(dropped)}; first: {', '.join(places[:PLACES_NAMED])}), more than data.max_dropped: "
        f"{recipe.data.max_dropped}; mend them, or raise it"
    )


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(counts.items(), key=lambda one: -one[1]))


def _sentences(recipe: Recipe, documents: Documents, parts: Mapping[Part, PlannedRows]) -> list[str]:
    """What the person should know about the rows, a line each."""
    sentences = []
    for part, plan in parts.items():
        ledger = plan.ledger
        sentences.append(
            f"{part}: {ledger.documents:,} documents, {ledger.tokens:,} tokens ({ledger.trained_targets:,} trained) in "
            f"{ledger.rows:,} rows of {ledger.sequence_length:,}, {ledger.fill:.1%} full"
        )
        if ledger.examples_dropped:
            sentences.append(
                f"{part}: dropped of {ledger.examples_read:,} examples: {_counted(ledger.examples_dropped)}"
            )
        if ledger.truncated:
            sentences.append(f"{part}: {ledger.truncated:,} tokens truncated ({ledger.truncated / ledger.read:.1%})")
        sentences += [
            f"warning: {source.path} is repeated {source.passes:.1f} times to meet its weight"
            for source in ledger.sources
            if source.passes > MANY_PASSES
        ]
    if isinstance(recipe.data.eval, tuple):
        from_training = documents.sources_N < len(recipe.data.train)
        digests = documents.digests_N
        both = int(np.isin(digests[~from_training], digests[from_training]).sum())
        if both:
            of = np.count_nonzero(~from_training)
            sentences.append(f"warning: {both:,} of the {of:,} evaluation examples are in the training data too")
    return sentences


def _encoding_sentences(documents: Documents, sources: Sequence[Source]) -> list[str]:
    """What the person should know about how the documents were encoded, a line each."""
    said = []
    for source, seen in zip(sources, documents.facts["sources"], strict=True):
        if seen["spoken_specials"]:
            said.append(
                f"{source.path}: messages say the text of special tokens {seen['spoken_specials']:,} times; "
                "it is encoded as text"
            )
    return said


# --- prompts -------------------------------------------------------------------------------------------------------


def _prompts(
    recipe: Recipe, documents: Documents, evaluation: PlannedRows | None, sources: Sequence[Source], number: int
) -> str:
    """JSON of (place, example) of the first held-out examples with a prompt, in an order drawn by the seed."""
    if evaluation is None or not number:
        return "[]"
    candidates = np.unique(evaluation.pieces.document_P)
    candidates = candidates[documents.prompts_N[candidates]]
    chosen = np.random.default_rng(recipe.training.seed).permutation(candidates)[:number].tolist()
    texts = _examples_of(documents, chosen, sources)
    return json.dumps([(documents.place(document), texts[document]) for document in chosen], default=str)


def _examples_of(documents: Documents, chosen: Sequence[int], sources: Sequence[Source]) -> dict[int, dict[str, Any]]:
    """The examples behind the ``chosen`` documents, read again: the store keeps tokens and no texts."""
    wanted: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for document in chosen:
        wanted[int(documents.sources_N[document])][int(documents.examples_N[document])] = document
    found = {}
    for number, document_of_example in wanted.items():
        recognised = recognised_source(sources[number])
        examples = itertools.islice(read_source(sources[number]), max(document_of_example) + 1)
        for index, example in enumerate(examples):
            if index in document_of_example:
                parsed = parse(example, recognised)
                assert not isinstance(parsed, Dropped), "it was encoded, so it was not dropped"
                found[document_of_example[index]] = _example_to_json(parsed)
    return found


def _example_to_json(example: ParsedExample) -> dict[str, Any]:
    if isinstance(example, Conversation):
        messages = [[one.role, one.content, one.trained, dict(one.extras)] for one in example.messages]
        return {"messages": messages, "tools": example.tools}
    if isinstance(example, PromptCompletion):
        return {"prompt": example.prompt, "completion": example.completion}
    return {"text": example.text}


def _example_from_json(value: Mapping[str, Any]) -> ParsedExample:
    if "messages" in value:
        tools = value["tools"]
        return Conversation(tuple(Message(*one) for one in value["messages"]), None if tools is None else tuple(tools))
    if "prompt" in value:
        return PromptCompletion(value["prompt"], value["completion"])
    return PlainText(value["text"])
