"""Texts of special tokens that messages say: words there, and tokens only where the template writes them.

Whoever writes ``<|im_end|>`` into a message would otherwise end the turn, or begin one in another's name. A tokenizer
cannot tell the two apart, so a rendering is cut at the template's own special tokens and the rest is tokenised with
special tokens switched off. Added tokens that are not special (``<think>``, ``<tool_call>`` in most models) are markup
that messages may well contain, and stay tokens wherever they stand.

Legend: T tokens.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.data.chat_templates import TemplateProblem
from trainkit.data.turns import place_of, strings_in, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from trainkit.data.chat_templates import ChatTemplate
    from trainkit.data.conversations import Conversation

    Span = tuple[int, int]
    Tokens = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]


def unset(engine: Tokenizer) -> None:
    """Take truncation and padding off: states of an engine that whoever shares it may have left there."""
    engine.no_truncation()
    engine.no_padding()


class SpecialTokens:
    """The special tokens of a tokenizer, and texts tokenised with some of them as words.

    ``engine`` turns text into ids and adds nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, engine: Tokenizer) -> None:
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
        longest_first = sorted((token.content for token in special), key=len, reverse=True)
        self.ids = frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._id_of = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self._takes_space = {token.content: (token.lstrip, token.rstrip) for token in special}
        self._added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content]
        self._inside_words = all(not token.single_word for token in special)
        self._engine = engine
        self._engines_of_words: tuple[Tokenizer, Tokenizer] | None = None

    @cached_property
    def always_found(self) -> bool:
        """Whether a special token is one wherever its text stands, whatever stands beside it.

        Not so if it has to be a word of its own, or if another added token holds its text or may run into it. Where it
        is so, a text has as many special tokens as were written into it on purpose only if it says none besides.
        """
        specials = set(self._takes_space)
        beginnings = {one[:end] for one in specials for end in range(1, len(one))}
        return self._inside_words and not any(_gets_in_the_way(one, specials, beginnings) for one in self._added)

    def count(self, text: str) -> int:
        """How many special tokens stand in a text."""
        return 0 if self._pattern is None else sum(1 for _ in self._pattern.finditer(text))

    def spoken(
        self, template: ChatTemplate, conversation: Conversation, rendering: str, *, generation_prompt: bool = False
    ) -> list[Span]:
        """First and last character (exclusive) of every special token's text in ``rendering`` that a message says.

        ``generation_prompt``: it ends with one. Raises TemplateProblem where a message says nothing else and it cannot
        be located.
        """
        found: set[Span] = set()
        for region in self._regions(template, conversation, rendering, generation_prompt=generation_prompt):
            assert self._pattern is not None, "without special tokens there are no regions"
            found.update(match.span() for match in self._pattern.finditer(rendering, *region))
        return sorted(found)

    def tokens(self, text: str, spoken: Sequence[Span]) -> Tokens:
        """``text`` as ids, with the first and last character (exclusive) of each; what is ``spoken`` becomes words."""
        unset(self._engine)
        if not spoken:
            encoding = self._engine.encode(text, add_special_tokens=False)
            offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            return np.asarray(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1]
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for start, end, token in (*self._own(text, spoken), (len(text), len(text), "")):
            for number, (first, last) in self._words(text[at:start], begins=at == 0):
                ids.append(number)
                starts.append(at + first)
                ends.append(at + last)
            if token:
                ids.append(self._id_of[token])
                starts.append(start)
                ends.append(end)
            at = end
        return np.asarray(ids, np.int32), np.asarray(starts, np.int64), np.asarray(ends, np.int64)

    def _regions(
        self, template: ChatTemplate, conversation: Conversation, rendering: str, *, generation_prompt: bool
    ) -> Iterator[Span]:
        """Where the messages and tools that say a special token's text stand in the rendering."""
        if self._pattern is None:
            return
        for index, message in enumerate(conversation.messages):
            said = [text for text in (message.content, *texts_of(message)) if self._pattern.search(text)]
            place = None
            if said and not message.extras:
                with suppress(TemplateProblem):
                    plain = template.render(conversation.messages, conversation.tools)
                    # A generation prompt mostly follows what is rendered without one.
                    if rendering == plain or (generation_prompt and rendering.startswith(plain)):
                        place = place_of(template, conversation, index, plain)
            if place is not None:
                yield place
                continue
            for text in said:
                yield from self._occurrences(text, rendering, f"message {index + 1} ({message.role})")
        for text in strings_in(conversation.tools):
            if self._pattern.search(text):
                yield from self._occurrences(text, rendering, "a tool")

    def _occurrences(self, text: str, rendering: str, where: str) -> Iterator[Span]:
        """Every place where the text stands, as it is or as a JSON string."""
        assert self._pattern is not None
        text = text.strip()
        if not self._pattern.sub("", text).strip():
            raise TemplateProblem(f"{where} says only {text!r}, which cannot be told from the template's own")
        for written in {text, *(json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))}:
            at = rendering.find(written)
            while at >= 0:
                yield at, at + len(written)
                at = rendering.find(written, at + len(written))

    def _own(self, text: str, spoken: Sequence[Span]) -> Iterator[tuple[int, int, str]]:
        """The special tokens that are no words, with the white space that they take."""
        assert self._pattern is not None
        words = set(spoken)
        taken = 0
        for match in self._pattern.finditer(text):
            if match.span() in words:
                continue
            start, end = match.span()
            left, right = self._takes_space[match[0]]
            if left:
                start = max(taken, len(text[:start].rstrip()))
            if right:
                end = len(text) - len(text[end:].lstrip())
            yield start, end, match[0]
            taken = end

    def _words(self, text: str, *, begins: bool) -> Iterator[tuple[int, Span]]:
        if not text:
            return
        if self._engines_of_words is None:
            self._engines_of_words = _engines_of_words(self._engine)
        encoding = self._engines_of_words[not begins].encode(text, add_special_tokens=False)
        yield from zip(encoding.ids, encoding.offsets, strict=True)


def _gets_in_the_way(token: str, specials: AbstractSet[str], beginnings: AbstractSet[str]) -> bool:
    """Whether an added token holds a special token, or ends as one begins."""
    size = len(token)
    parts = (token[begin:end] for begin in range(size) for end in range(begin + 1, size + 1) if end - begin < size)
    return any(part in specials for part in parts) or any(token[begin:] in beginnings for begin in range(1, size))


def _engines_of_words(engine: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """Copies that know no special token: for the beginning of a text, and for a part further on."""
    from tokenizers import Tokenizer

    described = engine.to_str()
    beginning: Tokenizer = Tokenizer.from_str(described)
    inside = beginning
    if '"prepend_scheme":"first"' in json.dumps(_pre_tokenizer(engine), separators=(",", ":")):
        changed = json.loads(described)
        _never_first(changed["pre_tokenizer"])
        inside = Tokenizer.from_str(json.dumps(changed))
    beginning.encode_special_tokens = inside.encode_special_tokens = True
    return beginning, inside


def _pre_tokenizer(engine: Tokenizer) -> Any:
    """What the engine does before tokens are made, as tokenizer.json describes it."""
    return None if engine.pre_tokenizer is None else json.loads(engine.pre_tokenizer.__getstate__())


def _never_first(described: Any) -> None:
    """Metaspace puts a space before a text's first part alone; parts further on must not look like first ones."""
    if isinstance(described, dict):
        if described.get("prepend_scheme") == "first":
            described["prepend_scheme"] = "never"
        for part in described.get("pretokenizers", ()):
            _never_first(part)
