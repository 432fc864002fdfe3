"""From an example to its tokens, and which of them are trained.

    example --template--> text with spans of characters to train --tokenizer--> ids, offsets --> ids, trained

Whatever is lost on the way is an error that names the example: text that a template drops, characters that the
tokenizer does not give back, a span whose tokens do not decode to it.

A special token is one only where the template writes it: a message that contains the text ``<|im_end|>`` says these
characters and ends no turn. Plain texts, prompts and completions are their author's own markup and are read as such.

This is the reference, one example at a time; :mod:`trainkit.data.bulk_encoding` gives the same documents many at once.

Legend: T tokens of a document.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.data.chat_templates import ChatTemplate, TemplateProblem, find_template
from trainkit.data.conversations import Conversation, ParsedExample, PromptCompletion
from trainkit.data.spoken_specials import SpecialTokens, unset
from trainkit.data.token_bytes import FastTokens, fast_tokens
from trainkit.data.turns import check_nothing_lost, end_tokens_of, find_turns
from trainkit.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from trainkit.recipe.schema import Data, Packing

ENCODING_VERSION = 3
"""Part of every fingerprint: raise it when the same example would get other tokens or another mask."""
_MADE_OF_BYTES = "\ufffd"


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A document: its ``ids`` and whether each is ``trained``, both of shape (T,): trained[t] makes token t a target.

    The first token is never a target: nothing stands before it. ``separator_tokens`` (0 or 1) of the last tokens were
    added by us. ``turns`` counts the trained turns of a conversation, ``ended_turns`` those whose end is trained too;
    ``spoken_specials`` counts the texts of special tokens that its messages say.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    separator_tokens: int = 0
    turns: int = 0
    ended_turns: int = 0
    spoken_specials: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given to answer, as text and ids, and the answer that the example has."""

    ids: tuple[int, ...]
    text: str
    reference: str


@dataclass(slots=True)
class Draft:
    """A document as text, with the characters that are trained.

    ``spoken`` are the characters of special tokens' texts that messages say, in order.
    """

    place: str
    text: str
    spans: list[tuple[int, int]]
    is_chat: bool = False
    turns: int = 0
    ended_turns: int = 0
    spoken: Sequence[tuple[int, int]] = ()


@dataclass(slots=True)
class _Tokens:
    """Ids with their first and last character (exclusive) in the text, all (T,)."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Tokens that are trained, as ranges."""


