"""Conversations of one shape are rendered alike: where the texts of messages stand is learned once for each shape.

A shape is the sequence of roles, and which of the messages are trained. A template is rendered once with a marker in
place of every text, and what it writes between the markers is kept. A conversation of the same shape is then its own
texts between those parts, where the template does nothing but put texts in their places; that is read from its program
(:mod:`trainkit.data.template_reading`). Where it cannot be said of a template, each conversation is rendered, and one
goes the way of :mod:`trainkit.data.turns` if its rendering is not, letter for letter, what the shape says.

Legend: M messages of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.data.chat_templates import TemplateProblem
from trainkit.data.conversations import Conversation, Message
from trainkit.data.turns import find_turns, is_trained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainkit.data.chat_templates import ChatTemplate
    from trainkit.data.spoken_specials import SpecialTokens

_REASONING_TAG = "think>"  # of <think> and </think>: such turns have parts of their own


@dataclass(frozen=True, slots=True)
class Placed:
    """A rendering, and its trained turns as first and last character (exclusive), each with its end-of-turn token.

    ``specials`` counts the special tokens in it that are the template's own.
    """

    text: str
    turns: list[tuple[int, int]]
    specials: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a template writes around M texts: ``between`` has M + 1 parts.

    ``turns`` are (message, characters before its text, characters behind it) that are trained; ``stripped`` says of
    every message whether the template takes the white space around its text away; ``specials`` counts the special
    tokens that the template writes.
    """

    between: tuple[str, ...]
    turns: tuple[tuple[int, int, int], ...]
    stripped: tuple[bool, ...]
    specials: int


class ChatShapes:
    """The shapes of one template's renderings, learned as they are met."""

    def __init__(self, template: ChatTemplate, end_tokens: Sequence[str], special: SpecialTokens) -> None:
        self._template = template
        self._end_tokens = end_tokens
        self._special = special
        self._shapes: dict[tuple[tuple[str, bool], ...], _Shape | None] = {}

    def place(self, conversation: Conversation) -> Placed | None:
        """The rendering with its turns; None where the template does more than to put texts in their places.

        Raises TemplateProblem as the template does.
        """
        messages = conversation.messages
        if conversation.tools is not None or any(message.extras for message in messages):
            return None
        shape = self._shape_of(messages)
        if shape is None:
            return None
        parts = [shape.between[0]]
        starts = []
        length = len(parts[0])
        for message, stripped, after in zip(messages, shape.stripped, shape.between[1:], strict=True):
            text = message.content
            if stripped:
                text = text.strip()
            if not text or text.isspace() or _REASONING_TAG in text:
                return None
            starts.append(length)
            parts += (text, after)
            length += len(text) + len(after)
        predicted = "".join(parts)
        if not self._template.only_places_texts and self._template.render(messages) != predicted:
            return None
        turns = [
            (starts[at] - before, starts[at] + len(parts[2 * at + 1]) + behind) for at, before, behind in shape.turns
        ]
        return Placed(predicted, turns, shape.specials)

    def _shape_of(self, messages: Sequence[Message]) -> _Shape | None:
        key = tuple((message.role, is_trained(message)) for message in messages)
        if key not in self._shapes:
            try:
                self._shapes[key] = self._learned(messages)
            except TemplateProblem:
                self._shapes[key] = None
        return self._shapes[key]

    def _learned(self, messages: Sequence[Message]) -> _Shape | None:
        """The shape of conversations like this one; None where markers do not come out once each and in order."""
        markers = [f"jackdaw{number}q" for number in range(len(messages))]
        marked = _with_texts(messages, markers)
        rendering = self._template.render(marked.messages)
        between = _parts_between(rendering, markers)
        if between is None:
            return None
        spaced = self._template.render(_with_texts(messages, [f" \n{marker}\n " for marker in markers]).messages)
        stripped = tuple(f" \n{marker}\n " not in spaced for marker in markers)
        turns = []
        for turn, index in zip(
            find_turns(self._template, marked, rendering, self._end_tokens),
            (index for index, message in enumerate(messages) if is_trained(message)),
            strict=True,
        ):
            if not turn.ended:
                return None
            at = rendering.index(markers[index])
            turns.append((index, at - turn.start, turn.end - at - len(markers[index])))
        specials = sum(self._special.count(part) for part in between)
        return _Shape(tuple(between), tuple(turns), stripped, specials)


def _with_texts(messages: Sequence[Message], texts: Sequence[str]) -> Conversation:
    """The conversation with other texts."""
    return Conversation(
        tuple(
            Message(message.role, text, message.trained, message.extras)
            for message, text in zip(messages, texts, strict=True)
        )
    )


def _parts_between(rendering: str, markers: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the markers, if each is there once and in order."""
    parts = []
    at = 0
    for marker in markers:
        found = rendering.find(marker, at)
        if found < 0 or rendering.count(marker) != 1:
            return None
        parts.append(rendering[at:found])
        at = found + len(marker)
    return [*parts, rendering[at:]]
