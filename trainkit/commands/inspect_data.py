"""``trainkit inspect-data``: what a recipe's data becomes, token by token, and which of its tokens are trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.console import Console
from trainkit.data.bulk_encoding import fast_or_by_reference
from trainkit.data.document_stream import encoded_blocks, recognised_source
from trainkit.data.encoding import Encoded, Encoder, show_tokens
from trainkit.data.mask_gate import MaskGate
from trainkit.model.loading import code_of_tokenizer, load_tokenizer, locate_model

if TYPE_CHECKING:
    from trainkit.data.bulk_encoding import BulkEncoder
    from trainkit.data.document_stream import EncodedBlock
    from trainkit.model.trusted_code import Trust
    from trainkit.recipe.reader import ReadRecipe
    from trainkit.recipe.schema import Source

TOKENS_SHOWN = 2000


@dataclass
class SourceCounts:
    """What one source holds; lengths in tokens. ``first`` are its first documents, with their places."""

    path: str
    sentence: str
    gate: MaskGate
    examples: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    longest_place: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, Encoded]] = field(default_factory=list)

    def count(self, block: EncodedBlock, kept: int) -> None:
        """Add the documents of a block, and keep those that are among the first ``kept``."""
        documents = block.documents
        self.gate.observe(block)
        self.examples += block.examples_read
        self.dropped.update(reason for reason, _ in block.dropped)
        if not documents.places:
            return
        trained_N = documents.targets_N
        self.documents += len(documents.places)
        self.tokens += documents.ids_K.size
        self.trained_tokens += int(trained_N.sum())
        if untrained := int(np.count_nonzero(trained_N == 0)):
            self.dropped["no trained token"] += untrained
        at = int(np.argmax(documents.lengths_N))
        if documents.lengths_N[at] > self.longest:
            self.longest, self.longest_place = int(documents.lengths_N[at]), documents.places[at]
        for number in range(min(kept - len(self.first), len(documents.places))):
            self.first.append((documents.places[number], Encoded(*documents.document(number))))

    @property
    def trained_share(self) -> float:
        """Share of the tokens that are trained."""
        return self.trained_tokens / max(1, self.tokens)


def inspect_data(read: ReadRecipe, *, trust: Trust | None = None, examples: int, json_output: bool) -> None:
    """Show the first ``examples`` of each source with what is trained highlighted, then counts over all of them.

    Reads and encodes everything, so that a bad example anywhere is found. Raises DataError and ModelError as a run
    would.
    """
    recipe = read.recipe
    with Console(json_only=json_output) as console:
        location = locate_model(recipe.model, trust)
        tokenizer = load_tokenizer(location)
        if sentence := code_of_tokenizer(location, tokenizer):
            console.show(sentence)
        encoder = Encoder(tokenizer, recipe.data, recipe.packing)
        held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
        sources = (*recipe.data.train, *held_out)
        seen, how = fast_or_by_reference(
            encoder, lambda bulk: [_seen(source, bulk, examples, console) for source in sources]
        )
        shown = []
        for one in seen:
            console.show(one.sentence)
            shown += [_show(console, place, encoded, encoder) for place, encoded in one.first]
        if how:
            console.note(how)
        _show_counts(console, seen)
        for one in seen:
            one.gate.check()
        console.result({"sources": [_as_json(one) for one in seen], "examples": shown})


def _seen(source: Source, bulk: BulkEncoder, examples: int, console: Console) -> SourceCounts:
    """Everything of a source counted, and its first ``examples`` kept."""
    recognised = recognised_source(source)
    counted = SourceCounts(source.path, recognised.sentence, MaskGate(bulk.tokenizer))
    for block in encoded_blocks(source, 0, recognised, bulk, console.note):
        counted.count(block, examples)
        console.progress(f"encoding {source.path}", counted.examples)
    console.progress(f"encoding {source.path}", counted.examples, counted.examples)
    return counted


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
