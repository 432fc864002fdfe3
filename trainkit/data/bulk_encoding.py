"""Many examples at once → their documents, end to end in flat arrays, equal to those of the reference encoder.

Rendering is compared with what is known of its shape, ids come from the fastest engine there is, positions from the
bytes of the tokens, masks from positions: no list of tokens is ever made. An example for which one of these does not
hold is encoded by the reference (:mod:`trainkit.data.encoding`): a template that looks into texts, a token that runs
over the edge of what is trained, a text that does not come back byte for byte, a message that says a special token.
And a sample of what did hold is encoded both ways and compared.

Legend: N documents, K tokens of all of them, S trained spans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from trainkit.data.chat_shapes import ChatShapes
from trainkit.data.chat_templates import TemplateProblem
from trainkit.data.conversations import Conversation, PlainText, PromptCompletion
from trainkit.data.token_bytes import NOTHING_FAST, tokenize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from trainkit.data.conversations import ParsedExample
    from trainkit.data.encoding import Encoded, Encoder
    from trainkit.data.token_bytes import TokenizedTexts

    Int64 = NDArray[np.int64]
    Bool = NDArray[np.bool_]

Result = TypeVar("Result")

COMPARED_CHARACTERS = 2**18
"""The reference needs some 140 bytes for each character: a book would take more memory than all of the data."""


class EnginesDiffer(Exception):  # noqa: N818 - it reads as what it says
    """The fast way and the reference disagree about an example, which is named; the fast way must not be used."""


def fast_or_by_reference(encoder: Encoder, work: Callable[[BulkEncoder], Result]) -> tuple[Result, str | None]:
    """``work`` done with a bulk encoder, and what a person should know of how; None where there is nothing to say.

    Where the fast way and the reference disagree, all of it is done again by the reference.
    """
    bulk = BulkEncoder(encoder)
    try:
        result = work(bulk)
    except EnginesDiffer as place:
        return work(BulkEncoder(encoder, trusted=False)), (
            f"warning: {place}: fast encoding came to other tokens or masks than the tokenizer itself; everything was "
            "encoded by the tokenizer instead, one by one; please report it"
        )
    return result, None if bulk.slow_reason is None else f"tokenised by tokenizers: {bulk.slow_reason}"


@dataclass(frozen=True)
class EncodedDocuments:
    """N documents; tokens end to end. Counts are those of :class:`trainkit.data.encoding.Encoded`."""

    ids_K: NDArray[np.int32]
    trained_K: Bool
    lengths_N: Int64
    separators_N: Bool
    turns_N: Int64
    ended_turns_N: Int64
    spoken_specials_N: Int64


@dataclass(slots=True)
class _Texts:
    """What the bulk way takes on, one entry a document: its number, text, trained spans in characters, counts."""

    numbers: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    specials: list[int] = field(default_factory=list)
    """Special tokens that the document may hold; -1: any number."""
    is_chat: list[bool] = field(default_factory=list)


class BulkEncoder:
    """Encodes as ``encoder`` does, many examples at once. ``slow_reason`` says why not by gigatoken, where it is not.

    Without ``trusted`` every example is encoded by the reference.
    """

    def __init__(self, encoder: Encoder, *, trusted: bool = True) -> None:
        self._encoder = encoder
        fast = encoder.fast if trusted else NOTHING_FAST
        self._engine, self._table, self.slow_reason = fast.engine, fast.table, fast.slow_reason

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the encoder."""
        return self._encoder.tokenizer

    @property
    def engine(self) -> str:
        """The name of what makes ids."""
        return "tokenizers" if self._engine is None else self._engine.name

    @cached_property
    def _shapes(self) -> ChatShapes:
        return ChatShapes(*self._encoder.template(tools=False), self._encoder.special)

    @cached_property
    def _special_flags(self) -> Bool:
        assert self._table is not None
        special_V = np.zeros(self._table.lengths_V.size, np.bool_)
        special_V[sorted(self._encoder.special.ids)] = True
        return special_V

    def encode(self, examples: Sequence[tuple[ParsedExample, str]], compared: Sequence[int] = ()) -> EncodedDocuments:
        """The documents of several (example, place), in order; those numbered ``compared`` are encoded both ways.

        Of a text or pair that is longer than COMPARED_CHARACTERS a part is, and of a conversation nothing. Raises what
        the reference raises, and EnginesDiffer where the two ways come to different tokens or masks.
        """
        in_bulk = self._in_bulk(examples)
        left = np.setdiff1d(np.arange(len(examples)), in_bulk.numbers)
        by_reference = dict(
            zip(left.tolist(), self._encoder.encode_many([examples[number] for number in left.tolist()]), strict=True)
        )
        documents = _in_order(len(examples), in_bulk, by_reference)
        whole: list[int] = []
        for number in sorted(set(compared) - by_reference.keys()):
            example, place = examples[number]
            part = _part_to_compare(example)
            if part is example:
                whole.append(number)
            elif part is not None:
                self.encode([(part, place)], compared=(0,))
        self._compare(documents, examples, whole)
        return documents

    def _in_bulk(self, examples: Sequence[tuple[ParsedExample, str]]) -> _Bulk:
        if self._engine is None or self._table is None:
            return _nothing()
        texts = self._texts(examples)
        try:
            encoded = [text.encode() for text in texts.texts]
        except UnicodeEncodeError:  # half a surrogate pair: the reference says where
            return _nothing()
        tokenized = tokenize(self._engine, self._table, encoded)
        lines = _Lines.of(texts, encoded, tokenized)
        spans = _Spans.of(texts, encoded, lines)
        sound_N = tokenized.spelled_N & spans.aligned(len(encoded)) & self._has_its_specials(texts, tokenized)
        return self._assembled(texts, lines, spans, sound_N)

    def _texts(self, examples: Sequence[tuple[ParsedExample, str]]) -> _Texts:
        """The examples that need nothing but their text and its spans."""
        found, train_all = _Texts(), self._encoder.train_all
        for number, (parsed, _) in enumerate(examples):
            turns, specials, is_chat = 0, -1, False
            if isinstance(parsed, Conversation):
                if not self._encoder.special.always_found:
                    continue  # counting them would not tell what the messages say
                try:
                    placed = self._shapes.place(parsed)
                except TemplateProblem:
                    continue  # the reference says it with the example's place
                if placed is None:
                    continue
                text, is_chat, specials = placed.text, True, placed.specials
                spans = [(0, len(text))] if train_all else placed.turns
                turns = 0 if train_all else len(placed.turns)
            elif isinstance(parsed, PromptCompletion):
                text = parsed.prompt + parsed.completion
                spans = [(0 if train_all else len(parsed.prompt), len(text))]
            else:
                text = parsed.text
                spans = [(0, len(text))]
            found.numbers.append(number)
            found.texts.append(text)
            found.spans.append(spans)
            found.turns.append(turns)
            found.specials.append(specials)
            found.is_chat.append(is_chat)
        return found

    def _has_its_specials(self, texts: _Texts, tokenized: TokenizedTexts) -> Bool:
        """Whether no document holds more special tokens than its template wrote."""
        wanted_N = np.array(texts.specials, np.int64)
        if not wanted_N.size:
            return np.zeros(0, np.bool_)
        if not tokenized.spelled_N.any():
            return tokenized.spelled_N
        before_K = np.concatenate(([0], np.cumsum(self._special_flags[tokenized.ids_K])))
        found_N = before_K[tokenized.offsets_N[1:]] - before_K[tokenized.offsets_N[:-1]]
        has: Bool = (wanted_N < 0) | (found_N == wanted_N)
        return has

    def _assembled(self, texts: _Texts, lines: _Lines, spans: _Spans, sound_N: Bool) -> _Bulk:
        """Ids and masks of the sound documents, with the BOS token before plain texts and separators behind."""
        encoder, tokenized = self._encoder, lines.tokenized
        counts_N = np.diff(tokenized.offsets_N)
        edges_K = np.zeros(tokenized.ids_K.size + 1, np.int64)
        np.add.at(edges_K, spans.first_S, 1)
        np.add.at(edges_K, spans.last_S, -1)
        trained_K = np.cumsum(edges_K)[:-1] > 0
        separated_N = self._needs_separator(lines)
        follows_trained_N = np.zeros(counts_N.size, np.bool_)
        filled = counts_N > 0
        follows_trained_N[filled] = trained_K[tokenized.offsets_N[1:][filled] - 1]
        prefix = np.array(encoder.prefix, np.int32)
        prefixed_N = self._needs_prefix(texts, tokenized)

        before_N = np.where(prefixed_N, prefix.size, 0)
        lengths_N = counts_N + before_N + separated_N
        begins_N = np.cumsum(lengths_N) - lengths_N
        ids_K = np.zeros(int(lengths_N.sum()), np.int32)
        mask_K = np.full(ids_K.size, encoder.train_all, np.bool_)
        place_K = np.arange(tokenized.ids_K.size) + np.repeat(begins_N + before_N - tokenized.offsets_N[:-1], counts_N)
        ids_K[place_K] = tokenized.ids_K
        mask_K[place_K] = trained_K
        for at, number in enumerate(encoder.prefix):
            ids_K[begins_N[prefixed_N] + at] = number
        last_N = (begins_N + lengths_N - 1)[separated_N]
        ids_K[last_N] = encoder.separator if encoder.separator is not None else 0
        mask_K[last_N] = follows_trained_N[separated_N] | (encoder.train_all & filled[separated_N])
        mask_K[begins_N[lengths_N > 0]] = False
        turns_N = np.array(texts.turns, np.int64)
        return _Bulk(np.array(texts.numbers, np.int64), ids_K, mask_K, begins_N, lengths_N, separated_N, turns_N).only(
            sound_N & (lengths_N > 0)
        )

    def _needs_separator(self, lines: _Lines) -> Bool:
        """Whether no end-of-sequence token stands before the trailing white space of a text."""
        tokenized, written_N = lines.tokenized, lines.written_N
        if self._encoder.separator is None or not written_N.size:
            return np.zeros(written_N.size, np.bool_)
        last_N = lines.tokens_before(np.arange(written_N.size), written_N) - 1
        ended_N = last_N >= tokenized.offsets_N[:-1]
        ended_N[ended_N] = np.isin(tokenized.ids_K[last_N[ended_N]], sorted(self._encoder.document_ends))
        return ~ended_N

    def _needs_prefix(self, texts: _Texts, tokenized: TokenizedTexts) -> Bool:
        """Whether the BOS token that a plain text gets is missing."""
        needs_N = ~np.array(texts.is_chat, np.bool_)
        prefix = self._encoder.prefix
        if not prefix:
            return np.zeros(needs_N.size, np.bool_)
        for number in np.flatnonzero(needs_N).tolist():
            first = int(tokenized.offsets_N[number])
            last = min(first + len(prefix), int(tokenized.offsets_N[number + 1]))
            needs_N[number] = tokenized.ids_K[first:last].tolist() != prefix
        return needs_N

    def _compare(
        self, documents: EncodedDocuments, examples: Sequence[tuple[ParsedExample, str]], numbers: Sequence[int]
    ) -> None:
        begins_N = np.cumsum(documents.lengths_N) - documents.lengths_N
        expected = self._encoder.encode_many([examples[number] for number in numbers])
        for number, one in zip(numbers, expected, strict=True):
            part = slice(int(begins_N[number]), int(begins_N[number] + documents.lengths_N[number]))
            counts = (
                int(documents.separators_N[number]),
                int(documents.turns_N[number]),
                int(documents.ended_turns_N[number]),
            )
            if not (
                np.array_equal(documents.ids_K[part], one.ids)
                and np.array_equal(documents.trained_K[part], one.trained)
                and counts == (one.separator_tokens, one.turns, one.ended_turns)
            ):
                raise EnginesDiffer(examples[number][1])


