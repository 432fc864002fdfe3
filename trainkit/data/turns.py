"""Where in a rendered conversation each trained turn stands, found by comparing renderings.

A twin is the same conversation with one message's text replaced by a marker. What stands before and after the marker in
the twin stands before and after that message's text in the rendering; both are compared, so that a template which does
more than put a text in its place is noticed. Nothing is assumed about what a template writes around a turn, and no
prompt is rendered to be cut off: many templates write earlier turns differently once a later one follows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainkit.data.chat_templates import TemplateProblem, as_template_input
from trainkit.data.conversations import Conversation, Message

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trainkit.data.chat_templates import ChatTemplate

_THINKING = re.compile(r"</?think>")
_MADE_BY_THE_ASSISTANT = ("tool_calls", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Turn:
    """Characters ``start`` to ``end`` of a rendering; ``ended``: the last of them are its end-of-turn token."""

    start: int
    end: int
    ended: bool


def find_turns(
    template: ChatTemplate, conversation: Conversation, rendering: str, end_tokens: Sequence[str]
) -> tuple[Turn, ...]:
    """The turns that are trained, in their order: what the assistant says, and the token that ends its turn.

    A message's own ``trained`` goes before its role. A turn holds the text, the reasoning and the tool calls that the
    template renders for it, and everything from there to the first of ``end_tokens``, as long as the next message has
    not begun. Raises TemplateProblem when what a turn says is not in the rendering, or cannot be located.
    """
    turns = []
    for index, message in enumerate(conversation.messages):
        if is_trained(message):
            start, end = place_of(template, conversation, index, rendering)
            stop = _end_of_turn(template, conversation, index, rendering, end, end_tokens)
            _check_said(message, rendering[start:end], rendering[start:stop])
            turns.append(Turn(start, stop or end, ended=stop is not None))
    return tuple(turns)


def is_trained(message: Message) -> bool:
    """Whether training on completions trains this message."""
    return message.role == "assistant" if message.trained is None else message.trained


def end_tokens_of(template: ChatTemplate, added_tokens: Sequence[str], eos: str | None) -> tuple[str, ...]:
    """What may end a turn: the first added token that the template writes after a last assistant message, and eos.

    Where it writes no token of the vocabulary there, the words it writes stand for one.
    """
    marker = "jackdaw"
    conversation = (Message("user", "sphinx"), Message("assistant", marker))
    tool = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
    for tools in (None, [{"type": "function", "function": tool}]):
        try:
            rendering = template.render(conversation, tools)
        except TemplateProblem:
            continue
        tail = rendering[rendering.rfind(marker) + len(marker) :]
        found = min((token for token in added_tokens if token in tail), key=tail.find, default=tail.strip())
        return tuple(dict.fromkeys(filter(None, (found, eos))))
    return tuple(filter(None, (eos,)))


def place_of(template: ChatTemplate, conversation: Conversation, index: int, rendering: str) -> tuple[int, int]:
    """First and last character (exclusive) of what the template renders for a message itself."""
    message = conversation.messages[index]
    marker = "jackdaw"
    while marker in rendering:
        marker += "k"
    place = _compare(template, conversation, index, rendering, _plain_twin(message, marker), marker)
    if place is None and _says_more_than_content(message):
        place = _compare(template, conversation, index, rendering, _alike_twin(message, marker), marker)
        if place is not None:
            place = (_after_prompt(template, conversation, index, rendering, place[0], marker), place[1])
    if place is None:
        raise TemplateProblem(
            f"what message {index + 1} ({message.role}) says cannot be located: other parts change with its text"
        )
    start, end = place
    if rendering[:start].endswith(" "):  # a space that the model writes itself where the prompt ends before it
        words = len(rendering[:start].rstrip())
        start = _after_prompt(template, conversation, index, rendering, start, marker, earliest=words)
    return start, end


def _compare(
    template: ChatTemplate, conversation: Conversation, index: int, rendering: str, twin: Message, marker: str
) -> tuple[int, int] | None:
    """The part of ``rendering`` that stands where the twin has the marker; None where the two differ elsewhere."""
    messages = (*conversation.messages[:index], twin, *conversation.messages[index + 1 :])
    try:
        other = template.render(messages, conversation.tools)
    except TemplateProblem:
        return None
    start = other.find(marker)
    after = other[other.rfind(marker) + len(marker) :]
    end = len(rendering) - len(after)
    same = start >= 0 and start <= end and rendering.startswith(other[:start]) and rendering.endswith(after)
    return (start, end) if same else None


def _says_more_than_content(message: Message) -> bool:
    return any(message.extras.get(name) for name in _MADE_BY_THE_ASSISTANT) or bool(_THINKING.search(message.content))


def _plain_twin(message: Message, marker: str) -> Message:
    """A message that says nothing but the marker."""
    kept = {name: value for name, value in message.extras.items() if name not in _MADE_BY_THE_ASSISTANT}
    return replace(message, content=marker, extras=kept)


def _alike_twin(message: Message, marker: str) -> Message:
    """A message with reasoning and calls where the original has them: templates write such a turn otherwise."""
    said = _THINKING.split(message.content)
    tags = [*_THINKING.findall(message.content), ""]
    content = "".join((marker if part.strip() else part) + tag for part, tag in zip(said, tags, strict=True))
    extras = dict(message.extras)
    if extras.get("reasoning_content"):
        extras["reasoning_content"] = marker
    if extras.get("tool_calls"):
        extras["tool_calls"] = [_call_twin(call, marker) for call in extras["tool_calls"]]
    return replace(message, content=content, extras=extras)


def _call_twin(call: dict[str, Any], marker: str) -> dict[str, Any]:
    """The same tool call to a function named ``marker``; its arguments stay, whatever their shape."""
    if "function" in call:
        return {**call, "function": _call_twin(call["function"], marker)}
    return {**call, "name": marker}


def _after_prompt(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    rendering: str,
    before: int,
    marker: str,
    earliest: int = 0,
) -> int:
    """Where the model takes over from the prompt of this turn, looked for up to ``before``; ``before`` if unknown.

    It is the end of what the template writes between the message before and an answer that is asked for.
    """
    if index == 0:
        return before
    previous = _plain_twin(conversation.messages[index - 1], marker)
    try:
        prompt = template.render(
            (*conversation.messages[: index - 1], previous), conversation.tools, generation_prompt=True
        )
    except TemplateProblem:
        return before
    bridge = prompt[prompt.rfind(marker) + len(marker) :] if marker in prompt else ""
    found = rendering.rfind(bridge, 0, before) if bridge else -1
    return found + len(bridge) if found >= 0 and found + len(bridge) >= earliest else before


def _end_of_turn(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    rendering: str,
    said_until: int,
    end_tokens: Sequence[str],
) -> int | None:
    """Where the end-of-turn token behind a turn ends; None where the template writes none before the next message."""
    found = [(rendering.find(token, said_until), token) for token in end_tokens]
    at, token = min(((at, token) for at, token in found if at >= 0), default=(-1, ""))
    if at < 0:
        return None
    if rendering[said_until:at].strip() and index + 1 < len(conversation.messages):
        try:
            next_start, _ = place_of(template, conversation, index + 1, rendering)
        except TemplateProblem:
            return None
        if at >= next_start:
            return None
    return at + len(token)


def _check_said(message: Message, located: str, turn: str) -> None:
    """Raise TemplateProblem unless what was located is the message's text, or the turn has its reasoning and calls."""
    if not _says_more_than_content(message):
        if located.strip() != message.content.strip():
            raise TemplateProblem(f"it changes the text {_quoted(message.content)} to {_quoted(located)}")
        return
    for text in texts_of(message):
        if not _occurs(text, turn):
            raise TemplateProblem(f"it loses {_quoted(text)} of an assistant message")


