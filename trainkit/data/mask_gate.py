"""The mask gate: a data set that would teach nothing, or never to stop, is refused before a step is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainkit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from trainkit.data.document_stream import EncodedBlock

TOKENS_SHOWN = 48


@dataclass(frozen=True, slots=True)
class _Sample:
    place: str
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


class MaskGate:
    """Watches documents as they are encoded; :meth:`check` refuses them when their masks cannot be meant."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._documents = self._tokens = self._trained_tokens = 0
        self._turns = self._ended_turns = 0
        self._untrained: _Sample | None = None
        self._open: _Sample | None = None

    def observe(self, block: EncodedBlock) -> None:
        """Count the documents of a block."""
        documents = block.documents
        if not documents.places:
            return
        trained_N = documents.targets_N
        self._documents += len(documents.places)
        self._tokens += documents.ids_K.size
        self._trained_tokens += int(trained_N.sum())
        self._turns += int(block.turns_N.sum())
        self._ended_turns += int(block.ended_turns_N.sum())

        def first_of(number: int) -> _Sample:
            return _Sample(documents.places[number], *documents.document(number))

        if self._untrained is None and not trained_N.all():
            self._untrained = first_of(int(np.argmin(trained_N != 0)))
        open_N = block.ended_turns_N < block.turns_N
        if self._open is None and open_N.any():
            self._open = first_of(int(np.argmax(open_N)))

    def check(self) -> None:
        """Raise DataError, with one example token by token, when nothing is trained or no turn's end is."""
        if self._untrained is not None and not self._trained_tokens:
            raise DataError(
                f"{self._untrained.place}: 0 of {self._tokens:,} tokens in {self._documents:,} examples are trained; "
                "check data.train_on, the roles and the loss weights of the messages",
                example=self._shown(self._untrained),
            )
        if self._open is not None and not self._ended_turns:
            raise DataError(
                f"{self._open.place}: the end of {self._turns:,} trained turns is not trained, so that the model would "
                "never stop; set packing.separator: eos, or a data.chat_template that ends its turns",
                example=self._shown(self._open),
            )

    def _shown(self, sample: _Sample) -> list[str]:
        """The last tokens of an example, one a line: position, id, text; a star marks what is trained."""
        ids, trained = sample.ids, sample.trained
        first = max(0, ids.size - TOKENS_SHOWN)
        texts = (self._tokenizer.decode([int(one)], clean_up_tokenization_spaces=False) for one in ids[first:])
        lines = [
            f"  {'*' if trained[position] else ' '} {position:>6} {int(ids[position]):>7}  {text!r}"
            for position, text in enumerate(texts, first)
        ]
        return [f"  trained (*), position, id, text of its last {ids.size - first} tokens:", *lines]
