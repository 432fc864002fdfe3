from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest

from trainkit.data.bulk_encoding import BulkEncoder
from trainkit.data.conversations import Conversation, Message, PlainText
from trainkit.data.document_stream import EncodedBlock
from trainkit.data.encoding import Encoder
from trainkit.data.mask_gate import MaskGate
from trainkit.data.packed_store import DocumentBatch
from trainkit.errors import DataError
from trainkit.recipe.schema import Data, Packing, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainkit.data.conversations import ParsedExample

ANSWERED = Conversation((Message("user", "is it 👩?"), Message("assistant", "the end")))
MASKED = Conversation((Message("user", "is it 👩?"), Message("assistant", "the end", trained=False)))
NO_END = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def gate_after(tokenizer: PreTrainedTokenizerBase, *examples: ParsedExample, separator: str = "eos") -> MaskGate:
    encoder = Encoder(tokenizer, Data(train=(Source(path="x"),)), Packing(separator=separator))
    gate = MaskGate(tokenizer)
    places = [f"t:{number}" for number in range(1, len(examples) + 1)]
    encoded = BulkEncoder(encoder).encode(list(zip(examples, places, strict=True)))
    none_N = np.zeros(len(examples), np.int64)
    documents = DocumentBatch(
        ids_K=encoded.ids_K,
        trained_K=encoded.trained_K,
        lengths_N=encoded.lengths_N,
        separators_N=encoded.separators_N,
        has_prompt_N=none_N > 0,
        source=0,
        examples_N=none_N,
        digests_N=none_N.astype(np.uint64),
        places=places,
    )
    gate.observe(EncodedBlock(documents, encoded.turns_N, encoded.ended_turns_N, 0, len(examples), 0, ()))
    return gate


def test_nothing_trained_is_refused_with_an_example_token_by_token(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="0 of 34 tokens in 2 examples are trained") as caught:
        gate_after(tiny_tokenizer, MASKED, MASKED).check()
    assert str(caught.value).startswith("t:1: ")
    assert len(str(caught.value)) <= 200
    heading, *lines = caught.value.example
    assert heading.startswith("  trained (*)")
    assert any(line.endswith("'<|assistant|>'") for line in lines)
    assert not [line for line in lines if line.startswith("  *")]


def test_one_trained_example_is_enough(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    gate_after(tiny_tokenizer, MASKED, ANSWERED).check()
    gate_after(tiny_tokenizer, PlainText("the fox")).check()
    gate_after(tiny_tokenizer).check()


def test_turns_whose_end_is_never_trained_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = NO_END
    with pytest.raises(DataError, match="the end of 1 trained turns is not trained") as caught:
        gate_after(tokenizer, ANSWERED, separator="none").check()
    assert [line for line in caught.value.example[1:] if line.startswith("  *")]
    gate_after(tokenizer, ANSWERED, separator="eos").check()  # the separator ends the turn