class Encoder:
    """Encodes examples with one tokenizer and one recipe.

    Raises UsageError for a template or separator that does not exist, ModelError for a tokenizer that cannot do what
    the recipe asks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data, packing: Packing) -> None:
        self.tokenizer = tokenizer
        self._name = tokenizer.name_or_path
        self.train_all = data.train_on == "all"
        self.text_tokenizer = text_tokenizer(tokenizer)
        self.prefix = _ids_before_text(tokenizer)
        self._chosen_template = data.chat_template
        self._templates: dict[bool, tuple[ChatTemplate, tuple[str, ...]]] = {}
        self.separator = self._separator_id(packing.separator)
        """Id of the token that is put behind a document that has no end of its own; None: none is."""
        self.document_ends = {one for one in (self.separator, tokenizer.eos_token_id) if one is not None}
        self._added = _AddedTokens(tokenizer)
        self.special = SpecialTokens(tokenizer, self.text_tokenizer)
        self.chat_template: Any = tokenizer.chat_template
        """Jinja text to be saved with the result (a mapping where the tokenizer has several); None without one."""
        if data.chat_template is not None:
            self.chat_template = self.template(tools=False)[0].text
        self._settings = [ENCODING_VERSION, data.train_on, packing.separator, self.chat_template]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides ids and mask: tokenizer, special tokens, template, recipe, our version."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        said = json.dumps([*self._settings, special, self.tokenizer_json, self.prefix], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    @cached_property
    def fast(self) -> FastTokens:
        """The tokenizer once more, for many texts at once."""
        return fast_tokens(self.text_tokenizer, self.tokenizer_json)

    @cached_property
    def tokenizer_json(self) -> str:
        """The engine of the tokenizer, as tokenizer.json describes it."""
        unset(self.text_tokenizer)
        return str(self.text_tokenizer.to_str())

    @cached_property
    def largest_token_id(self) -> int:
        """The largest id that a document can hold; the model's embedding must have a row for it."""
        return max(self.text_tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, parsed: ParsedExample, place: str) -> Encoded:
        """The document of one example; ``place`` names it in errors. See :meth:`encode_many`."""
        return self.encode_many([(parsed, place)])[0]

    def encode_many(self, examples: Sequence[tuple[ParsedExample, str]]) -> list[Encoded]:
        """The documents of several (example, place), in their order; a few hundred at once are encoded fastest.

        Raises ModelError, naming the example, when the chat template cannot render it or loses a part of it, and when
        the tokenizer does not give the text back; DataError when a text is not valid Unicode.
        """
        drafts = [self.draft(parsed, place) for parsed, place in examples]
        unset(self.text_tokenizer)
        try:
            encodings = self.text_tokenizer.encode_batch([draft.text for draft in drafts], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"{_with_surrogate(drafts)}: the text holds half a surrogate pair; remove it") from error
        documents = [self._tokens(draft, encoding) for draft, encoding in zip(drafts, encodings, strict=True)]
        self._check_round_trip(drafts, documents)
        self._check_spans(drafts, documents)
        return [self._encoded(draft, tokens) for draft, tokens in zip(drafts, documents, strict=True)]

    def prompt(self, parsed: ParsedExample, place: str = "held-out example") -> Prompt | None:
        """The question that an example asks: a conversation before its last answer, or the prompt of a completion.

        None for plain text, and where nothing stands before the answer.
        """
        if isinstance(parsed, PromptCompletion):
            bare = self.special.tokens(parsed.prompt, ())[0].tolist()
            ids = [*self._missing_prefix(bare), *bare]
            return Prompt(tuple(ids), parsed.prompt, parsed.completion) if ids else None
        if not isinstance(parsed, Conversation):
            return None
        answers = [index for index, message in enumerate(parsed.messages) if message.role == "assistant"]
        if not answers or answers[-1] == 0:
            return None
        template, _ = self.template(tools=parsed.tools is not None)
        asked = Conversation(parsed.messages[: answers[-1]], parsed.tools)
        try:
            text = template.render(asked.messages, asked.tools, generation_prompt=True)
            spoken = self.special.spoken(template, asked, text, generation_prompt=True)
        except TemplateProblem as problem:
            raise _not_rendered(place, template, problem) from problem
        ids = self.special.tokens(text, spoken)[0].tolist()
        return Prompt(tuple(ids), text, parsed.messages[answers[-1]].content)

    def draft(self, parsed: ParsedExample, place: str) -> Draft:
        """The text of an example and what of it is trained. Raises ModelError where a template cannot render it."""
        if isinstance(parsed, Conversation):
            return self._conversation_draft(parsed, place)
        if isinstance(parsed, PromptCompletion):
            text = parsed.prompt + parsed.completion
            start = 0 if self.train_all else len(parsed.prompt)
        else:
            text, start = parsed.text, 0
        return Draft(place, text, [(start, len(text))])

    def _conversation_draft(self, conversation: Conversation, place: str) -> Draft:
        template, end_tokens = self.template(tools=conversation.tools is not None)
        try:
            text = template.render(conversation.messages, conversation.tools)
            check_nothing_lost(conversation, text)
            turns = () if self.train_all else find_turns(template, conversation, text, end_tokens)
            spoken = self.special.spoken(template, conversation, text)
        except TemplateProblem as problem:
            raise _not_rendered(place, template, problem) from problem
        spans = [(0, len(text))] if self.train_all else [(turn.start, turn.end) for turn in turns]
        return Draft(place, text, spans, True, len(turns), sum(turn.ended for turn in turns), spoken)

    def _tokens(self, draft: Draft, encoding: Encoding) -> _Tokens:
        tokens = _Tokens(*self.special.tokens(draft.text, draft.spoken)) if draft.spoken else _as_arrays(encoding)
        if cuts := [start for start, _ in draft.spans if _runs_into(tokens, draft.text, start)]:
            apart = self._cut_apart(draft, cuts)
            if _same_text(self.text_tokenizer.decode(apart.ids.tolist(), skip_special_tokens=False), draft.text):
                tokens = apart
        tokens.spans = [_tokens_inside(tokens, draft.text, *span) for span in draft.spans]
        return tokens

    def _cut_apart(self, draft: Draft, cuts: list[int]) -> _Tokens:
        """The text tokenised in parts, as it is in use: the prompt by itself, then what the model writes."""
        edges = list(pairwise([0, *cuts, len(draft.text)]))
        parts = [
            self.special.tokens(
                draft.text[start:end], [(a - start, b - start) for a, b in draft.spoken if start <= a and b <= end]
            )
            for start, end in edges
        ]
        return _Tokens(
            np.concatenate([ids for ids, _, _ in parts]),
            np.concatenate([starts + at for (_, starts, _), (at, _) in zip(parts, edges, strict=True)]),
            np.concatenate([ends + at for (_, _, ends), (at, _) in zip(parts, edges, strict=True)]),
        )

    def _encoded(self, draft: Draft, tokens: _Tokens) -> Encoded:
        """Ids and mask, with the BOS token before a plain text and the separator behind the document."""
        prefix = [] if draft.is_chat else self._missing_prefix(tokens.ids[: len(self.prefix)].tolist())
        ids = np.concatenate([np.asarray(prefix, np.int32), tokens.ids])
        trained = np.full(ids.size, self.train_all, np.bool_)
        for first, last in tokens.spans:
            trained[len(prefix) + first : len(prefix) + last] = True
        ended_turns = draft.ended_turns
        separated = self.separator is not None and not self._is_ended(draft.text, tokens)
        if separated:
            follows_trained = bool(trained.size and trained[-1])
            ids = np.append(ids, np.int32(self.separator or 0))
            trained = np.append(trained, follows_trained)
            ended_turns += follows_trained and ended_turns < draft.turns  # a last turn that the template left open
        trained[:1] = False
        return Encoded(ids, trained, int(separated), draft.turns, ended_turns, len(draft.spoken))

    def _is_ended(self, text: str, tokens: _Tokens) -> bool:
        """Whether an end-of-sequence token stands before the document's trailing white space."""
        last = int(np.searchsorted(tokens.starts, len(text.rstrip()), "left")) - 1
        return last >= 0 and int(tokens.ids[last]) in self.document_ends

    def _check_round_trip(self, drafts: Sequence[Draft], documents: Sequence[_Tokens]) -> None:
        decoded = self._decode(tokens.ids.tolist() for tokens in documents)
        for draft, text in zip(drafts, decoded, strict=True):
            if text != draft.text and not self._added.given_back(draft.text, text):
                raise ModelError(
                    f"{draft.place}: {self._name}: the tokenizer {_loss(draft.text, text)}; use its original files"
                )

    def _check_spans(self, drafts: Sequence[Draft], documents: Sequence[_Tokens]) -> None:
        """Decode what is trained. White space is not compared: some tokenizers begin every text with a space."""
        found = [
            (draft, draft.text[tokens.starts[first] : tokens.ends[last - 1]], tokens.ids[first:last].tolist())
            for draft, tokens in zip(drafts, documents, strict=True)
            for first, last in tokens.spans
            if first < last and last - first < tokens.ids.size  # a whole document has just been compared
        ]
        for (draft, text, _), decoded in zip(found, self._decode(ids for _, _, ids in found), strict=True):
            if decoded != text and not _same_text("".join(decoded.split()), "".join(text.split())):
                raise ModelError(
                    f"{draft.place}: {self._name}: the trained tokens say {decoded[:40]!r}, the text {text[:40]!r}; "
                    "the tokenizer's offsets are wrong"
                )

    def _decode(self, sequences: Iterable[list[int]]) -> list[str]:
        return self.text_tokenizer.decode_batch(list(sequences), skip_special_tokens=False)

    def _missing_prefix(self, ids: list[int]) -> list[int]:
        """The BOS token that the tokenizer puts before a plain text; nothing where the text begins with it already."""
        return [] if ids[: len(self.prefix)] == self.prefix else self.prefix

    def template(self, *, tools: bool) -> tuple[ChatTemplate, tuple[str, ...]]:
        """The template for conversations with or without tools, and the tokens that end a turn in it."""
        if tools not in self._templates:
            template = find_template(self.tokenizer, self._chosen_template, adds_bos=bool(self.prefix), tools=tools)
            end_tokens = end_tokens_of(template, self._added.texts, self.tokenizer.eos_token)
            self._templates[tools] = (template, end_tokens)
        return self._templates[tools]

    def _separator_id(self, separator: str) -> int | None:
        if separator == "none":
            return None
        if separator == "eos":
            if self.tokenizer.eos_token_id is None:
                raise ModelError(
                    f"{self._name}: the tokenizer has no end-of-sequence token; "
                    "set packing.separator to one of its tokens, or to none"
                )
            return int(self.tokenizer.eos_token_id)
        found = self.text_tokenizer.token_to_id(separator)
        if found is None:
            raise UsageError(
                f"packing.separator: {separator!r} is not in the vocabulary of {self._name}; "
                "give one of its tokens, eos or none"
            )
        return int(found)


