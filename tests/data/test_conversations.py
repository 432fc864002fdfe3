from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.conversations import (
    Conversation,
    Dropped,
    Message,
    ParsedExample,
    PlainText,
    PromptCompletion,
    Recognised,
    parse,
    recognise,
)
from trainkit.data.sources import Example, read_source
from trainkit.errors import DataError
from trainkit.recipe.schema import Source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def examples_of(*records: object) -> list[Example]:
    return [Example(f"x.jsonl:{line}", record) for line, record in enumerate(records, start=1)]


def recognised(*records: object, **keys: Any) -> Recognised:
    return recognise(Source(path="x.jsonl", **keys), examples_of(*records))


def parsed(record: object, **keys: Any) -> ParsedExample | Dropped:
    """The only example of a source."""
    return parse(examples_of(record)[0], recognised(record, **keys))


def conversation(record: object, **keys: Any) -> Conversation:
    result = parsed(record, **keys)
    assert isinstance(result, Conversation)
    return result


def messages(record: object, **keys: Any) -> tuple[Message, ...]:
    return conversation(record, **keys).messages


def refusal(record: object, *, after: object = None, **keys: Any) -> str:
    """The message for ``record``, as the second example where ``after`` is the first."""
    first = record if after is None else after
    with pytest.raises(DataError) as caught:
        parse(Example("x.jsonl:2", record), recognised(first, **keys))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("x.jsonl")
    return message


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


ASKED = said(("user", " q\n"), ("assistant", "a "))
ANSWERED = (Message("user", " q\n"), Message("assistant", "a "))


# --- recognising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": ASKED, "id": 3}, "messages (column `messages`, roles user, assistant; not used: id)"),
        ({"conversations": ASKED}, "messages (column `conversations` as messages, roles user, assistant)"),
        (ASKED, "messages (bare lists, roles user, assistant)"),
        ({"messages": [{"from": "gpt", "value": ""}]}, "sharegpt (column `messages` as conversations, roles gpt)"),
        ([{"from": "human", "value": ""}], "sharegpt (bare lists, roles human)"),
        ({"messages": [{"rol": "user", "content": ""}]}, "messages (column `messages`, roles )"),
        ({"messages": json.dumps(ASKED)}, "messages (column `messages`, roles user, assistant)"),
        ({"instruction": "", "output": ""}, "alpaca (columns `instruction`, `output`)"),
        (
            {"instruction": "", "context": "", "response": "", "category": ""},
            "alpaca (columns `instruction`, `response` as output, `context` as input; not used: category)",
        ),
        ({"question": "", "answer": ""}, "alpaca (columns `question` as instruction, `answer` as output)"),
        ({"prompt": "", "response": ""}, "prompt-completion (columns `prompt`, `response` as completion)"),
        ({"text": "", "label": 1}, "text (column `text`; not used: label)"),
        ("plain", "text (each example a string)"),
        ({"text": "", "instruction": "", "output": ""}, "alpaca (columns `instruction`, `output`; not used: text)"),
        ({"prompt": "", "messages": ASKED}, "messages (column `messages`, roles user, assistant; not used: prompt)"),
    ],
)
def test_auto_says_what_it_saw(record: object, sentence: str) -> None:
    assert recognised(record).sentence == f"x.jsonl: {sentence}"


def test_columns_of_the_recipe_name_those_of_the_source() -> None:
    record = {"ask": "q", "say": "a", "input": "i"}
    columns = {"prompt": "ask", "completion": "say"}
    assert parsed(record, columns=columns) == PromptCompletion("q", "a")
    assert parsed({"body": "t"}, columns={"text": "body"}) == PlainText("t")
    assert messages({"input": " q\n", "output": "a "}, columns={"instruction": "input"}) == ANSWERED


def test_named_format_needs_no_guess() -> None:
    record = {"text": "t", "prompt": "p", "completion": "c", "response": "r"}
    assert parsed(record, format="text") == PlainText("t")
    assert parsed(record, format="prompt-completion") == PromptCompletion("p", "c")


