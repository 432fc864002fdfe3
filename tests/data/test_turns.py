from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.chat_templates import SHIPPED_TEMPLATES, ChatTemplate, TemplateProblem
from trainkit.data.conversations import Conversation, Message
from trainkit.data.turns import check_nothing_lost, end_tokens_of, find_turns

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_CALLS)\]|<｜[^｜]+｜>")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "which"}}},
    },
}
VICUNA = (
    "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content }}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NO_END = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"


def template_of(text: str) -> tuple[ChatTemplate, tuple[str, ...]]:
    template = ChatTemplate(text, "t", {"bos_token": "<s>", "eos_token": "</s>"})
    return template, end_tokens_of(template, [*SPECIAL.findall(text), "<s>", "</s>"], "</s>")


def turns_of(text: str, conversation: Conversation) -> list[str]:
    """What the turns say, each as text."""
    template, end_tokens = template_of(text)
    rendering = template.render(conversation.messages, conversation.tools)
    check_nothing_lost(conversation, rendering)
    return [rendering[turn.start : turn.end] for turn in find_turns(template, conversation, rendering, end_tokens)]


def user(text: str, **fields: Any) -> Message:
    return Message("user", text, **fields)


def assistant(text: str, **fields: Any) -> Message:
    return Message("assistant", text, **fields)


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


QWEN_2_5 = "Qwen-Qwen2.5-7B-Instruct"
QWEN_3 = "qwen3"
LLAMA = "meta-llama-Llama-3.1-8B-Instruct"
HERMES = "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"
DEEPSEEK = "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"
MISTRAL = "mistralai-Mistral-Nemo-Instruct-2407"
GEMMA_2 = "google-gemma-2-2b-it"
END = {
    QWEN_2_5: "<|im_end|>",
    QWEN_3: "<|im_end|>",
    HERMES: "<|im_end|>",
    LLAMA: "<|eot_id|>",
    DEEPSEEK: "<｜end▁of▁sentence｜>",
    MISTRAL: "</s>",
    GEMMA_2: "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
}
TRIMS = (LLAMA, GEMMA_2, "gemma3")


@pytest.fixture(scope="session")
def real(material: Path) -> dict[str, str]:
    """Chat templates as model makers ship them, by name."""
    return {name: (material / "templates" / f"{name}.jinja").read_text(encoding="utf-8") for name in END}


@pytest.mark.parametrize("name", END)
def test_every_turn_of_a_real_template_is_its_text_and_its_end(real: dict[str, str], name: str) -> None:
    said = ["Привет 👩‍🚀!", " two\nlines, 汉字 ", "jackdaw"]
    messages = [one for text in said for one in (user("What about jackdaw?"), assistant(text))]
    conversation = Conversation(tuple(messages), (TOOL,) if name == HERMES else None)
    expected = [text.strip() if name in TRIMS else text for text in said]
    assert turns_of(real[name], conversation) == [text + END[name] for text in expected]


texts = st.text(
    st.one_of(
        st.sampled_from(" \n.,:<>|{}\"'\\aAé你👍🏽\u200d"),
        st.characters(exclude_categories=["Cs"], exclude_characters="�"),
    ),
    min_size=1,
    max_size=30,
).filter(lambda text: bool(text.strip()))


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), name=st.sampled_from(sorted(END)))
@settings(max_examples=150, deadline=None)
def test_turns_hold_what_the_assistant_says_whatever_it_is(
    real: dict[str, str], pairs: list[tuple[str, str]], name: str
) -> None:
    messages = [one for asked, said in pairs for one in (user(asked), assistant(said))]
    conversation = Conversation(tuple(messages), (TOOL,) if name == HERMES else None)
    turns = turns_of(real[name], conversation)
    assert [turn.removesuffix(END[name]).strip() for turn in turns] == [said.strip() for _, said in pairs]
    assert all(turn.endswith(END[name]) for turn in turns)


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize(
    ("text", "end"),
    [
        ((SHIPPED_TEMPLATES / "chatml.jinja").read_text(encoding="utf-8"), "<|im_end|>"),
        ((SHIPPED_TEMPLATES / "plain.jinja").read_text(encoding="utf-8"), "</s>"),
        (VICUNA, "</s>"),
    ],
    ids=["chatml", "plain", "vicuna"],
)
def test_turns_of_our_own_templates(text: str, end: str, pairs: list[tuple[str, str]]) -> None:
    messages = [one for asked, said in pairs for one in (user(asked), assistant(said))]
    turns = turns_of(text, Conversation(tuple(messages)))
    assert [turn.removesuffix(end).lstrip(" ") for turn in turns] == [said.lstrip(" ") for _, said in pairs]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            QWEN_2_5,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call><|im_end|>',
        ),
        (
            QWEN_3,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call><|im_end|>',
        ),
        (
            HERMES,
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call><|im_end|>',
        ),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Zürich", "days": 3}}<|eot_id|>'),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zürich", "days": 3}, "id": "abcdefghi"}]</s>',
        ),
    ],
)
def test_a_tool_call_is_trained_whole(real: dict[str, str], name: str, expected: str) -> None:
    messages = (
        user("Weather?"),
        assistant("", extras={"tool_calls": [call("weather", {"city": "Zürich", "days": 3})]}),
        Message("tool", "rain", extras={"tool_call_id": "abcdefghi"}),
        assistant("It rains."),
    )
    assert turns_of(real[name], Conversation(messages, (TOOL,))) == [expected, f"It rains.{END[name]}"]


