from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.chat_shapes import ChatShapes
from trainkit.data.chat_templates import SHIPPED_TEMPLATES, ChatTemplate, TemplateProblem, shipped_template_names
from trainkit.data.conversations import Conversation, Message

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

FOR = "{% for m in messages %}"
END = "{% endfor %}"
UNLESS_TEXT = "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | upper }}{% endif %}"
MAYBE_SET = "{% if loop.first %}{% set c = m.content %}{% endif %}" + UNLESS_TEXT.replace("m.content is", "c is")
MAYBE_NONE = "{% set c = none %}{% if loop.first %}{% set c = m %}{% endif %}" + UNLESS_TEXT.replace("m.c", "c.c", 1)
SHOUT = "{% macro raise_exception(x) %}{{ x | upper }}{% endmacro %}"
MARKUP = "{% macro f() %}{% autoescape true %}<{% endautoescape %}{% endmacro %}"

PLACING = [
    f"{FOR}<{{{{ m.role }}}}>{{{{ m.content }}}}{END}",
    f"{FOR}{{{{ '<' + m['role'] + '>' + m['content'] + '\n' }}}}{END}",
    f"{FOR}{{{{ '<' ~ m.role ~ '>' ~ m['content'] | trim }}}}{END}",
    "{% set said = messages[0]['content'] | trim %}{{ said }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    f"{FOR}{{% if loop.first and m.role == 'user' %}}first{{% endif %}}{{{{ m.content if m.content is string }}}}{END}",
    f"{FOR}{{% if m.content %}}{{{{ m.content }}}}{{% endif %}}{END}{{{{ messages | length }}}}",
    f"{FOR}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{{{ m.content[0] }}}}{{% endif %}}{END}",
    f"{FOR}{{% if 'tool_calls' in m %}}x{{% endif %}}{{{{ m.content or '' }}}}{END}",
    "{% set said = messages %}{% for m in said %}{{ m.content }}{% endfor %}",
    f"{FOR}{{% if not m.content is none and m.content != none %}}{{{{ m.content }}}}{{% endif %}}{END}",
    f"{{% set said = messages[1:] | list %}}{{% for m in said %}}{UNLESS_TEXT}{END}",
    f"{FOR}{{{{ loop.index0 ~ loop['first'] ~ loop.cycle('a', 'b') }}}}{{{{ m.content }}}}{END}",
    f"{FOR}{{{{ ['a', 'b'] | map('upper') | join }}}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% if m.role == 'x' %}}{{{{ raise_exception(m.content) }}}}{{% endif %}}{{{{ m.content }}}}{END}",
]
LOOKING = [
    f"{FOR}{{% if 'x' in m.content %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% if m.content.startswith('x') %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% if m.content == 'x' %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{{{ m.content | replace('x', '') }}}}{END}",
    f"{FOR}{{{{ m.content | length }}}}{END}",
    f"{FOR}{{{{ m.content[:5] }}}}{END}",
    f"{FOR}{{{{ m.content.split('x') | last }}}}{END}",
    f"{FOR}{{{{ m | tojson }}}}{END}",
    f"{FOR}{{{{ m }}}}{END}",
    "{{ messages }}",
    "{{ messages | map(attribute='content') | join }}",
    f"{FOR}{{% set key = 'content' %}}{{% if m[key] == 'x' %}}y{{% endif %}}{END}",
    f"{FOR}{{% for letter in m.content %}}{{{{ letter }}}}{{% endfor %}}{END}",
    f"{FOR}{{% for key, value in m.items() %}}{{{{ value }}}}{{% endfor %}}{END}",
    f"{FOR}{{% set c = m.content %}}{{% if c == 'x' %}}y{{% endif %}}{{{{ c }}}}{END}",
    f"{FOR}{{% if loop.previtem and loop.previtem.content == 'x' %}}y{{% endif %}}{END}",
    f"{FOR}{{% if loop.changed(m.content) %}}y{{% endif %}}{END}",
    f"{{% macro w(m) %}}{{{{ m.content }}}}{{% endmacro %}}{FOR}{{{{ w(m) }}}}{END}",
    f"{FOR}{{% set block %}}{{{{ m.content }}}}{{% endset %}}{{{{ block | upper }}}}{END}",
    f"{FOR}{{% filter upper %}}{{{{ m.content }}}}{{% endfilter %}}{END}",
    f"{FOR}{{{{ (m.content + 'x') | trim }}}}{END}",
    f"{FOR}{{{{ m.content * 2 }}}}{END}",
    f"{FOR}{{{{ [m.content] | first }}}}{END}",
    "{% set ns = namespace(c='') %}{% for m in messages %}{% set ns.c = m.content %}{% endfor %}{{ ns.c }}",
    "{% if messages[0] == messages[1] %}y{% endif %}",
    f"{FOR}{{{{ m.content | trim(chars='x') }}}}{END}",
    f"{FOR}{{% if 'x' is in(seq=m.content) %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% if 'x' is in(*[m.content]) %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{MAYBE_SET}{END}",
    f"{FOR}{MAYBE_NONE}{END}",
    f"{{% set messages = messages if messages[1] else [{{}}] %}}{FOR}{UNLESS_TEXT}{END}",
    f"{FOR}{{% set l = loop %}}{{% if l.previtem.content == 'x' %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% if (loop | attr('previtem')).content == 'x' %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% if loop['prev' ~ 'item'].content == 'x' %}}y{{% endif %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{% filter upper %}}{{{{ loop.previtem.content }}}}{{% endfilter %}}{{{{ m.content }}}}{END}",
    f"{FOR}{{{{ ('<' | safe) + m.content }}}}{END}",
    f"{{% set lead | escape %}}<{{% endset %}}{FOR}{{{{ lead + m.content }}}}{END}",
    f"{FOR}{{{{ (['<'] | map('e') | first) + m.content }}}}{END}",
    f"{SHOUT}{FOR}{{{{ raise_exception(m.content) }}}}{END}",
    f"{MARKUP}{FOR}{{{{ f() + m.content }}}}{END}",
]
CONVERSATION = Conversation((Message("user", "hello"), Message("assistant", "yes")))