@pytest.mark.parametrize(
    ("record", "keys", "text"),
    [
        ({"a": 1, "b": 2}, {}, "no format fits the columns a, b; name them"),
        ({}, {}, "no format fits"),
        ({"prompt": "", "instruction": "", "output": ""}, {}, "could be alpaca or prompt-completion"),
        ({"prompt": "", "completion": "", "response": ""}, {}, "which column is `completion`: completion or response?"),
        ({"messages": ASKED, "conversations": ASKED}, {}, "which column is `messages`: messages or conversations?"),
        ({"messages": "hello"}, {}, 'expected lists of messages, found a string ("hello")'),
        ({"messages": []}, {}, "found empty lists"),
        ({"messages": [{"who": "me"}]}, {}, "a message has the keys who"),
        ([1], {}, "expected lists of messages, found a list"),
        (
            {"txt": ""},
            {"format": "text"},
            "needs a column `text`, and there are txt; name it: `columns: {text: txt}`",
        ),
        ({"messages": ASKED}, {"format": "text"}, "text needs a column `text`, and there are messages"),
        ("plain", {"format": "alpaca"}, "`format: alpaca`, but the examples are text"),
        (ASKED, {"format": "sharegpt"}, "`format: sharegpt`, but the examples are messages"),
        ({"messages": ASKED}, {"format": "sharegpt"}, "sharegpt has from and value, and these messages have role"),
        ("plain", {"columns": {"text": "x"}}, "`columns:` has no meaning here"),
        ({"text": ""}, {"columns": {"text": "txt"}}, 'no column "txt"; there are text; did you mean "text"?'),
        (
            {"a": ""},
            {"columns": {"promt": "a"}},
            "`columns:` names promt, which no format has; its keys are our names, as prompt; did you mean",
        ),
        (
            {"a": "", "prompt": ""},
            {"columns": {"complete": "a"}, "format": "prompt-completion"},
            'names "complete", which prompt-completion does not have; it has prompt, completion, tools; did you mean',
        ),
    ],
)
def test_what_is_not_recognised(record: object, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        recognised(record, **keys)
    assert text in str(caught.value)
    assert str(caught.value).startswith("x.jsonl: ")


def test_two_columns_of_turns_are_ambiguous_though_one_is_empty() -> None:
    with pytest.raises(DataError, match="which column is `messages`: messages or conversations"):
        recognised({"conversations": [{"from": "gpt", "value": "a"}]}, {"messages": []})


def test_no_examples_and_csv_header() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl has 0 examples"):
        recognise(Source(path="x.jsonl"), [])
    with pytest.raises(DataError, match="first line of a csv file is taken as its header"):
        recognise(Source(path="x.csv"), examples_of({"how are you": "fine"}))


def test_optional_column_may_turn_up_after_the_first_examples() -> None:
    seen = recognised({"instruction": "q", "output": "a"})
    later = parse(Example("x", {"instruction": "q", "input": "i", "output": "a"}), seen)
    assert later == Conversation((Message("user", "q\n\ni"), Message("assistant", "a")))


# --- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        ASKED,
        {"messages": ASKED},
        {"messages": json.dumps(ASKED), "tools": ""},
        {"conversation": [{**turn, "tool_calls": None} for turn in ASKED], "system": None, "tools": None},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ASKED]},
        {"messages": [{**turn, "content": [*turn["content"]]} for turn in ASKED]},
        {
            "messages": [
                {**turn, "content": [{"type": "text", "value": part}]} for turn in ASKED for part in [turn["content"]]
            ]
        },
    ],
)
def test_messages(record: object) -> None:
    assert conversation(record) == Conversation(ANSWERED)


def test_roles_of_openai() -> None:
    record = said(("developer", "d"), ("user", "u"), ("assistant", "a"), ("function", "f"), ("tool", "t"))
    assert [message.role for message in messages(record)] == ["system", "user", "assistant", "tool", "tool"]