@dataclass(frozen=True)
class _Bulk:
    """Documents that were encoded in bulk, by their numbers among the examples; all turns of theirs are ended."""

    numbers: Int64
    ids_K: NDArray[np.int32]
    trained_K: Bool
    begins_N: Int64
    lengths_N: Int64
    separators_N: Bool
    turns_N: Int64

    def only(self, sound_N: Bool) -> _Bulk:
        """Some of the documents; the tokens stay where they are."""
        return _Bulk(
            self.numbers[sound_N],
            self.ids_K,
            self.trained_K,
            self.begins_N[sound_N],
            self.lengths_N[sound_N],
            self.separators_N[sound_N],
            self.turns_N[sound_N],
        )


def _part_to_compare(example: ParsedExample) -> ParsedExample | None:
    """What of an example is encoded both ways; it stays what it is where it is not long."""
    if isinstance(example, Conversation):
        return example if sum(len(one.content) for one in example.messages) <= COMPARED_CHARACTERS else None
    half = COMPARED_CHARACTERS // 2
    if isinstance(example, PromptCompletion) and max(len(example.prompt), len(example.completion)) > half:
        return PromptCompletion(example.prompt[-half:], example.completion[:half])
    if isinstance(example, PlainText) and len(example.text) > COMPARED_CHARACTERS:
        return PlainText(example.text[:COMPARED_CHARACTERS])
    return example