class _AddedTokens:
    """The tokens that a tokenizer takes out of a text before anything else, and what that may do to spaces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
        self.texts = tuple(token.content for token in added if token.content.strip())
        self._split = re.compile("|".join(map(re.escape, self.texts))) if self.texts else None
        swallowing = [
            (r"\s*" if token.lstrip else "") + f"(?:{re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
            for token in added
            if token.lstrip or token.rstrip
        ]
        self._swallow = re.compile("|".join(swallowing)) if swallowing else None

    def given_back(self, text: str, decoded: str) -> bool:
        """Whether ``decoded`` is ``text`` but for what tokenizers are documented to do.

        That is: canonical composition (NFC), a space that is put before the text or between an added token and what
        follows it, the first space of a text, which decoders of SentencePiece vocabularies take for one that was put
        there, and white space that an added token swallows (its ``lstrip`` and ``rstrip``).
        """
        text, decoded = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", decoded)
        if self._swallow is not None:
            text, decoded = (self._swallow.sub(lambda match: match[0].strip(), one) for one in (text, decoded))
        return self._follow(text, decoded) or (text.startswith(" ") and self._follow(text[1:], decoded))

    def _follow(self, text: str, decoded: str) -> bool:
        """Whether the parts of ``text`` make up ``decoded``, with at most a space before each."""
        at = 0
        for part in self._parts(text):
            if not decoded.startswith(part, at) and decoded.startswith(" ", at):
                at += 1
            if not decoded.startswith(part, at):
                return False
            at += len(part)
        return not decoded[at:].strip(" ")

    def _parts(self, text: str) -> list[str]:
        """The text cut before and after every added token."""
        if self._split is None:
            return [text]
        edges = [0, *(edge for match in self._split.finditer(text) for edge in match.span()), len(text)]
        return [text[start:end] for start, end in pairwise(edges)]


def show_tokens(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[tuple[str, bool]]:
    """The first ``limit`` tokens as consecutive (text, trained?), special tokens spelled out.

    A character of several tokens is never cut: it goes with the part in which it is complete.
    """
    ids = encoded.ids[:limit].tolist()
    trained = encoded.trained[:limit]
    edges = [*(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    spans: list[tuple[str, bool]] = []
    shown = ""
    for edge in edges if ids else []:
        text = tokenizer.decode(ids[:edge], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith(_MADE_OF_BYTES) and edge < len(ids):
            continue
        spans.append((text[len(shown) :], bool(trained[edge - 1])))
        shown = text
    return spans


def text_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's engine, set to cut nothing off and to pad nothing, with offsets that cover every character.

    It is the tokenizer's own where that will do: a copy takes half a second. Some post-processors (ByteLevel, Roberta)
    leave a token's leading space out of its offsets; of those there is a copy without.
    """
    from tokenizers import Tokenizer, processors

    engine: Tokenizer = tokenizer.backend_tokenizer
    unset(engine)
    if engine.post_processor is None or not _trims_offsets(json.loads(engine.post_processor.__getstate__())):
        return engine
    copy: Tokenizer = Tokenizer.from_str(engine.to_str())
    copy.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return copy