@pytest.mark.parametrize("text", PLACING)
def test_templates_that_put_texts_in_their_places(text: str) -> None:
    assert ChatTemplate(text, "t", {}).only_places_texts


@pytest.mark.parametrize("text", LOOKING)
def test_templates_that_look_into_texts(text: str) -> None:
    assert not ChatTemplate(text, "t", {}).only_places_texts


@pytest.mark.parametrize("name", shipped_template_names())
def test_the_shipped_templates_put_texts_in_their_places(name: str) -> None:
    template = ChatTemplate((SHIPPED_TEMPLATES / f"{name}.jinja").read_text(), name, {"eos_token": "</s>"})
    assert template.only_places_texts


def test_which_real_templates_put_texts_in_their_places(material: Path) -> None:
    placing = {
        path.stem
        for path in (material / "templates").glob("*.jinja")
        if ChatTemplate(path.read_text(encoding="utf-8"), path.stem, {}).only_places_texts
    }
    expected = {"Qwen-Qwen2.5-7B-Instruct", "gemma3", "google-gemma-2-2b-it", "phi3", "microsoft-Phi-3.5-mini-instruct"}
    assert placing == expected


ROLES = st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=5)
TEXTS = st.text(st.sampled_from([*"ab <>{%}\n'\"\\|", "é", "你", "👩"]), min_size=1, max_size=8)


@given(data=st.data(), text=st.sampled_from(PLACING))
def test_what_is_known_of_a_shape_is_what_is_rendered(
    tiny_tokenizer: PreTrainedTokenizerBase, data: st.DataObject, text: str
) -> None:
    assert_shapes_hold(ChatTemplate(text, "t", {}), tiny_tokenizer, data)


@given(data=st.data(), name=st.sampled_from(["Qwen-Qwen2.5-7B-Instruct", "gemma3", "google-gemma-2-2b-it", "phi3"]))
def test_what_is_known_of_a_real_templates_shape_is_what_is_rendered(
    tiny_tokenizer: PreTrainedTokenizerBase, material: Path, data: st.DataObject, name: str
) -> None:
    text = (material / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(text, name, {"bos_token": "<s>", "eos_token": "</s>"})
    assert_shapes_hold(template, tiny_tokenizer, data)


def assert_shapes_hold(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    from trainkit.data.encoding import text_tokenizer
    from trainkit.data.spoken_specials import SpecialTokens

    shapes = ChatShapes(template, ("<end>",), SpecialTokens(tokenizer, text_tokenizer(tokenizer)))
    roles = data.draw(ROLES)
    for _ in range(3):
        messages = tuple(Message(role, data.draw(TEXTS), trained=False) for role in roles)  # type: ignore[arg-type]
        try:
            expected = template.render(messages)
        except TemplateProblem:
            expected = None
        placed = shapes.place(Conversation(messages))
        assert placed is None or placed.text == expected


def test_shapes_are_found_for_ordinary_conversations(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from trainkit.data.encoding import text_tokenizer
    from trainkit.data.spoken_specials import SpecialTokens

    special = SpecialTokens(tiny_tokenizer, text_tokenizer(tiny_tokenizer))
    template = ChatTemplate(f"{FOR}<|{{{{ m.role }}}}|>{{{{ m.content | trim }}}}<|end|>\n{END}", "t", {})
    shapes = ChatShapes(template, ("<|end|>",), special)
    placed = shapes.place(Conversation((Message("user", " hello "), Message("assistant", "yes\n"))))
    assert placed is not None
    assert placed.text == "<|user|>hello<|end|>\n<|assistant|>yes<|end|>\n"
    assert [placed.text[start:end] for start, end in placed.turns] == ["yes<|end|>"]
    assert placed.specials == sum(special.count(part) for part in ("<|user|>", "<|assistant|>", "<|end|>", "<|end|>"))
    for left in ("  ", "</think>x"):
        assert shapes.place(Conversation((Message("user", left), Message("assistant", "yes")))) is None
    with_extras = Conversation((Message("user", "a"), Message("assistant", "b", extras={"name": "x"})))
    assert shapes.place(with_extras) is None
    assert shapes.place(Conversation(CONVERSATION.messages, tools=({"function": {"name": "f"}},))) is None
    open_ended = ChatShapes(ChatTemplate(f"{FOR}{{{{ m.content }}}};{END}", "t", {}), ("<|end|>",), special)
    assert open_ended.place(CONVERSATION) is None
