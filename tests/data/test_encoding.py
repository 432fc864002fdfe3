from __future__ import annotations

import copy
import re
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.conversations import Conversation, Message, ParsedExample, PlainText, PromptCompletion
from trainkit.data.encoding import Encoded, Encoder, show_tokens
from trainkit.errors import DataError, ModelError, UsageError
from trainkit.recipe.schema import Data, Packing, Source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

PLACE = "train.jsonl:12"
CHAT = Conversation(
    (
        Message("user", "What is it? 你好"),
        Message("assistant", "Привет 👩‍🚀, it is the fox."),
        Message("user", "And then?"),
        Message("assistant", "the end"),
    )
)


def encoder_of(
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: Any = "completions",
    separator: str = "eos",
    chat_template: str | None = None,
) -> Encoder:
    data = Data(train=(Source(path="x"),), train_on=train_on, chat_template=chat_template)
    return Encoder(tokenizer, data, Packing(separator=separator))


def engine(tokenizer: PreTrainedTokenizerBase, normalizer: Any = None, before: str | None = None) -> Any:
    """A copy of the tokenizer with a normaliser, or with a token that it puts before every text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if normalizer is not None:
        backend.normalizer = normalizer
    if before is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A", special_tokens=[(before, backend.token_to_id(before))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=before,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=tokenizer.chat_template,
    )


def trained_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every run of trained tokens, decoded by transformers rather than by what is tested."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], encoded.trained, [0]))))
    runs = [encoded.ids[start:end].tolist() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


def test_a_conversation_trains_what_the_assistant_says_and_the_end_of_its_turns(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = encoder_of(tiny_tokenizer).encode(CHAT, PLACE)
    assert trained_text(encoded, tiny_tokenizer) == ["Привет 👩‍🚀, it is the fox.<|end|>", "the end<|end|>"]
    assert (encoded.turns, encoded.ended_turns) == (2, 2)
    assert encoded.ids.dtype == np.int32
    assert encoded.trained.dtype == np.bool_


def test_ids_are_those_of_transformers(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": one.role, "content": one.content} for one in CHAT.messages]
    encoded = encoder_of(tiny_tokenizer).encode(CHAT, PLACE)
    assert encoded.ids.tolist() == tiny_tokenizer.apply_chat_template(chat)["input_ids"]
    assert encoded.separator_tokens == 0  # it ends in eos and a line end already
    text = encoder_of(tiny_tokenizer).encode(PlainText("what is it? 你好 👩‍🚀"), PLACE)
    assert text.ids.tolist() == [*tiny_tokenizer("what is it? 你好 👩‍🚀")["input_ids"], tiny_tokenizer.eos_token_id]


def test_plain_text_trains_all_but_the_first_token(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encoder_of(tiny_tokenizer).encode(PlainText("the fox"), PLACE)
    assert encoded.trained.tolist() == [False, *[True] * (encoded.ids.size - 1)]
    assert encoded.separator_tokens == 1
    assert encoded.ids[-1] == tiny_tokenizer.eos_token_id


def test_a_completion_is_trained_and_its_prompt_is_not(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encoder_of(tiny_tokenizer).encode(PromptCompletion("what is it?", " the dog"), PLACE)
    assert trained_text(encoded, tiny_tokenizer) == [" the dog<|end|>"]
    assert tiny_tokenizer.decode(encoded.ids) == "what is it? the dog<|end|>"
    assert encoded.ids.tolist()[:-1] == tiny_tokenizer("what is it? the dog")["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("what is ", "the dog"), ("what is it, th", "e dog"), ("is it 👩", "\u200d🚀 then"), ("e", "\u0301 the")],
)
def test_a_token_over_the_edge_never_trains_the_prompt_nor_loses_the_completion(
    tiny_tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> None:
    encoder = encoder_of(tiny_tokenizer)
    encoded = encoder.encode(PromptCompletion(prompt, completion), PLACE)
    assert trained_text(encoded, tiny_tokenizer) == [completion + "<|end|>"]
    asked = encoder.prompt(PromptCompletion(prompt, completion))
    assert asked is not None
    assert encoded.ids.tolist()[: len(asked.ids)] == list(asked.ids)  # as it is when the model is asked


def test_the_edge_in_question_exists(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """The test above would show nothing if no token ran over the edge."""
    offsets = tiny_tokenizer("what is the dog", return_offsets_mapping=True)["offset_mapping"]
    assert any(start < len("what is ") < end for start, end in offsets)


texts = st.text(
    st.one_of(st.sampled_from(" \nthe fox,."), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=30
)


@given(prompt=texts, completion=texts)
@settings(max_examples=150, deadline=None)
def test_any_completion_comes_back_from_its_trained_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> None:
    encoded = tiny_encoder(tiny_tokenizer).encode(PromptCompletion(prompt, completion), PLACE)
    said = "".join(trained_text(encoded, tiny_tokenizer)).removesuffix("<|end|>")
    assert tiny_tokenizer.decode(encoded.ids).removesuffix("<|end|>") == prompt + completion
    assert said.strip() == completion.strip()
    assert completion.endswith(said)


@given(asked=texts, said=texts)
@settings(max_examples=100, deadline=None)
def test_any_answer_comes_back_from_its_trained_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, asked: str, said: str
) -> None:
    conversation = Conversation((Message("user", asked), Message("assistant", said)))
    assert trained_text(tiny_encoder(tiny_tokenizer).encode(conversation, PLACE), tiny_tokenizer) == [said + "<|end|>"]


_encoders: dict[int, Encoder] = {}


def tiny_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Made once: a property test asks for it a hundred times."""
    return _encoders.setdefault(id(tokenizer), encoder_of(tokenizer))