def _trims_offsets(described: Any) -> bool:
    """Whether a post-processor, or a part of one, changes offsets."""
    if isinstance(described, dict):
        return bool(described.get("trim_offsets")) or any(map(_trims_offsets, described.get("processors", ())))
    return False


def _ids_before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a plain call of the tokenizer puts before a text: its BOS token, or nothing."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    before = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return list(whole[:before])


def _as_arrays(encoding: Encoding) -> _Tokens:
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    return _Tokens(np.asarray(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])


def _runs_into(tokens: _Tokens, text: str, start: int) -> bool:
    """Whether a token that begins before ``start`` holds a visible character from there on."""
    before = int(np.searchsorted(tokens.starts, start, "left")) - 1
    return before >= 0 and bool(text[start : int(tokens.ends[before])].strip())


def _tokens_inside(tokens: _Tokens, text: str, start: int, end: int) -> tuple[int, int]:
    """The range of tokens that a span of characters trains.

    A token that runs over an edge is trained if what it holds beyond the edge is white space and, at the start, if it
    also holds something visible of the span: so no word of a prompt is ever trained.
    """
    first = int(np.searchsorted(tokens.starts, start, "left"))
    last = int(np.searchsorted(tokens.starts, end, "left"))
    if first > 0 and _runs_into(tokens, text, start) and not text[int(tokens.starts[first - 1]) : start].strip():
        first -= 1
    while last > first and text[end : int(tokens.ends[last - 1])].strip():
        last -= 1
    return first, last


def _not_rendered(place: str, template: ChatTemplate, problem: TemplateProblem) -> ModelError:
    return ModelError(f"{place}: {template.name}: {problem}; mend the example, or set another data.chat_template")


def _same_text(left: str, right: str) -> bool:
    return left == right or unicodedata.normalize("NFC", left) == unicodedata.normalize("NFC", right)


def _loss(text: str, decoded: str) -> str:
    """What a round trip through the tokenizer did to a text, in a few words."""
    lost = Counter(text) - Counter(decoded)
    at = next((at for at, (one, other) in enumerate(zip(text, decoded, strict=False)) if one != other), len(decoded))
    around = slice(max(0, at - 12), at + 16)
    what = f"loses {' '.join(repr(character) for character in list(lost)[:8])}" if lost else "changes the text"
    return f"{what}: {text[around]!r} comes back as {decoded[around]!r}"


def _with_surrogate(drafts: Sequence[Draft]) -> str:
    """The place of the first text that cannot be UTF-8."""
    for draft in drafts:
        try:
            draft.text.encode()
        except UnicodeEncodeError:
            return draft.place
    return drafts[0].place
