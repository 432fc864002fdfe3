"""``trainkit inspect-data``: what a recipe's data becomes, token by token, and which of its tokens are trained."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainkit.console import Console
from trainkit.data.conversations import Dropped, parse
from trainkit.data.encoding import Encoded, Encoder, show_tokens
from trainkit.data.formats import recognise
from trainkit.data.mask_gate import MaskGate
from trainkit.data.sources import read_source
from trainkit.errors import DataError
from trainkit.model.loading import load_tokenizer, locate_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trainkit.data.conversations import ParsedExample
    from trainkit.data.formats import Recognised
    from trainkit.data.sources import Example
    from trainkit.recipe.reader import ReadRecipe
    from trainkit.recipe.schema import Source

LOOKED_AT = 100
"""Examples from which a source's format is recognised."""
ENCODED_AT_ONCE = 256
TOKENS_SHOWN = 2000


@dataclass
class SourceCounts:
    """What one source holds; lengths in tokens."""

    path: str
    sentence: str
    examples: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    longest_place: str = ""
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, encoded: Encoded, place: str) -> None:
        """Add one document."""
        self.documents += 1
        self.tokens += encoded.ids.size
        self.trained_tokens += int(encoded.trained.sum())
        if encoded.ids.size > self.longest:
            self.longest, self.longest_place = encoded.ids.size, place
        if not encoded.trained.any():
            self.dropped["no trained token"] += 1

    @property
    def trained_share(self) -> float:
        """Share of the tokens that are trained."""
        return self.trained_tokens / max(1, self.tokens)


def inspect_data(read: ReadRecipe, *, examples: int, json_output: bool) -> None:
    """Show the first ``examples`` of each source with what is trained highlighted, then counts over all of them.

    Reads and encodes everything, so that a bad example anywhere is found. Raises DataError and ModelError as a run
    would.
    """
    recipe = read.recipe
    with Console(json_only=json_output) as console:
        tokenizer = load_tokenizer(locate_model(recipe.model))
        encoder = Encoder(tokenizer, recipe.data, recipe.packing)
        held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
        counts, gates, shown = [], [], []
        for source in (*recipe.data.train, *held_out):
            recognised, found = _open(source)
            console.show(recognised.sentence)
            counted, gate = SourceCounts(source.path, recognised.sentence), MaskGate(tokenizer)
            for index, (place, encoded) in enumerate(_encoded(found, recognised, encoder, counted, console)):
                counted.count(encoded, place)
                gate.observe(encoded, place)
                if index < examples:
                    shown.append(_show(console, place, encoded, encoder))
            counts.append(counted)
            gates.append(gate)
        _show_counts(console, counts)
        for gate in gates:
            gate.check()
        console.result({"sources": [_as_json(one) for one in counts], "examples": shown})


def _open(source: Source) -> tuple[Recognised, Iterator[Example]]:
    """What a source is recognised as, and its examples from the first on."""
    found = read_source(source)
    first = list(itertools.islice(found, LOOKED_AT))
    if not first:
        raise DataError(f"{source.path}: 0 examples")
    return recognise(source, first), itertools.chain(first, found)


def _encoded(
    found: Iterable[Example], recognised: Recognised, encoder: Encoder, counted: SourceCounts, console: Console
) -> Iterator[tuple[str, Encoded]]:
    """Every document that holds a token, with the place of its example; what is dropped is counted."""
    waiting: list[tuple[ParsedExample, str]] = []
    for example in found:
        counted.examples += 1
        parsed = parse(example, recognised)
        if isinstance(parsed, Dropped):
            counted.dropped[parsed.reason] += 1
        else:
            waiting.append((parsed, example.place))
        if len(waiting) == ENCODED_AT_ONCE:
            yield from _encode(encoder, waiting, counted)
            console.progress(f"encoding {counted.path}", counted.examples)
            waiting = []
    yield from _encode(encoder, waiting, counted)


def _encode(
    encoder: Encoder, examples: list[tuple[ParsedExample, str]], counted: SourceCounts
) -> Iterator[tuple[str, Encoded]]:
    for (_, place), encoded in zip(examples, encoder.encode_many(examples), strict=True):
        if encoded.ids.size:
            yield place, encoded
        else:
            counted.dropped["no tokens"] += 1


def _show(console: Console, place: str, encoded: Encoded, encoder: Encoder) -> dict[str, Any]:
    """Print one example; returns it for ``--json``."""
    spans = show_tokens(encoded, encoder.tokenizer, TOKENS_SHOWN)
    trained = int(encoded.trained.sum())
    console.show()
    console.show(f"{place}: {encoded.ids.size:,} tokens, {trained:,} trained")
    console.highlight(spans)
    if encoded.ids.size > TOKENS_SHOWN:
        console.show(f"... and {encoded.ids.size - TOKENS_SHOWN:,} tokens more")
    return {
        "place": place,
        "tokens": encoded.ids.size,
        "trained_tokens": trained,
        "spans": [{"text": text, "trained": is_trained} for text, is_trained in spans],
    }


def _show_counts(console: Console, counts: list[SourceCounts]) -> None:
    console.show()
    console.table(
        "",
        ["source", "examples", "documents", "tokens", "trained", "share", "longest", "dropped"],
        [
            [
                one.path,
                one.examples,
                one.documents,
                one.tokens,
                one.trained_tokens,
                f"{one.trained_share:.1%}",
                one.longest,
                ", ".join(f"{reason}: {number:,}" for reason, number in one.dropped.items()) or "none",
            ]
            for one in counts
        ],
    )


def _as_json(one: SourceCounts) -> dict[str, Any]:
    return {
        "path": one.path,
        "recognised": one.sentence,
        "examples": one.examples,
        "documents": one.documents,
        "tokens": one.tokens,
        "trained_tokens": one.trained_tokens,
        "trained_share": one.trained_share,
        "longest_tokens": one.longest,
        "longest_place": one.longest_place,
        "dropped": dict(one.dropped),
    }