def _nothing() -> _Bulk:
    none = np.zeros(0, np.int64)
    no = np.zeros(0, np.bool_)
    return _Bulk(none, none.astype(np.int32), no, none, none, no, none)


@dataclass(frozen=True)
class _Lines:
    """Tokens of all texts on one line, a text behind the other, so that one search finds them for many places.

    ``lengths_N`` are the bytes of each text, ``written_N`` those before the white space at its end.
    """

    tokenized: TokenizedTexts
    lengths_N: Int64
    written_N: Int64
    distance: int
    """From the beginning of a text to that of the next: more than any is long."""
    line_K: Int64

    @classmethod
    def of(cls, texts: _Texts, encoded: Sequence[bytes], tokenized: TokenizedTexts) -> _Lines:
        """The line of these texts."""
        lengths_N = np.fromiter(map(len, encoded), np.int64, len(encoded))
        trailing = [len(text[len(text.rstrip()) :].encode()) for text in texts.texts]
        distance = int(max(tokenized.starts_K.max(initial=0), lengths_N.max(initial=0))) + 2
        text_K = np.repeat(np.arange(lengths_N.size), np.diff(tokenized.offsets_N))
        line_K = text_K * distance + tokenized.starts_K
        return cls(tokenized, lengths_N, lengths_N - np.array(trailing, np.int64), distance, line_K)

    def tokens_before(self, text_S: Int64, byte_S: Int64) -> Int64:
        """How many of all tokens begin before a byte of a text, those of earlier texts among them."""
        found: Int64 = np.searchsorted(self.line_K, text_S * self.distance + byte_S, "left")
        return np.maximum(found, self.tokenized.offsets_N[text_S])


