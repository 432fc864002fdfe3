from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from trainkit.data import token_bytes
from trainkit.data.encoding import text_tokenizer
from trainkit.data.token_bytes import GigatokenEngine, TokenBytes, TokenizersEngine, find_engine, tokenize

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="module", params=["tiny", "tokenizers/qwen2", "tokenizers/gpt2", "models/stories260K"])
def engine(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    if request.param == "tiny":
        return text_tokenizer(tiny_tokenizer)
    from transformers import AutoTokenizer

    return text_tokenizer(AutoTokenizer.from_pretrained(request.getfixturevalue("material") / request.param))


TEXTS = ["the quick brown fox", "", "你好 Привет 👩‍🚀", " spaces  \n\t", "<|end|>x<|im_end|></s>", "naïve e\u0301", "a"]


@pytest.mark.parametrize("kind", ["gigatoken", "tokenizers"])
def test_ids_and_positions_are_those_of_tokenizers(engine: Tokenizer, kind: str) -> None:
    made = GigatokenEngine(engine.to_str()) if kind == "gigatoken" else TokenizersEngine(engine)
    table = TokenBytes.of(engine)
    assert table is not None
    found = tokenize(made, table, [text.encode() for text in TEXTS])
    spelled = 0
    for number, text in enumerate(TEXTS):
        expected = engine.encode(text, add_special_tokens=False)
        part = slice(int(found.offsets_N[number]), int(found.offsets_N[number + 1]))
        assert found.ids_K[part].tolist() == expected.ids
        if found.spelled_N[number]:
            spelled += 1
            bytes_before = [len(text[:start].encode()) for start, _ in expected.offsets]
            ours = found.starts_K[part].tolist()
            # A character of several tokens has one offset in characters, and one in bytes for each of them.
            assert all(a >= b for a, b in zip(ours, bytes_before, strict=True))
            if text.isascii():
                assert ours == bytes_before
    assert spelled >= 5


@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_gigatoken_gives_the_ids_of_tokenizers(tiny_tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    engine = text_tokenizer(tiny_tokenizer)
    encoded = [text.encode() for text in texts]
    fast, slow = GigatokenEngine(engine.to_str()).ids(encoded), TokenizersEngine(engine).ids(encoded)
    assert fast[0].tolist() == slow[0].tolist()
    assert fast[1].tolist() == slow[1].tolist()


def test_tokens_are_spelled_in_bytes(tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = text_tokenizer(tiny_tokenizer)
    table = TokenBytes.of(engine)
    assert table is not None
    ids = engine.encode("你 the<|end|>\n", add_special_tokens=False).ids
    assert table.spell(np.array(ids)) == "你 the<|end|>\n".encode()
    assert table.spell(np.array([], np.int32)) == b""
    monkeypatch.setattr(token_bytes, "SPELLED_AT_ONCE", 2)
    assert table.spell(np.array(ids)) == "你 the<|end|>\n".encode()


def test_a_vocabulary_of_another_kind_has_no_bytes() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert TokenBytes.of(words) is None
    words.decoder = decoders.WordPiece()
    assert TokenBytes.of(words) is None


def test_ids_that_the_table_does_not_know_are_no_spelling(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = text_tokenizer(tiny_tokenizer)
    table = TokenBytes.of(engine)
    assert table is not None

    class Wrong:
        name = "wrong"

        def ids(self, texts: Any) -> Any:
            return np.full(len(texts), 2**31, np.int64), np.arange(len(texts) + 1)

    assert not tokenize(Wrong(), table, [b"a", b"b"]).spelled_N.any()


def test_without_gigatoken_tokenizers_are_taken_and_it_is_said(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = text_tokenizer(tiny_tokenizer)
    assert find_engine(engine, engine.to_str())[1] is None
    plain_import = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "gigatoken":
            raise ImportError(name)
        return plain_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found, why = find_engine(engine, engine.to_str())
    assert found.name == "tokenizers"
    assert why == "gigatoken is not installed (pip install 'trainkit[fast]')"


def test_a_tokenizer_that_gigatoken_refuses(material: Path) -> None:
    del material  # a real library's refusal, whatever it is
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    found, why = find_engine(words, words.to_str())
    assert found.name == "tokenizers"
    assert why is not None
    assert why.startswith("gigatoken does not know this tokenizer")


def test_added_tokens_that_are_none_inside_words(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = text_tokenizer(tiny_tokenizer)
    engine.add_tokens([AddedToken("<w>", single_word=True)])
    found, why = find_engine(engine, engine.to_str())
    assert found.name == "tokenizers"
    assert why == "gigatoken finds added tokens inside words, where this tokenizer does not"
    inside, alone = (found.ids([text])[0].tolist() for text in (b"fox<w>fox", b"fox <w> fox"))
    assert engine.token_to_id("<w>") not in inside
    assert engine.token_to_id("<w>") in alone