@pytest.mark.parametrize(
    ("marks", "trained"),
    [
        ({"loss_weight": 0}, False),
        ({"loss_weight": 1.0}, True),
        ({"weight": 0}, False),
        ({"train": True}, True),
        ({"train": False, "weight": 0}, False),
        ({"weight": None}, None),
        ({}, None),
    ],
)
def test_weights_say_what_is_trained(marks: dict[str, Any], trained: bool | None) -> None:
    record = [*ASKED, {"role": "assistant", "content": "b", **marks}]
    assert messages(record)[-1] == Message("assistant", "b", trained)


def test_system_column_comes_first() -> None:
    assert messages({"messages": ASKED, "system": "s"}) == (Message("system", "s"), *ANSWERED)
    both = [*said(("system", "s")), *ASKED]
    assert messages({"messages": both, "system": "s"}) == (Message("system", "s"), *ANSWERED)
    assert "two system prompts" in refusal({"messages": both, "system": "other"})


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}


@pytest.mark.parametrize(
    "keys",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}]},
        {"content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": None}}]},
        {"content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": null}'}},
    ],
)
def test_function_calls_get_one_structure(keys: dict[str, Any]) -> None:
    record = [{"role": "user", "content": "1?"}, {"role": "assistant", **keys}]
    assert messages(record)[1] == Message("assistant", "", None, {"tool_calls": [CALL]})


def test_function_call_keeps_its_id_and_may_have_no_arguments() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}]
    record = [{"role": "assistant", "content": "wait", "tool_calls": calls}]
    wanted = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}
    assert messages(record)[0] == Message("assistant", "wait", None, {"tool_calls": [wanted]})


def test_reasoning_names_and_ids_are_kept() -> None:
    extras = {"reasoning_content": " hm\n", "name": "x", "tool_call_id": "c1"}
    assert messages([{"role": "assistant", "content": "a", **extras}])[0] == Message("assistant", "a", None, extras)
    assert messages([{"role": "assistant", "reasoning_content": "hm"}])[0].content == ""