@dataclass(frozen=True)
class _Spans:
    """Trained spans: the document of each, its first and last token (exclusive) among all, and whether they fit it."""

    document_S: Int64
    first_S: Int64
    last_S: Int64
    aligned_S: Bool

    @classmethod
    def of(cls, texts: _Texts, encoded: Sequence[bytes], lines: _Lines) -> _Spans:
        """The tokens of every span, and whether tokens begin and end where it does.

        White space behind the last span of a document may be in its last token: the reference trains that too.
        """
        document_S = np.repeat(np.arange(len(encoded)), [len(spans) for spans in texts.spans])
        begin_S, end_S = _edges_in_bytes(texts, encoded).T
        first_S, last_S = lines.tokens_before(document_S, begin_S), lines.tokens_before(document_S, end_S)
        until_S = lines.tokenized.offsets_N[document_S + 1]
        starts_K = np.append(lines.tokenized.starts_K, 0)
        # Behind its last token there is only the end of the document: what begins or ends before that is in the token.
        begins_S = np.where(first_S == until_S, begin_S == lines.lengths_N[document_S], starts_K[first_S] == begin_S)
        ends_S = np.where(last_S == until_S, end_S >= lines.written_N[document_S], starts_K[last_S] == end_S)
        return cls(document_S, first_S, last_S, begins_S & ends_S)

    def aligned(self, documents: int) -> Bool:
        """Whether all spans of a document are."""
        aligned_N = np.ones(documents, np.bool_)
        aligned_N[self.document_S[~self.aligned_S]] = False
        return aligned_N


def _edges_in_bytes(texts: _Texts, encoded: Sequence[bytes]) -> Int64:
    """First and last byte (exclusive) of every span of characters, (S, 2)."""
    edges: list[int] = []
    for text, data, spans in zip(texts.texts, encoded, texts.spans, strict=True):
        for begin, end in spans:
            if len(text) == len(data):
                edges += (begin, end)
            else:
                before = len(text[:begin].encode())
                edges += (before, before + len(text[begin:end].encode()))
    return np.array(edges, np.int64).reshape(-1, 2)


def _in_order(number_of_documents: int, bulk: _Bulk, by_reference: dict[int, Encoded]) -> EncodedDocuments:
    """Documents of both ways in the order of their examples."""
    lengths_N = np.zeros(number_of_documents, np.int64)
    separators_N = np.zeros(number_of_documents, np.bool_)
    turns_N, ended_turns_N, spoken_N = (np.zeros(number_of_documents, np.int64) for _ in range(3))
    lengths_N[bulk.numbers] = bulk.lengths_N
    separators_N[bulk.numbers] = bulk.separators_N
    turns_N[bulk.numbers] = ended_turns_N[bulk.numbers] = bulk.turns_N
    for number, one in by_reference.items():
        lengths_N[number] = one.ids.size
        separators_N[number] = one.separator_tokens > 0
        turns_N[number], ended_turns_N[number] = one.turns, one.ended_turns
        spoken_N[number] = one.spoken_specials
    begins_N = np.cumsum(lengths_N) - lengths_N
    ids_K = np.empty(int(lengths_N.sum()), np.int32)
    trained_K = np.empty(ids_K.size, np.bool_)
    from_K = np.arange(int(bulk.lengths_N.sum()))
    to_K = from_K + np.repeat(begins_N[bulk.numbers] - (np.cumsum(bulk.lengths_N) - bulk.lengths_N), bulk.lengths_N)
    from_K += np.repeat(bulk.begins_N - (np.cumsum(bulk.lengths_N) - bulk.lengths_N), bulk.lengths_N)
    ids_K[to_K], trained_K[to_K] = bulk.ids_K[from_K], bulk.trained_K[from_K]
    for number, one in by_reference.items():
        part = slice(int(begins_N[number]), int(begins_N[number]) + one.ids.size)
        ids_K[part], trained_K[part] = one.ids, one.trained
    return EncodedDocuments(ids_K, trained_K, lengths_N, separators_N, turns_N, ended_turns_N, spoken_N)
