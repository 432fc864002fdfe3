from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import pytest

from trainkit.data import chat_templates
from trainkit.data.chat_templates import ChatTemplate, TemplateProblem, find_template, shipped_template_names
from trainkit.data.conversations import Message
from trainkit.errors import ModelError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

MESSAGES = (Message("user", "Hello"), Message("assistant", "Привет 👩‍🚀"))


def rendered(text: str, messages: tuple[Message, ...] = MESSAGES) -> str:
    return ChatTemplate(text, "t.jinja", {"eos_token": "</s>"}).render(messages)


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, object]]:
    return [{"role": one.role, "content": one.content, **one.extras} for one in messages]


@pytest.mark.parametrize("name", shipped_template_names())
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_renders_as_transformers_does(
    tiny_tokenizer: PreTrainedTokenizerBase, name: str, generation_prompt: bool
) -> None:
    template = find_template(tiny_tokenizer, name, adds_bos=False)
    theirs = tiny_tokenizer.apply_chat_template(
        as_dicts(MESSAGES), chat_template=template.text, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert template.render(MESSAGES, generation_prompt=generation_prompt) == theirs
    assert "Привет" in theirs


def test_loops_keep_all_that_jinja_offers_in_them() -> None:
    text = (
        "{% for m in messages if m.role != 'x' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{{ loop.previtem.role if loop.previtem }};{% else %}none{% endfor %}"
        "{% for key, value in messages[0].items() recursive %}{{ key }}{% endfor %}"
    )
    assert rendered(text) == "1/2False;2/2Trueuser;rolecontent"


def test_the_day_is_not_to_be_had() -> None:
    text = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}{{ messages[0].content }}"
    assert rendered(text) == "26 Jul 2024Hello"
    with pytest.raises(TemplateProblem, match="'strftime_now' is undefined"):
        rendered("{{ strftime_now('%d %b %Y') }}")


def test_generation_markers_change_nothing() -> None:
    assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hello"


def test_reasoning_and_tool_calls_reach_the_template() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    message = Message("assistant", "x", extras={"reasoning_content": "why", "tool_calls": [call], "name": None})
    text = (
        "{{ messages[0].thinking }}{{ messages[0].tool_calls[0].function | tojson }}{{ messages[0].name is defined }}"
    )
    assert rendered(text, (message,)) == 'why{"name": "f", "arguments": {"a": 1}}False'


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_the_sandbox_holds(text: str) -> None:
    with pytest.raises(TemplateProblem, match=r"the sandbox does not give|not safely callable"):
        rendered(text)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(100000) %}{% for j in range(300) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 30000000000 }}",
        "{{ messages | length * 10000000 * 'x' }}",
        "{{ ('x' * 9000000) ~ 'y' }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(30000000) %}x{% endfor %}",
    ],
)
def test_writing_without_end_is_stopped(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateProblem):
        rendered(text)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for n in [60] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}",
    ],
)
def test_running_without_end_is_stopped_even_when_nothing_is_written(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "PROCESSOR_SECONDS", 0.05)
    with pytest.raises(TemplateProblem, match="ran for more than"):
        rendered(text)


def test_a_long_conversation_is_no_runaway() -> None:
    messages = (Message("user", "word " * 400_000),)
    assert len(rendered("{{ messages[0].content }}{{ messages[0].content }}", messages)) == 4_000_000


def test_a_template_that_raises_says_so_in_one_line() -> None:
    with pytest.raises(TemplateProblem, match=r"^System role not supported$"):
        rendered("{{ raise_exception('System role not supported\n  twice') }}")
    with pytest.raises(TemplateProblem, match=r"^TypeError: "):
        rendered("{{ 1 + 'a' }}")
    with pytest.raises(TemplateProblem, match="'nothing' is undefined"):
        rendered("{{ nothing.at_all }}")


def test_a_file_that_is_no_jinja_is_named_with_its_line(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("line one\n{% for m in messages %}")
    with pytest.raises(ModelError, match=r"broken\.jinja:2: the chat template is not valid Jinja"):
        find_template(tiny_tokenizer, str(path), adds_bos=False)


def test_chosen_file_goes_before_the_tokenizers_own(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}{{ eos_token }}")
    assert find_template(tiny_tokenizer, str(path), adds_bos=False).render(MESSAGES) == "Hello<|end|>"
    assert find_template(tiny_tokenizer, None, adds_bos=False).text == tiny_tokenizer.chat_template


def test_no_such_file_lists_what_is_shipped(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.chat_template: .*no\.jinja: No such file.*chatml, plain"):
        find_template(tiny_tokenizer, str(tmp_path / "no.jinja"), adds_bos=False)


def test_a_file_in_another_encoding_is_refused(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "latin.jinja"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="it is not UTF-8"):
        find_template(tiny_tokenizer, str(path), adds_bos=False)


def test_a_tokenizer_without_template_is_told_what_there_is(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.copy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template; set data\.chat_template to chatml or plain"):
        find_template(bare, None, adds_bos=False)


def test_of_several_templates_the_one_for_tools_is_taken_with_tools(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    several = copy.copy(tiny_tokenizer)
    several.chat_template = {"default": "plain", "tool_use": "tools"}
    assert find_template(several, None, adds_bos=False).text == "plain"
    assert find_template(several, None, adds_bos=False, tools=True).text == "tools"


def test_a_shipped_template_begins_with_the_bos_token_where_plain_texts_do(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with_bos = copy.deepcopy(tiny_tokenizer)
    with_bos.bos_token = "<|endoftext|>"
    assert find_template(with_bos, "chatml", adds_bos=True).render(MESSAGES).startswith("<|endoftext|><|im_start|>user")
    assert find_template(with_bos, "chatml", adds_bos=False).render(MESSAGES).startswith("<|im_start|>user")
