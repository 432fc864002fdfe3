"""Examples as they mean: a record of any format → a conversation, a prompt with its completion, or plain text.

Every example is held to what was recognised from the first ones; nothing is guessed twice. Text stays exactly as it
stands, whitespace included. A field that is null counts as absent.

Decisions about formats that leave room
- alpaca: the user says the instruction and, where there is an input, a blank line and the input. question/answer
  columns are alpaca by other names.
- prompt-completion with two strings stays one text with a boundary; with two lists of messages it is a conversation
  in which only what the completion says can be trained.
- A function call (``function_call`` of sharegpt or of OpenAI's older format, ``tool_calls``) becomes ``tool_calls`` of
  an assistant message, each ``{"type": "function", "function": {"name", "arguments"}}`` with arguments as an object:
  the structure that the model makers' own chat templates render. The content is empty where there is none. A template
  that ignores the calls drops text, which is found where the rendered conversation is checked.
- ``loss_weight``, ``weight`` (0 or 1) and ``train`` (true or false) of a message say whether it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from trainkit.data.formats import SHAPES, Recognised, recognise, record_kind, turns_of
from trainkit.data.strict_json import parse_json
from trainkit.data.wording import did_you_mean, listed, nearest, shown, type_name
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainkit.data.sources import Example

__all__ = [
    "Conversation",
    "Dropped",
    "Message",
    "MissingColumn",
    "ParsedExample",
    "PlainText",
    "PromptCompletion",
    "Recognised",
    "parse",
    "recognise",
]

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",  # OpenAI's newer name for it
    "function": "tool",  # and its older name for that
}
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_WEIGHT_KEYS = ("loss_weight", "weight", "train")
_SAID = {"tool_calls", "reasoning_content"}  # what an assistant message without content may consist of
_SAYS_ALL = frozenset({"role", "content", "from", "value"})  # of most messages these are the only keys
_OTHER_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


class MissingColumn(DataError):  # noqa: N818 - a kind of DataError
    """An example has no ``column``, which the first examples of its source have."""

    def __init__(self, message: str, *, column: str = "") -> None:
        super().__init__(message)
        self.column = column


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``trained`` None: as the recipe says. ``extras``: tool_calls, reasoning_content, name, and the like."""

    role: Role
    content: str
    trained: bool | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and the tools that the assistant may call (JSON Schema functions as chat templates take them)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two pieces of one text, joined exactly as they stand; only the completion is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is trained as a whole."""

    text: str


ParsedExample = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True, slots=True)
class Dropped:
    """An example that holds nothing to train, and why; the ledger counts it."""

    reason: str


def parse(example: Example, recognised: Recognised) -> ParsedExample | Dropped:
    """What the example says, or that it is dropped: empty text, empty completion, no assistant turn.

    A conversation in which no turn is trained is kept: whether that leaves nothing is for its mask to say.
    Raises DataError, naming the example's place, for a record that is not what the first examples were: another kind,
    a missing column, a wrong type, an unknown role, content that is no text.
    """
    place = example.place
    if record_kind(example.record) != recognised.kind or isinstance(example.record, str | list):
        return _parse_bare(example, recognised)
    assert isinstance(example.record, dict)
    record = example.record
    fields = _fields(place, record, recognised)
    match recognised.format:
        case "messages" | "sharegpt":
            _refuse_other_media(place, record)
            turns = fields.get("messages", fields.get("conversations"))
            messages = _messages(f"{place}:", turns, recognised.format)
            return _conversation(_with_system(place, fields.get("system"), messages), _tools(place, fields))
        case "alpaca":
            return _alpaca(place, fields)
        case "prompt-completion":
            return _prompt_completion(place, fields)
        case "text":
            text = _string(place, "text", fields["text"], null="")
            return PlainText(text) if text else Dropped("empty text")


# --- columns -------------------------------------------------------------------------------------------------------


def _parse_bare(example: Example, recognised: Recognised) -> ParsedExample | Dropped:
    """A record without columns: text, or a bare list of messages."""
    kind = record_kind(example.record)
    if kind != recognised.kind:
        raise DataError(
            f"{example.place}: {type_name(example.record)}, but the first examples were of another kind: "
            f"{recognised.sentence}"
        )
    if isinstance(example.record, str):
        return PlainText(example.record) if example.record else Dropped("empty text")
    return _conversation(_messages(f"{example.place}:", example.record, recognised.format), None)


def _fields(place: str, record: dict[str, Any], recognised: Recognised) -> dict[str, Any]:
    """Our name → value. Required columns are always there, perhaps null; optional ones where they are not null."""
    required = SHAPES[recognised.format].required
    fields = {}
    for ours, theirs in recognised.columns.items():
        if ours in required and theirs not in record:
            raise MissingColumn(
                f"{place}: no column {shown(theirs)}, only {listed(list(record), 5) or 'an empty object'}; the first "
                "examples have it, and so must all of a source",
                column=theirs,
            )
        if ours in required or record.get(theirs) is not None:
            fields[ours] = record[theirs]
    return fields


def _string(place: str, name: str, value: object, *, null: str | None = None) -> str:
    """``value``, which must be text; ``null`` is what an absent value means (None: it must be there)."""
    if value is None and null is not None:
        return null
    if not isinstance(value, str):
        what = "null" if value is None else f"{type_name(value)} ({shown(value)})"
        raise DataError(f"{place}: `{name}` must be text, not {what}")
    return value


def _refuse_other_media(place: str, record: dict[str, Any]) -> None:
    for name in _OTHER_MEDIA:
        if record.get(name):
            raise DataError(f"{place}: has `{name}`; only text can be trained")


def _alpaca(place: str, fields: dict[str, Any]) -> Conversation | Dropped:
    instruction = _string(place, "instruction", fields["instruction"])
    context = _string(place, "input", fields.get("input"), null="")
    answer = _string(place, "output", fields["output"], null="")
    asked = Message("user", f"{instruction}\n\n{context}" if instruction and context else instruction or context)
    messages = [*_history(place, fields.get("history")), asked, Message("assistant", answer)]
    if not answer:  # the earlier answers alone would train what the example is not about
        return Dropped("empty completion")
    return _conversation(_with_system(place, fields.get("system"), messages), None)


def _history(place: str, history: object) -> list[Message]:
    """Earlier turns as alpaca holds them: a list of [what the user said, what the assistant said]."""
    history = [] if history in (None, "") else turns_of(history)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{place}: `history` must be a list of [question, answer] pairs, not {shown(history)}")
    messages = []
    for question, answer in history:
        messages.append(Message("user", _string(place, "history", question)))
        messages.append(Message("assistant", _string(place, "history", answer)))
    return messages


def _prompt_completion(place: str, fields: dict[str, Any]) -> ParsedExample | Dropped:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [
            replace(message, trained=False) if message.role == "assistant" else message
            for message in _messages(f"{place}: prompt:", prompt, "messages")
        ]
        after = _messages(f"{place}: completion:", completion, "messages")
        return _conversation([*before, *after], _tools(place, fields))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(f"{place}: `prompt` and `completion` must both be text, or both lists of messages")
    if fields.get("tools"):
        raise DataError(f"{place}: `tools` need a prompt and a completion that are lists of messages")
    pair = PromptCompletion(_string(place, "prompt", prompt), _string(place, "completion", completion, null=""))
    return pair if pair.completion else Dropped("empty completion")


# --- conversations -------------------------------------------------------------------------------------------------


def _conversation(messages: list[Message], tools: tuple[Mapping[str, Any], ...] | None) -> Conversation | Dropped:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        return Dropped("no assistant turn")
    if not any(message.content or _SAID.intersection(message.extras) for message in answers):
        return Dropped("empty completion")
    return Conversation(tuple(messages), tools)


def _with_system(place: str, system: object, messages: list[Message]) -> list[Message]:
    """The messages behind the system prompt that stands in a column of its own."""
    if system in (None, ""):
        return messages
    text = _string(place, "system", system)
    if messages and messages[0].role == "system":
        if messages[0].content == text:
            return messages
        raise DataError(f"{place}: two system prompts: the `system` column, and another one as first message")
    return [Message("system", text), *messages]


def _messages(place: str, turns: object, found: str) -> list[Message]:
    """The turns of one example; ``place`` ends in a colon. null means none."""
    turns = [] if turns is None else turns_of(turns)
    if not isinstance(turns, list):
        raise DataError(f"{place} expected a list of messages, not {type_name(turns)} ({shown(turns)})")
    read = _sharegpt_message if found == "sharegpt" else _openai_message
    return [read(f"{place} message {number}", turn) for number, turn in enumerate(turns, start=1)]


def _openai_message(place: str, turn: object) -> Message:
    role = _role(place, turn, "role", _ROLES)
    assert isinstance(turn, dict)
    extras = _extras(place, turn)
    content = turn.get("content")
    if content is None and not (role == "assistant" and _SAID.intersection(extras)):
        if "content" in turn:
            raise DataError(f"{place}: `content` is null; only an assistant message with `tool_calls` may have none")
        _missing(place, turn, "content")
    return Message(role, _content(place, content), _trained(place, turn), extras)


def _sharegpt_message(place: str, turn: object) -> Message:
    role = _role(place, turn, "from", _SHAREGPT_ROLES)
    assert isinstance(turn, dict)
    if "value" not in turn:
        _missing(place, turn, "value")
    extras = _extras(place, turn)
    if turn["from"] == "function_call":
        calls = _tool_calls(place, turn["value"])
        return Message(role, "", _trained(place, turn), {**extras, "tool_calls": calls})
    return Message(role, _string(place, "value", turn["value"]), _trained(place, turn), extras)


def _role(place: str, turn: object, key: str, roles: Mapping[str, Role]) -> Role:
    if not isinstance(turn, dict):
        raise DataError(f"{place} must be an object with `{key}`, not {type_name(turn)} ({shown(turn)})")
    if turn.get(key) is None:
        _missing(place, turn, key)
    name = turn[key]
    if not isinstance(name, str) or name not in roles:
        close = did_you_mean(name.lower(), list(roles)) if isinstance(name, str) else ""
        raise DataError(f"{place}: unknown role {shown(name)}; roles are {listed(list(roles))}{close}")
    return roles[name]


def _missing(place: str, turn: dict[str, Any], key: str) -> NoReturn:
    meant = nearest(key, [name for name in turn if name != key])
    hint = "" if meant is None else f"; is {shown(meant)} meant to be it?"
    raise DataError(f"{place} has no `{key}`, only {listed(list(turn)) or 'an empty object'}{hint}")


def _extras(place: str, turn: dict[str, Any]) -> dict[str, Any]:
    """Whatever else a message holds, for the chat template; function calls in one structure, none left empty."""
    if turn.keys() <= _SAYS_ALL:
        return {}
    known = {"role", "content", "from", "value", *_WEIGHT_KEYS}
    extras = {key: value for key, value in turn.items() if key not in known and value is not None}
    calls = extras.pop("tool_calls", None) or extras.pop("function_call", None)
    if calls:
        extras["tool_calls"] = _tool_calls(place, calls)
    return extras


def _trained(place: str, turn: dict[str, Any]) -> bool | None:
    if turn.keys() <= _SAYS_ALL:
        return None
    said = {key: turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None}
    for key, weight in said.items():
        if isinstance(weight, str) or weight not in (0, 1):
            raise DataError(f"{place}: `{key}` is {shown(weight)}; only 0 and 1 are possible: trained or not")
    if len({bool(weight) for weight in said.values()}) > 1:
        raise DataError(f"{place}: {listed(list(said))} contradict each other")
    return bool(next(iter(said.values()))) if said else None


def _content(place: str, content: object) -> str:
    """Text of a message: a string, null, or a list of text parts, which are joined without anything between."""
    if not isinstance(content, list):
        return _string(place, "content", content, null="")
    texts = []
    for number, part in enumerate(content, start=1):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise DataError(f"{place}: content part {number} must be text, not {type_name(part)} ({shown(part)})")
        kind = part.get("type", "text")
        if kind != "text":
            raise DataError(f"{place}: content part {number} is {shown(kind)}; only text can be trained")
        text = part.get("text") if part.get("text") is not None else part.get("value")
        texts.append(_string(f"{place}: content part {number}", "text", text))
    return "".join(texts)


# --- tools ---------------------------------------------------------------------------------------------------------


def _tool_calls(place: str, calls: object) -> list[dict[str, Any]]:
    """Calls of functions in one structure, from any of the usual ones: JSON text, one call or several, flat."""
    if isinstance(calls, str):
        calls = _from_json(place, "the function call", calls)
    calls = calls if isinstance(calls, list) else [calls]
    return [_tool_call(place, call) for call in calls]


def _tool_call(place: str, call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a function call needs `name` and `arguments`, not {shown(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _from_json(place, f"the arguments of {shown(function['name'])}", arguments)
    arguments = {} if arguments in (None, "") or isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise DataError(
            f"{place}: the arguments of {shown(function['name'])} must be an object, not {shown(arguments)}"
        )
    rest = {key: value for key, value in call.items() if value is not None} if function is not call else {}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(place: str, fields: dict[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The tools column: a list of functions or the JSON text of one; each wrapped as chat templates expect it."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = _from_json(place, "`tools`", tools) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{place}: `tools` must be a list of functions, not {shown(tools)}")
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a tool needs at least a `name`: {shown(tool)}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _from_json(place: str, what: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{place}: {what} is no JSON ({str(error).split(':')[0]}): {shown(text)}") from error
