"""The mask gate: a data set that would teach nothing, or never to stop, is refused before a step is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainkit.data.encoding import Encoded

TOKENS_SHOWN = 48


@dataclass(frozen=True, slots=True)
class _Sample:
    place: str
    encoded: Encoded


class MaskGate:
    """Watches documents as they are encoded; :meth:`check` refuses them when their masks cannot be meant."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._documents = self._tokens = self._trained_tokens = 0
        self._turns = self._ended_turns = 0
        self._untrained: _Sample | None = None
        self._open: _Sample | None = None

    def observe(self, encoded: Encoded, place: str) -> None:
        """Count one document; ``place`` names its example."""
        trained = int(encoded.trained.sum())
        self._documents += 1
        self._tokens += encoded.ids.size
        self._trained_tokens += trained
        self._turns += encoded.turns
        self._ended_turns += encoded.ended_turns
        if not trained and self._untrained is None:
            self._untrained = _Sample(place, encoded)
        if encoded.ended_turns < encoded.turns and self._open is None:
            self._open = _Sample(place, encoded)

    def check(self) -> None:
        """Raise DataError, with one example token by token, when nothing is trained or no turn's end is."""
        if self._untrained is not None and not self._trained_tokens:
            raise DataError(
                f"{self._untrained.place}: 0 of {self._tokens:,} tokens in {self._documents:,} examples are trained; "
                "check data.train_on, the roles and the loss weights of the messages\n" + self._shown(self._untrained)
            )
        if self._open is not None and not self._ended_turns:
            raise DataError(
                f"{self._open.place}: the end of {self._turns:,} trained turns is not trained, so that the model would "
                "never stop; set packing.separator: eos, or a data.chat_template that ends its turns\n"
                + self._shown(self._open)
            )

    def _shown(self, sample: _Sample) -> str:
        """The last tokens of an example, one a line: position, id, text; a star marks what is trained."""
        ids, trained = sample.encoded.ids, sample.encoded.trained
        first = max(0, ids.size - TOKENS_SHOWN)
        texts = (self._tokenizer.decode([int(one)], clean_up_tokenization_spaces=False) for one in ids[first:])
        lines = [
            f"  {'*' if trained[position] else ' '} {position:>6} {int(ids[position]):>7}  {text!r}"
            for position, text in enumerate(texts, first)
        ]
        return "\n".join([f"  trained (*), position, id, text of its last {ids.size - first} tokens:", *lines])