def test_tools_as_lists_or_json_text() -> None:
    flat = {"name": "add", "parameters": {}}
    wanted = ({"type": "function", "function": flat},)
    for tools in ([flat], json.dumps([flat]), [*wanted], json.dumps(wanted)):
        assert conversation({"messages": ASKED, "tools": tools}).tools == wanted
    nothings: list[object] = [None, "", " ", [], "[]"]
    for nothing in nothings:
        assert conversation({"messages": ASKED, "tools": nothing}).tools is None


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"rol": "user", "content": "q"}, 'message 2 has no `role`, only rol, content; is "rol" meant to be it?'),
        ({}, "message 2 has no `role`, only an empty object"),
        ("hi", 'message 2 must be an object with `role`, not a string ("hi")'),
        ({"role": "asistant", "content": ""}, 'message 2: unknown role "asistant"; roles are system, user, assistant'),
        ({"role": "Assistant", "content": ""}, 'did you mean "assistant"?'),
        ({"role": 5, "content": ""}, "message 2: unknown role"),
        ({"role": "user", "contents": "q"}, 'message 2 has no `content`, only role, contents; is "contents" meant'),
        ({"role": "user", "content": None}, "message 2: `content` is null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 2: `content` is null"),
        ({"role": "user", "content": 5}, "message 2: `content` must be text, not a number (5)"),
        ({"role": "user", "content": {"a": 1}}, "`content` must be text, not an object"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, 'content part 1 is "image_url"; only'),
        ({"role": "user", "content": [{"type": "text"}]}, "content part 1: `text` must be text, not null"),
        ({"role": "user", "content": ["a", 5]}, "content part 2 must be text, not a number (5)"),
        ({"role": "assistant", "content": "", "loss_weight": 0.5}, "`loss_weight` is 0.5; only 0 and 1"),
        ({"role": "assistant", "content": "", "weight": "1"}, "only 0 and 1"),
        ({"role": "assistant", "content": "", "weight": 1, "train": False}, "weight, train contradict each other"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "a function call needs `name` and `arguments`"),
        ({"role": "assistant", "tool_calls": ["x"]}, "a function call needs"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, 'the arguments of "f" is no JSON'),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}, "must be an object"),
        ({"from": "human", "value": "q"}, "message 2 has no `role`, only from, value"),
    ],
)
def test_message_that_is_refused(turn: object, text: str) -> None:
    message = refusal({"messages": [*ASKED[:1], turn]})
    assert message.startswith("x.jsonl:2: message 2")
    assert text in message


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": "hi"}, 'x.jsonl:2: expected a list of messages, not a string ("hi")'),
        ({"messages": ASKED, "tools": 5}, "`tools` must be a list of functions, not 5"),
        ({"messages": ASKED, "tools": "x"}, "`tools` is no JSON"),
        ({"messages": ASKED, "tools": [{}]}, "a tool needs at least a `name`"),
        ({"messages": ASKED, "system": 5}, "`system` must be text, not a number"),
        ({"messages": ASKED, "images": ["a.png"]}, "has `images`; only text can be trained"),
        ({"text": "t"}, 'no column "messages", only text; the first examples have it'),
        ({}, "only an empty object"),
        (ASKED, "a list, but the first examples were of another kind: x.jsonl: messages (column"),
        ("text", "a string, but the first examples were of another kind"),
    ],
)
def test_example_unlike_the_first(record: object, text: str) -> None:
    assert text in refusal(record, after={"messages": ASKED})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no assistant turn"),
        (None, "no assistant turn"),
        (said(("user", "q")), "no assistant turn"),
        (said(("user", "q"), ("assistant", "")), "empty completion"),
        ([{"role": "assistant", "content": "", "id": "7"}], "empty completion"),
    ],
)
def test_conversation_with_nothing_to_train_is_dropped(turns: object, reason: str) -> None:
    seen = recognised({"messages": ASKED})
    assert parse(Example("x", {"messages": turns}), seen) == Dropped(reason)


def test_conversation_without_trained_turn_is_kept_for_its_mask_to_be_judged() -> None:
    turns = [*said(("user", "q")), {"role": "assistant", "content": "a", "weight": 0}]
    assert [message.trained for message in messages(turns)] == [None, False]


def test_conversation_may_end_in_a_question_and_start_with_an_answer() -> None:
    assert len(messages(said(("assistant", "a"), ("user", "q")))) == 2


# --- sharegpt ------------------------------------------------------------------------------------------------------


def test_sharegpt_roles_and_function_calls() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": null}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": " a ", "weight": 1},
    ]
    assert messages({"conversations": turns}) == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "", None, {"tool_calls": [CALL]}),
        Message("tool", "3"),
        Message("assistant", " a ", True),
    )


def test_sharegpt_calls_at_once() -> None:
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]
    turn = {"from": "function_call", "value": json.dumps(calls)}
    names = [call["function"]["name"] for call in messages([turn])[0].extras["tool_calls"]]
    assert names == ["f", "g"]


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ({"from": "humen", "value": ""}, 'unknown role "humen"'),
        ({"from": "gpt"}, "has no `value`, only from"),
        ({"from": "gpt", "value": None}, "`value` must be text, not null"),
        ({"from": "function_call", "value": "add(1)"}, "the function call is no JSON"),
        ({"role": "user", "content": "q"}, "has no `from`, only role, content"),
    ],
)
def test_sharegpt_turn_that_is_refused(turn: object, text: str) -> None:
    first = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    message = refusal({"conversations": [turn]}, after=first)
    assert message.startswith("x.jsonl:2: message 1")
    assert text in message


# --- pairs and text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["output", "response", "answer", "completion"])
def test_alpaca_answer_by_any_name(answer: str) -> None:
    assert messages({"instruction": " q\n", "input": "", answer: "a "}) == ANSWERED