def test_two_calls_beside_a_text(real: dict[str, str]) -> None:
    calls = [call("weather", {"city": "Rome"}), call("weather", {"city": "Oslo"})]
    messages = (user("Weather?"), assistant("Looking.", extras={"tool_calls": calls}))
    (turn,) = turns_of(real[QWEN_2_5], Conversation(messages, (TOOL,)))
    assert turn.startswith("Looking.\n<tool_call>")
    assert "Rome" in turn
    assert turn.endswith('"Oslo"}}\n</tool_call><|im_end|>')


@pytest.mark.parametrize(
    "answer",
    [
        assistant("42", extras={"reasoning_content": "Six by seven."}),
        assistant("<think>\nSix by seven.\n</think>\n\n42"),
        assistant("<think>Six by seven.</think>42"),
    ],
)
def test_reasoning_is_trained_with_the_tag_that_opens_it(real: dict[str, str], answer: Message) -> None:
    conversation = Conversation((user("Hi"), assistant("Hello"), user("6 x 7?"), answer))
    assert turns_of(real[QWEN_3], conversation) == [
        "Hello<|im_end|>",
        "<think>\nSix by seven.\n</think>\n\n42<|im_end|>",
    ]


def test_an_empty_thought_that_the_template_adds_is_not_what_the_assistant_said(real: dict[str, str]) -> None:
    conversation = Conversation((user("6 x 7?"), assistant("42")))
    template, _ = template_of(real[QWEN_3])
    assert "<think>\n\n</think>\n\n42" in template.render(conversation.messages)
    assert turns_of(real[QWEN_3], conversation) == ["42<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "messages", "lost"),
    [
        (DEEPSEEK, (user("Hi"), assistant("<think>Six by seven.</think>42")), "Six by seven."),
        (QWEN_3, (user("Hi"), assistant("<think>old</think>a"), user("b"), assistant("c")), "old"),
        (MISTRAL, (Message("system", "Be kind."), user("Hi"), assistant("Hello")), "Be kind."),
        ("phi3", (user("Hi"), assistant("Hello"), Message("tool", "rain"), assistant("Wet")), "rain"),
        (QWEN_2_5, (user("Hi"), assistant("42", extras={"reasoning_content": "Six."})), "Six."),
    ],
)
def test_text_that_a_template_drops_is_named(
    real: dict[str, str], name: str, messages: tuple[Message, ...], lost: str
) -> None:
    with pytest.raises(TemplateProblem, match=f"it loses '{re.escape(lost)}'"):
        turns_of(real[name], Conversation(messages))


def test_reasoning_of_a_turn_that_is_only_context_may_be_left_out(real: dict[str, str]) -> None:
    messages = (user("Hi"), assistant("<think>old</think>a", trained=False), user("b"), assistant("c"))
    assert turns_of(real[QWEN_3], Conversation(messages)) == ["c<|im_end|>"]


def test_a_template_without_a_place_for_tools_is_refused(real: dict[str, str]) -> None:
    with pytest.raises(TemplateProblem, match="no place for tools and loses 'weather'"):
        turns_of(real["gemma3"], Conversation((user("Hi"), assistant("Hello")), (TOOL,)))


def test_a_refused_role_is_told_in_the_templates_words(real: dict[str, str]) -> None:
    with pytest.raises(TemplateProblem, match="System role not supported"):
        turns_of(real[GEMMA_2], Conversation((Message("system", "Be kind."), user("Hi"), assistant("Hello"))))


def test_a_message_says_itself_whether_it_is_trained() -> None:
    chatml = (SHIPPED_TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    messages = (user("a", trained=True), assistant("b", trained=False), user("c", trained=False), assistant("d"))
    assert turns_of(chatml, Conversation(messages)) == ["a<|im_end|>", "d<|im_end|>"]


def test_a_space_that_the_prompt_leaves_to_the_model_belongs_to_the_turn() -> None:
    conversation = Conversation((user("Hi"), assistant("Hello"), user("And?"), assistant("Well")))
    assert turns_of(VICUNA, conversation) == [" Hello</s>", " Well</s>"]


def test_a_turn_without_end_says_so() -> None:
    template, end_tokens = template_of(NO_END)
    conversation = Conversation((user("Hi"), assistant("Hello"), user("And?"), assistant("Well")))
    rendering = template.render(conversation.messages)
    turns = find_turns(template, conversation, rendering, end_tokens)
    assert [(rendering[turn.start : turn.end], turn.ended) for turn in turns] == [("Hello", False), ("Well", False)]


def test_the_next_turns_end_is_not_this_turns() -> None:
    only_last = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ eos_token }}"
    conversation = Conversation((user("Hi"), assistant("Hello"), user("And?"), assistant("Well")))
    assert turns_of(only_last, conversation) == ["Hello", "Well</s>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{{ m.content | upper }}</s>{% endfor %}", "it loses"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.content }}</s>{% endfor %}", "it changes the text"),
        ("{{ messages[1].content[0] }}{% for m in messages %}{{ m.content }}</s>{% endfor %}", "cannot be located"),
    ],
)
def test_a_template_that_does_more_than_place_the_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(TemplateProblem, match=message):
        turns_of(text, Conversation((user("Hi"), assistant("Hello"))))