def test_many_at_once_are_the_same_as_one_by_one(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = encoder_of(tiny_tokenizer)
    examples: list[ParsedExample] = [CHAT, PlainText("the fox"), PromptCompletion("is it", " so?"), PlainText("")]
    together = encoder.encode_many([(one, PLACE) for one in examples])
    for one, many in zip(examples, together, strict=True):
        alone = encoder.encode(one, PLACE)
        assert alone.ids.tolist() == many.ids.tolist()
        assert alone.trained.tolist() == many.trained.tolist()


def test_train_on_all_trains_every_token_but_the_first(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = encoder_of(tiny_tokenizer, train_on="all")
    for example in (CHAT, PromptCompletion("is it", " so?")):
        trained = encoder.encode(example, PLACE).trained
        assert not trained[0]
        assert trained[1:].all()


def test_a_message_that_is_not_to_be_trained_is_context(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = (CHAT.messages[0], Message("assistant", "no", trained=False), *CHAT.messages[2:])
    encoded = encoder_of(tiny_tokenizer).encode(Conversation(messages), PLACE)
    assert trained_text(encoded, tiny_tokenizer) == ["the end<|end|>"]


# --- separator and BOS -----------------------------------------------------------------------------------------------


def test_separator_none_adds_nothing(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encoder_of(tiny_tokenizer, separator="none").encode(PlainText("the fox"), PLACE)
    assert encoded.separator_tokens == 0
    assert tiny_tokenizer.decode(encoded.ids) == "the fox"


def test_separator_may_be_any_token_of_the_vocabulary(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encoder_of(tiny_tokenizer, separator="<|endoftext|>").encode(PlainText("the fox"), PLACE)
    assert tiny_tokenizer.decode(encoded.ids) == "the fox<|endoftext|>"
    with pytest.raises(UsageError, match=r"packing\.separator: '<\|no\|>' is not in the vocabulary"):
        encoder_of(tiny_tokenizer, separator="<|no|>")


@pytest.mark.parametrize("text", ["the fox<|end|>", "the fox<|end|>\n \n"])
def test_no_separator_where_the_document_ends_in_one(tiny_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    encoded = encoder_of(tiny_tokenizer).encode(PlainText(text), PLACE)
    assert encoded.separator_tokens == 0
    assert tiny_tokenizer.decode(encoded.ids) == text


def test_a_separator_is_trained_only_behind_a_trained_token(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    asked_last = Conversation((*CHAT.messages, Message("user", "so?")))
    encoder = encoder_of(tiny_tokenizer, separator="<|endoftext|>")
    tiny = copy.copy(tiny_tokenizer)
    tiny.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    bare = encoder_of(tiny)
    assert encoder.encode(asked_last, PLACE).separator_tokens == 0  # ends in eos
    assert not bare.encode(asked_last, PLACE).trained[-1]
    last = bare.encode(CHAT, PLACE)
    assert last.trained[-1]
    assert (last.turns, last.ended_turns) == (2, 1)  # the separator ends the last turn, nothing the first


def test_bos_is_neither_doubled_nor_lost(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = engine(tiny_tokenizer, before="<|endoftext|>")
    encoder = encoder_of(tokenizer)
    for text in ("the fox", "<|endoftext|>the fox"):
        encoded = encoder.encode(PlainText(text), PLACE)
        assert tokenizer.decode(encoded.ids) == "<|endoftext|>the fox<|end|>"
        assert encoded.trained.tolist() == [False, *[True] * (encoded.ids.size - 1)]
    completion = encoder.encode(PromptCompletion("", "the fox"), PLACE)
    assert trained_text(completion, tokenizer) == ["the fox<|end|>"]
    asked = encoder.prompt(PromptCompletion("is it", " so?"))
    assert asked is not None
    assert tokenizer.decode(asked.ids) == "<|endoftext|>is it"


def test_a_conversation_has_the_bos_token_that_its_template_writes(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = engine(tiny_tokenizer, before="<|endoftext|>")
    tokenizer.chat_template = "{{ bos_token }}" + tiny_tokenizer.chat_template
    ids = encoder_of(tokenizer).encode(CHAT, PLACE).ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    shipped = encoder_of(tokenizer, chat_template="chatml")
    assert shipped.encode(CHAT, PLACE).ids.tolist().count(tokenizer.bos_token_id) == 1
    assert shipped.chat_template.startswith("{{- bos_token }}")  # so that the saved tokenizer does the same


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_loses_characters_is_refused_by_name() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {character: index for index, character in enumerate("abcdefghijklmnopqrstuvwxyz ()5")}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = __import__("tokenizers").decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoder = encoder_of(tokenizer)
    assert encoder.encode(PlainText("5 zinc (zn)"), PLACE).ids.size == 12
    with pytest.raises(ModelError, match=r"train\.jsonl:12: .*loses '%': '5% zinc"):
        encoder.encode(PlainText("5% zinc (zn)"), PLACE)


@pytest.mark.parametrize("text", ["The Fox", "ﬁne", "Ａ"])
def test_a_normaliser_that_changes_the_text_is_refused(tiny_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    from tokenizers import normalizers

    lossy = engine(tiny_tokenizer, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    with pytest.raises(ModelError, match=r"train\.jsonl:12: "):
        encoder_of(lossy).encode(PlainText(text), PLACE)


def test_canonical_composition_and_prefix_spaces_are_no_loss(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import normalizers

    composing = engine(tiny_tokenizer, normalizers.NFC())
    apart = unicodedata.normalize("NFD", "Übergänge 한국")
    conversation = Conversation((Message("user", apart), Message("assistant", apart)))
    encoded = encoder_of(composing).encode(conversation, PLACE)
    assert trained_text(encoded, composing) == ["Übergänge 한국<|end|>"]
    spaced = engine(tiny_tokenizer, normalizers.Prepend(" "))
    encoder_of(spaced).encode(conversation, PLACE)


def test_a_decoder_that_takes_the_first_space_away_loses_nothing(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    from tokenizers import decoders

    stripping = engine(tiny_tokenizer)
    stripping.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for text in (" the fox", "  the fox"):
        encoded = encoder_of(stripping).encode(PlainText(text), PLACE)
        assert tiny_tokenizer.decode(encoded.ids[:-1].tolist()) == text
    stripping.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    )
    with pytest.raises(ModelError, match="the tokenizer loses ' '"):
        encoder_of(stripping).encode(PlainText("  the fox"), PLACE)


def test_a_lost_space_is_a_loss(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import Regex, normalizers

    collapsing = engine(tiny_tokenizer, normalizers.Replace(Regex(" {2,}"), " "))
    with pytest.raises(ModelError, match="the tokenizer loses ' '"):
        encoder_of(collapsing).encode(PlainText("def f():\n    return"), PLACE)


def test_half_a_surrogate_pair_is_refused_with_its_example(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"^b:2: .*surrogate"):
        encoder_of(tiny_tokenizer).encode_many([(PlainText("fine"), "a:1"), (PlainText("\ud83d"), "b:2")])


def test_a_template_that_fails_names_the_example_in_one_line(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    for ask in (encoder_of(tokenizer).encode, encoder_of(tokenizer).prompt):
        with pytest.raises(ModelError, match=r"^train\.jsonl:12: .*no system role; .*data\.chat_template$"):
            ask(CHAT, PLACE)


def test_a_tokenizer_without_template_serves_text_but_no_conversation(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.copy(tiny_tokenizer)
    bare.chat_template = None
    encoder = encoder_of(bare)
    assert encoder.encode(PlainText("the fox"), PLACE).ids.size
    assert encoder.chat_template is None
    with pytest.raises(ModelError, match=r"no chat template; set data\.chat_template to chatml or plain"):
        encoder.encode(CHAT, PLACE)


def test_a_tokenizer_without_eos_needs_another_separator(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.eos_token = None
    with pytest.raises(ModelError, match=r"no end-of-sequence token; set packing\.separator"):
        encoder_of(bare)
    assert encoder_of(bare, separator="<|endoftext|>").encode(PlainText("the fox"), PLACE).separator_tokens == 1


# --- prompts, fingerprint, display -----------------------------------------------------------------------------------


def test_a_prompt_is_the_conversation_before_its_last_answer(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = encoder_of(tiny_tokenizer).prompt(CHAT)
    assert prompt is not None
    chat = [{"role": one.role, "content": one.content} for one in CHAT.messages[:3]]
    assert prompt.text == tiny_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tiny_tokenizer.decode(list(prompt.ids)) == prompt.text
    assert prompt.reference == "the end"


def test_what_asks_nothing_has_no_prompt(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = encoder_of(tiny_tokenizer)
    assert encoder.prompt(PlainText("the fox")) is None
    assert encoder.prompt(Conversation((Message("assistant", "hello"),))) is None
    assert encoder.prompt(Conversation((Message("user", "hello"),))) is None


CHANGES: dict[str, Callable[[Any], Encoder]] = {
    "train_on": lambda tokenizer: encoder_of(tokenizer, train_on="all"),
    "separator": lambda tokenizer: encoder_of(tokenizer, separator="none"),
    "template": lambda tokenizer: encoder_of(tokenizer, chat_template="plain"),
    "bos": lambda tokenizer: encoder_of(engine(tokenizer, before="<|endoftext|>")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_moves_with_all_that_decides_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, change: str
) -> None:
    base = encoder_of(tiny_tokenizer).fingerprint
    assert encoder_of(tiny_tokenizer).fingerprint == base
    assert CHANGES[change](tiny_tokenizer).fingerprint != base


def test_padding_and_truncation_left_in_the_tokenizer_do_not_matter(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    used = copy.deepcopy(tiny_tokenizer)
    base = encoder_of(used)
    used(["a", "the fox and the dog"], padding=True, truncation=True, max_length=2)
    again = encoder_of(used)
    assert again.fingerprint == base.fingerprint
    assert again.encode(CHAT, PLACE).ids.tolist() == base.encode(CHAT, PLACE).ids.tolist()


def test_the_largest_id_is_that_of_the_vocabulary(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert encoder_of(tiny_tokenizer).largest_token_id == 299


def test_shown_tokens_are_the_text_and_cut_no_character(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = encoder_of(tiny_tokenizer)
    spans = show_tokens(encoder.encode(CHAT, PLACE), tiny_tokenizer)
    assert [trained for _, trained in spans] == [False, True, False, True, False]
    assert spans[1][0] == "Привет 👩‍🚀, it is the fox.<|end|>"
    emoji = encoder.encode(PlainText("👩 the fox"), PLACE)  # its first token, a part of the emoji, is not trained
    assert show_tokens(emoji, tiny_tokenizer) == [("👩 the fox<|end|>", True)]
    assert show_tokens(emoji, tiny_tokenizer, 0) == []


def test_an_end_token_that_swallows_the_line_end_is_no_loss(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken("<|eot|>", rstrip=True, special=True)], special_tokens=True)
    tokenizer.chat_template = tiny_tokenizer.chat_template.replace("<|end|>", "<|eot|>")
    encoded = encoder_of(tokenizer).encode(CHAT, PLACE)
    assert [text[-20:] for text in trained_text(encoded, tokenizer)] == [
        "it is the fox.<|eot|>"[-20:],
        "the end<|eot|><|end|>"[-20:],
    ]


# --- real tokenizers and templates -----------------------------------------------------------------------------------


def test_a_sentencepiece_like_tokenizer(material: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "models" / "stories260K")
    for name, end in (("plain", "</s>"), ("chatml", "<|im_end|>")):
        encoded = encoder_of(tokenizer, chat_template=name).encode(CHAT, PLACE)
        assert encoded.ids[0] == tokenizer.bos_token_id
        assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
        said = [text.removesuffix("</s>").removesuffix(end) for text in trained_text(encoded, tokenizer)]
        assert said == ["Привет 👩‍🚀, it is the fox.", "the end"]
    text = encoder_of(tokenizer).encode(PlainText("Once upon"), PLACE)
    assert text.ids.tolist() == [*tokenizer("Once upon")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["qwen3", "meta-llama-Llama-3.1-8B-Instruct", "gemma3"])
def test_real_templates_with_a_real_tokenizer(qwen2: PreTrainedTokenizerBase, material: Path, name: str) -> None:
    tokenizer = copy.copy(qwen2)
    tokenizer.chat_template = (material / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    encoded = encoder_of(tokenizer).encode(CHAT, PLACE)
    chat = [{"role": one.role, "content": one.content} for one in CHAT.messages]
    end = {"qwen3": "<|im_end|>", "gemma3": "<end_of_turn>"}.get(name, "<|eot_id|>")
    assert encoded.ids.tolist()[: -encoded.separator_tokens or None] == tokenizer.apply_chat_template(chat)["input_ids"]
    said = [text.removesuffix("<|im_end|>").removesuffix(end) for text in trained_text(encoded, tokenizer)]
    assert said == ["Привет 👩‍🚀, it is the fox.", "the end"]


TURN_TOKEN = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<｜[^｜]+｜>")
ENDS = {"qwen3": "<|im_end|>", "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>", "phi3": "<|end|>"}
ENDS |= {
    "gemma3": "<end_of_turn>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
}
ENDS |= {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>"}
ENDS |= {"meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>", "mistralai-Mistral-Nemo-Instruct-2407": "</s>"}


@pytest.fixture(scope="module")
def encoders(tiny_tokenizer: PreTrainedTokenizerBase, material: Path) -> dict[str, Encoder]:
    """One for each real template, its turn tokens added to the small tokenizer."""
    found = {}
    for name, end in ENDS.items():
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = (material / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        turn_tokens = sorted({*TURN_TOKEN.findall(tokenizer.chat_template), "</s>"})
        tokenizer.add_special_tokens({"additional_special_tokens": turn_tokens, "bos_token": "<s>", "eos_token": end})
        found[name] = encoder_of(tokenizer)
    return found


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), name=st.sampled_from(sorted(ENDS)))
@settings(max_examples=150, deadline=None)
def test_any_answers_come_back_through_every_real_template(
    encoders: dict[str, Encoder], pairs: list[tuple[str, str]], name: str
) -> None:
    messages = [one for asked, said in pairs for one in (Message("user", asked), Message("assistant", said))]
    encoder = encoders[name]
    encoded = encoder.encode(Conversation(tuple(messages)), PLACE)
    runs = trained_text(encoded, encoder.tokenizer)
    assert [run.removesuffix(ENDS[name]).strip() for run in runs] == [said.strip() for _, said in pairs]
    assert all(run.endswith(ENDS[name]) for run in runs)


@pytest.fixture(scope="module")
def qwen2(material: Path) -> PreTrainedTokenizerBase:
    """Qwen2's tokenizer with the turn tokens of other families added to it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / "qwen2")
    turn_tokens = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turn_tokens, "bos_token": "<s>"})
    return tokenizer
