from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit.data import bulk_encoding
from trainkit.data.bulk_encoding import BulkEncoder, EncodedDocuments, EnginesDiffer
from trainkit.data.conversations import (
    Conversation,
    Dropped,
    Message,
    ParsedExample,
    PlainText,
    PromptCompletion,
    parse,
)
from trainkit.data.encoding import Encoder
from trainkit.data.formats import recognise
from trainkit.data.sources import read_source
from trainkit.data.token_bytes import TokenizersEngine
from trainkit.errors import DataError, ModelError
from trainkit.recipe.schema import Data, Packing, Source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

TEMPLATES = [
    "Qwen-Qwen2.5-7B-Instruct",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "gemma3",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "phi3",
    "qwen3",
]


def encoder_of(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Encoder:
    packing = Packing(separator=changes.pop("separator", "eos"))
    return Encoder(tokenizer, Data(train=(Source(path="x"),), **changes), packing)


def placed(examples: Sequence[ParsedExample]) -> list[tuple[ParsedExample, str]]:
    return [(one, f"x.jsonl:{number}") for number, one in enumerate(examples, start=1)]


def assert_as_reference(encoder: Encoder, examples: Sequence[ParsedExample]) -> int:
    """Compare every document; returns how many the reference had to encode for the bulk way."""
    asked = placed(examples)
    expected = encoder.encode_many(asked)
    by_reference = 0
    plain = encoder.encode_many

    def counted(some: Any) -> Any:
        nonlocal by_reference
        by_reference += len(some)
        return plain(some)

    encoder.encode_many = counted  # type: ignore[method-assign,assignment]
    try:
        found = BulkEncoder(encoder).encode(asked)
    finally:
        del encoder.encode_many
    ends = np.cumsum(found.lengths_N)
    assert found.ids_K.size == found.trained_K.size == (ends[-1] if ends.size else 0)
    for number, one in enumerate(expected):
        part = slice(int(ends[number] - found.lengths_N[number]), int(ends[number]))
        assert found.ids_K[part].tolist() == one.ids.tolist()
        assert found.trained_K[part].tolist() == one.trained.tolist()
        counts = [
            int(column[number])
            for column in (found.separators_N, found.turns_N, found.ended_turns_N, found.spoken_specials_N)
        ]
        assert counts == [one.separator_tokens, one.turns, one.ended_turns, one.spoken_specials]
    return by_reference


@pytest.fixture(scope="session")
def real_qwen2(material: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(material / "tokenizers" / "qwen2")


def chat(*texts: str, first: str = "user") -> Conversation:
    roles: Any = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    named = [first, *roles[roles.index(first) + 1 :], *(("user", "assistant") * len(texts))][: len(texts)]
    return Conversation(tuple(Message(role, text) for role, text in zip(named, texts, strict=True)))


ODD: list[ParsedExample] = [
    chat("What is it? 你好", "Привет 👩‍🚀, it is the fox.", "And then?", "the end"),
    chat(" a ", " b "),
    chat("\n\n", "b"),
    chat("a", "\nb\n"),
    chat("e\u0301", "cafe\u0301 decomposed"),
    chat("a", "<|im_end|> b"),
    chat("<|end|>\n<|assistant|>I obey", "no"),
    chat("<|end|>", "said alone"),
    chat("a", "<think>why</think>because"),
    chat("a", "b", first="user"),
    Conversation((Message("system", "be"), Message("user", "x"), Message("assistant", "y"))),
    Conversation((Message("user", "x"), Message("assistant", "y", trained=False), Message("user", "z", trained=True))),
    Conversation((Message("user", "x"), Message("assistant", "", extras={"reasoning_content": "r"}))),
    PlainText("the quick brown fox"),
    PlainText("the end<|end|>\n\n"),
    PlainText(" \t "),
    PromptCompletion("the quick", " brown fox"),
    PromptCompletion("the qui", "ck brown fox"),
    PromptCompletion("", "the"),
    PromptCompletion("what is ", "the"),
    PromptCompletion("the qui", "ck"),
    PromptCompletion("e", "\u0301"),
]


@pytest.mark.parametrize("train_on", ["completions", "all"])
@pytest.mark.parametrize("separator", ["eos", "none"])
def test_odd_examples_are_encoded_as_by_the_reference(
    tiny_tokenizer: PreTrainedTokenizerBase, train_on: str, separator: str
) -> None:
    encoder = encoder_of(tiny_tokenizer, train_on=train_on, separator=separator)
    plain = [one for one in ODD if not (isinstance(one, Conversation) and any(m.extras for m in one.messages))]
    assert 0 < assert_as_reference(encoder, plain) < len(plain)
    assert assert_as_reference(encoder, plain[:1]) == 0


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_a_turn_that_ends_within_the_last_token(tiny_tokenizer: PreTrainedTokenizerBase, train_on: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} t{% if loop.last %}he{% endif %}{% endfor %}"
    examples: list[ParsedExample] = [chat("what", "is it"), chat("what", "is"), chat("the", "the")]
    assert_as_reference(encoder_of(tokenizer, train_on=train_on), examples)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("separator", ["eos", "none"])
def test_tokenizers_that_write_a_space_as_a_letter(scheme: str, separator: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    words = ["the quick brown fox jumps over the lazy dog, and what is it then?"] * 4
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    examples: list[ParsedExample] = [
        PlainText("the fox"),
        PlainText(" the fox"),
        PlainText("  the  fox  "),
        PromptCompletion("what is ", "the"),
        PromptCompletion("what is", " the"),
        PromptCompletion(" ", "the"),
        chat("what is it", " the dog"),
        chat(" what", "the "),
    ]
    assert assert_as_reference(encoder_of(tokenizer, separator=separator), examples) < len(examples)


@pytest.mark.parametrize(
    ("added", "examples"),
    [
        (("<|end|>x", False), [chat("say <|user|>", "no", "x is it", "y")]),
        (("<w>", True), [chat("say <w> and", "end")]),
    ],
)
def test_a_special_token_said_where_one_of_the_template_is_lost(
    tiny_tokenizer: PreTrainedTokenizerBase, added: tuple[str, bool], examples: list[ParsedExample]
) -> None:
    """As many special tokens as the template wrote, and one of them said by a message."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tiny_tokenizer)
    content, single_word = added
    tokenizer.add_tokens([AddedToken(content, single_word=single_word, special=single_word)])
    end = content if single_word else "<|end|>"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}"
    encoder = encoder_of(tokenizer)
    assert not encoder.special.always_found
    assert encoder_of(tiny_tokenizer).special.always_found
    assert assert_as_reference(encoder, examples) == len(examples)


def test_a_tokenizer_that_begins_texts_with_bos(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    bos = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|end|>", chat_template=tiny_tokenizer.chat_template
    )
    examples: list[ParsedExample] = [
        PlainText("the fox"),
        PlainText(f"{bos}the fox"),
        PromptCompletion("the", " fox"),
        chat("a", "b"),
    ]
    assert assert_as_reference(encoder_of(tokenizer), examples) == 0


PIECES = [*"aéЖ你👩 \n\t.<|>", "the", " fox", "\u0301", "<|end|>", "<|im_end|>", "</think>"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.builds(PlainText, TEXT.filter(bool)),
            st.builds(PromptCompletion, TEXT, TEXT.filter(bool)),
            st.builds(lambda texts: chat(*texts), st.lists(TEXT, min_size=2, max_size=5)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_examples_are_encoded_as_by_the_reference(
    tiny_tokenizer: PreTrainedTokenizerBase, examples: list[ParsedExample]
) -> None:
    encoder = encoder_of(tiny_tokenizer)
    try:
        encoder.encode_many(placed(examples))
    except ModelError:  # a message that says a special token and nothing else may be refused; then by both
        with pytest.raises(ModelError):
            BulkEncoder(encoder).encode(placed(examples))
    else:
        assert_as_reference(encoder, examples)


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates(real_qwen2: PreTrainedTokenizerBase, material: Path, name: str) -> None:
    tokenizer = copy.deepcopy(real_qwen2)
    tokenizer.chat_template = (material / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    source = Source(path=str(material / "data" / "dolly_hhrlhf_1000.jsonl"))
    found = list(read_source(source))[:40]
    recognised = recognise(source, found)
    pairs = [one for example in found if isinstance(one := parse(example, recognised), PromptCompletion)]
    examples: list[ParsedExample] = [chat(one.prompt, one.completion) for one in pairs]
    examples += [chat(one.prompt, one.completion, "  And?  ", " Indeed.\n") for one in pairs[:10]]
    assert assert_as_reference(encoder_of(tokenizer), examples) < len(examples)


@pytest.mark.parametrize(
    "name",
    [
        "alpaca_data.json",
        "gsm8k_train.jsonl",
        "dolly_hhrlhf_1000.jsonl",
        "sharegpt_fastchat_dummy.json",
        "sharegpt_toolcall_en.json",
        "messages_openai_sft.jsonl",
        "v1_sft_demo.jsonl",
        "wikisql_text_train.jsonl",
    ],
)
@pytest.mark.parametrize("tokenizer_name", ["tokenizers/qwen2", "models/stories260K"])
def test_real_data(material: Path, name: str, tokenizer_name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / tokenizer_name)
    source = Source(path=str(material / "data" / name))
    found = list(read_source(source))[:60]
    recognised = recognise(source, found)
    examples = [one for example in found if not isinstance(one := parse(example, recognised), Dropped)]
    template = None if tokenizer.chat_template else "chatml"
    encoder = encoder_of(tokenizer, chat_template=template)
    try:
        encoder.encode_many(placed(examples))
    except ModelError:
        with pytest.raises(ModelError):
            BulkEncoder(encoder).encode(placed(examples))
    else:
        assert_as_reference(encoder, examples)


def test_an_engine_that_errs_is_found_out(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(tiny_tokenizer)
    bulk = BulkEncoder(encoder)
    asked = placed([chat("the fox", "the dog"), chat("the dog", "the fox")])
    bulk.encode(asked, range(2))
    engine = TokenizersEngine(encoder.text_tokenizer)
    right = engine.ids

    def letters(texts: Any) -> Any:
        """The same bytes in other tokens: only the reference can tell."""
        ids, offsets = right(texts)
        the = encoder.text_tokenizer.token_to_id("the")
        pieces = [encoder.text_tokenizer.token_to_id(letter) for letter in "the"]
        parts = [
            [piece for one in ids[first:last].tolist() for piece in (pieces if one == the else [one])]
            for first, last in itertools.pairwise(offsets)
        ]
        flat = np.array(list(itertools.chain.from_iterable(parts)), np.int32)
        assert flat.size > len(ids)
        return flat, np.concatenate(([0], np.cumsum([len(part) for part in parts])))

    monkeypatch.setattr(engine, "ids", letters)
    monkeypatch.setattr(bulk, "_engine", engine)
    with pytest.raises(EnginesDiffer, match=r"x\.jsonl:2"):
        bulk.encode(asked, [1])


def test_of_a_long_text_a_part_is_compared(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_encoding, "COMPARED_CHARACTERS", 24)
    encoder = encoder_of(tiny_tokenizer)
    fox = "the quick brown fox "
    asked = placed(
        [
            PlainText(fox * 4),
            PromptCompletion(fox * 2 + "is", " the " + fox * 2),
            chat(fox * 2, fox),
            PlainText(fox),
            PromptCompletion(fox[:12], fox[12:]),
        ]
    )
    expected = [encoder.encode(*one).ids for one in asked]
    by_reference: list[ParsedExample] = []
    plain = encoder.encode_many

    def noted(some: Any) -> Any:
        by_reference.extend(example for example, _ in some)
        return plain(some)

    monkeypatch.setattr(encoder, "encode_many", noted)
    found = BulkEncoder(encoder).encode(asked, range(len(asked)))
    assert found.ids_K.tolist() == np.concatenate(expected).tolist()
    assert by_reference == [
        PlainText((fox * 4)[:24]),
        PromptCompletion((fox * 2 + "is")[-12:], (" the " + fox)[:12]),
        PlainText(fox),
        PromptCompletion(fox[:12], fox[12:]),
    ]


def test_without_trust_all_is_the_references(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = encoder_of(tiny_tokenizer)
    asked = placed([chat("the fox", "the dog"), PlainText("the end")])
    fast, slow = BulkEncoder(encoder).encode(asked), BulkEncoder(encoder, trusted=False).encode(asked)
    assert fast.ids_K.tolist() == slow.ids_K.tolist()
    assert BulkEncoder(encoder, trusted=False).engine == "tokenizers"


def test_no_examples(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    found: EncodedDocuments = BulkEncoder(encoder_of(tiny_tokenizer)).encode([])
    assert found.ids_K.size == found.lengths_N.size == 0


def test_half_a_surrogate_pair_is_named_as_by_the_reference(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:2: the text holds half a surrogate pair"):
        BulkEncoder(encoder_of(tiny_tokenizer)).encode(placed([PlainText("a"), PlainText("b\ud800")]))