def test_alpaca_with_everything() -> None:
    record = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]}
    wanted = said(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "i\n\nx"), ("assistant", "o"))
    assert messages(record) == messages(wanted)
    assert messages({**record, "history": json.dumps(record["history"])}) == messages(wanted)
    assert messages({"instruction": "", "input": "x", "output": "o"})[0] == Message("user", "x")


def test_prompt_and_completion_are_not_touched() -> None:
    assert parsed({"prompt": " p\n", "completion": " c\n"}) == PromptCompletion(" p\n", " c\n")
    assert parsed({"prompt": "", "completion": "c"}) == PromptCompletion("", "c")


def test_prompt_and_completion_of_messages() -> None:
    prompt = said(("user", "1"), ("assistant", "2"), ("user", "3"))
    assert messages({"prompt": prompt, "completion": said(("assistant", "4"))}) == (
        Message("user", "1"),
        Message("assistant", "2", trained=False),
        Message("user", "3"),
        Message("assistant", "4"),
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "i", "output": ""}, "empty completion"),
        ({"instruction": "i", "output": None}, "empty completion"),
        ({"instruction": "i", "output": "", "history": [["q", "a"]]}, "empty completion"),
        ({"prompt": "p", "completion": ""}, "empty completion"),
        ({"prompt": "p", "completion": None}, "empty completion"),
        ({"text": ""}, "empty text"),
        ({"text": None}, "empty text"),
        ("", "empty text"),
    ],
)
def test_what_is_empty_is_dropped(record: object, reason: str) -> None:
    assert parsed(record) == Dropped(reason)


def test_whitespace_is_not_empty() -> None:
    assert parsed({"text": " \n"}) == PlainText(" \n")


@pytest.mark.parametrize(
    ("first", "record", "text"),
    [
        ({"text": "t"}, {"text": 5}, "`text` must be text, not a number (5)"),
        ({"text": "t"}, {"text": {"a": 1}}, "`text` must be text, not an object"),
        ({"text": "t"}, {"txt": "t"}, 'no column "text", only txt; the first examples have it'),
        ({"prompt": "p", "response": "r"}, {"prompt": "p"}, 'no column "response", only prompt'),
        ({"prompt": "p", "response": "r"}, {"prompt": None, "response": "r"}, "`prompt` must be text, not null"),
        ({"prompt": "p", "response": "r"}, {"prompt": ASKED, "response": "r"}, "must both be text, or both lists"),
        ({"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r", "tools": [CALL]}, "`tools` need a prompt"),
        ({"instruction": "i", "output": "o"}, {"instruction": 1, "output": "o"}, "`instruction` must be text"),
        (
            {"instruction": "i", "output": "o"},
            {"instruction": "i", "output": ["o"]},
            "`output` must be text, not a list",
        ),
        (
            {"instruction": "i", "output": "o"},
            {"instruction": "i", "output": "o", "history": [["q"]]},
            "`history` must",
        ),
    ],
)
def test_pair_or_text_that_is_refused(first: object, record: object, text: str) -> None:
    message = refusal(record, after=first)
    assert message.startswith("x.jsonl:2: ")
    assert text in message


# --- whole files ---------------------------------------------------------------------------------------------------


def read_all(path: Path, **keys: Any) -> tuple[str, list[ParsedExample | Dropped]]:
    source = Source(path=str(path), **keys)
    seen = recognise(source, list(itertools.islice(read_source(source), 100)))
    return seen.sentence, [parse(example, seen) for example in read_source(source)]