def check_nothing_lost(conversation: Conversation, rendering: str) -> None:
    """Raise TemplateProblem for the first text of a message, or tool, that is not in the rendering."""
    for index, message in enumerate(conversation.messages):
        for part in _THINKING.split(message.content) if is_trained(message) else [_answer(message.content)]:
            if not _occurs(part, rendering):
                raise TemplateProblem(f"it loses {_quoted(part)} of message {index + 1} ({message.role})")
    for tool in conversation.tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
        if isinstance(name, str) and name not in rendering:
            raise TemplateProblem(f"it has no place for tools and loses {_quoted(name)}")


def _answer(content: str) -> str:
    """The text without its reasoning, which templates may leave out of turns that are context only."""
    return content.rsplit("</think>", 1)[-1]


def texts_of(message: Message) -> Iterator[str]:
    """Every text that an assistant message says."""
    yield from _THINKING.split(message.content)
    given = as_template_input(message)
    yield given.get("reasoning_content") or ""
    for call in given.get("tool_calls") or ():
        function = call.get("function", call)
        yield function.get("name", "")
        yield from strings_in(function.get("arguments"))


def strings_in(value: Any) -> Iterator[str]:
    """The strings of a JSON value; a string of JSON is one string."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def _occurs(text: str, rendering: str) -> bool:
    """Whether a text stands in the rendering, as it is or as a JSON string, apart from white space around it."""
    stripped = text.strip()
    return stripped in rendering or any(
        json.dumps(stripped, ensure_ascii=ascii_only)[1:-1] in rendering for ascii_only in (False, True)
    )


def _quoted(text: str) -> str:
    """The beginning of a text, in one line."""
    text = text.strip()
    return repr(text if len(text) <= 40 else text[:40] + "…")