@pytest.mark.parametrize(
    ("name", "sentence", "counts"),
    [
        ("alpaca_data.json", "alpaca (columns `instr", {"Conversation": 51_974, "empty completion": 28}),
        ("gsm8k_train.jsonl", "alpaca (columns `question` as", {"Conversation": 7_473}),
        ("dolly_hhrlhf_1000.jsonl", "prompt-completion (", {"PromptCompletion": 1_000}),
        ("sharegpt_fastchat_dummy.json", "sharegpt (", {"Conversation": 500}),
        ("sharegpt_toolcall_en.json", "sharegpt (columns `conversations`, `tools`, roles", {"Conversation": 300}),
        ("messages_openai_sft.jsonl", "messages (bare lists", {"Conversation": 128}),
        ("v1_sft_demo.jsonl", "messages (column `messages`", {"Conversation": 500}),
        ("wikisql_text_train.jsonl", "text (column", {"PlainText": 1_000}),
        ("wikitext2_valid.txt", "text (", {"PlainText": 1}),
        ("war_and_peace_2600-0.txt", "text (", {"PlainText": 1}),
        ("ru_crime_and_punishment.txt", "text (", {"PlainText": 1}),
    ],
)
def test_real_data(material: Path, name: str, sentence: str, counts: dict[str, int]) -> None:
    path = material / "data" / name
    seen, results = read_all(path)
    assert seen.startswith(f"{path}: {sentence}")
    kinds = Counter(result.reason if isinstance(result, Dropped) else type(result).__name__ for result in results)
    assert kinds == counts


def test_real_calls_and_weights(material: Path) -> None:
    _, calls = read_all(material / "data" / "sharegpt_toolcall_en.json")
    calling = [
        (message, result.tools)
        for result in calls
        if isinstance(result, Conversation)
        for message in result.messages
        if "tool_calls" in message.extras
    ]
    assert len(calling) == 211
    assert all(tools for _, tools in calling)
    _, weighted = read_all(material / "data" / "v1_sft_demo.jsonl")
    marks = Counter(
        (message.role, message.trained)
        for result in weighted
        if isinstance(result, Conversation)
        for message in result.messages
    )
    assert marks == {("user", False): 500, ("assistant", True): 500}


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
TURNS = st.lists(
    st.builds(
        Message,
        st.sampled_from(["system", "user", "assistant", "tool"]),
        TEXT,
        st.sampled_from([None, None, True, False]),
        st.just({}) | st.builds(dict, reasoning_content=TEXT) | st.just({"tool_calls": [CALL]}),
    ),
    max_size=3,
)
CONVERSATIONS = st.lists(
    TURNS.map(lambda turns: Conversation((*turns, Message("assistant", "a", trained=True)))), min_size=1, max_size=5
)


def as_records(conversations: Sequence[Conversation], role: str, content: str, names: dict[str, str]) -> list[Any]:
    return [
        [
            {
                role: names.get(message.role, message.role),
                content: message.content,
                **({} if message.trained is None else {"weight": int(message.trained)}),
                **message.extras,
            }
            for message in conversation.messages
        ]
        for conversation in conversations
    ]


@settings(max_examples=40)
@given(CONVERSATIONS)
def test_written_conversations_come_back(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[Conversation]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    openai = as_records(conversations, "role", "content", {})
    sharegpt = as_records(conversations, "from", "value", {"user": "human", "assistant": "gpt", "tool": "observation"})
    bare, columns, other = folder / "bare.jsonl", folder / "columns.json", folder / "other.jsonl"
    bare.write_text("\n".join(json.dumps(turns) for turns in openai))
    columns.write_text(json.dumps([{"messages": turns} for turns in openai], indent=1))
    other.write_text("\n".join(json.dumps({"conversations": turns}) for turns in sharegpt))
    for path in (bare, columns, other):
        assert read_all(path)[1] == conversations


@settings(max_examples=25)
@given(CONVERSATIONS)
def test_conversations_come_back_from_parquet(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[Conversation]
) -> None:
    path = tmp_path_factory.getbasetemp() / "back.parquet"
    without_null = json.loads(json.dumps(as_records(conversations, "role", "content", {})).replace(', "b": null', ""))
    pq.write_table(pa.table({"messages": without_null}), path)
    found = read_all(path)[1]
    assert all(isinstance(result, Conversation) for result in found)
    assert json.dumps(as_records(found, "role", "content", {}), sort_keys=True) == json.dumps(  # type: ignore[arg-type]
        without_null, sort_keys=True
    )
