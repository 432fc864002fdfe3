"""``trainkit pack-data``: the rows that a run would train on, made or found again, and how well they are packed."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainkit.console import Console
from trainkit.data.encoding import Encoder
from trainkit.data.packing_quality import packing_quality, padding_share
from trainkit.data.preparation import default_cache, prepare
from trainkit.model.loading import load_tokenizer, locate_model

if TYPE_CHECKING:
    from trainkit.data.ledger import Ledger
    from trainkit.data.packing_quality import LengthBand, PackingQuality
    from trainkit.data.preparation import PreparedData, Progress
    from trainkit.recipe.reader import ReadRecipe


def pack_data(read: ReadRecipe, *, force: bool, json_output: bool) -> None:
    """Prepare the data of the recipe as ``fine-tune`` does, and report; ``force`` makes it anew where it is there.

    Reads the tokenizer and no weights. Raises DataError, ModelError and MachineError as a run would.
    """
    recipe = read.recipe
    with Console(json_only=json_output) as console:
        clock = StageClock(console.progress)
        tokenizer = load_tokenizer(locate_model(recipe.model))
        encoder = Encoder(tokenizer, recipe.data, recipe.packing)
        clock.end("tokenizer")
        data = prepare(recipe, encoder, default_cache(), clock.progress, anew=force)
        clock.end("opening")
        ledger, quality, seconds = data.train.ledger, packing_quality(data.train), clock.seconds()
        ledger.check()

        for line in (*data.sentences, "", *ledger.lines(), ""):
            console.show(line)
        _show_layouts(console, ledger, quality)
        for line in (_rows_line(ledger, quality), _attention_line(quality, isolated=recipe.packing.isolate_documents)):
            console.show(line)
        console.show()
        console.bars("documents by length in tokens", [_labelled(band) for band in quality.length_bands])
        console.show()
        console.show(f"seconds: {', '.join(f'{stage} {taken:.2f}' for stage, taken in seconds.items())}")
        console.result(_as_json(data, quality, seconds))


STAGES = ("tokenizer", "checking", "encoding", "packing", "opening")
"""What takes time: loading the tokenizer; reading the data files for the key; reading, tokenising and writing the
documents; planning and writing the rows; checking what was found again and mapping it."""


class StageClock:
    """Passes progress on, and keeps how long each stage took.

    A stage speaks when it begins with nothing done, and then of what is done: the time before its first word belongs
    to the stage that spoke before, every other to itself.
    """

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress = on_progress
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._stage = STAGES[0]
        self._started = self._counted_until = time.perf_counter()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Fits every ``on_progress``. The sources of one recipe are encoded in one stage."""
        name = stage.partition(" ")[0]
        if done:
            self.end(name)
        else:
            self.end(self._stage)
            self._stage = name
        self._on_progress(stage, done, total)

    def end(self, stage: str) -> None:
        """What passed since the last word was spent on ``stage``."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._counted_until
        self._counted_until, self._stage = now, stage

    def seconds(self) -> dict[str, float]:
        """Seconds by stage (0 for one that was not needed), and their sum as ``total``."""
        return {**self._seconds, "total": self._counted_until - self._started}


def _padding_before(ledger: Ledger, quality: PackingQuality) -> dict[str, float]:
    """Share of padding in the layouts that packing is compared with."""
    batches = {f"batches_of_{size}": slots for size, slots in quality.slots_in_batches.items()}
    layouts = {"to_sequence_length": quality.slots_to_context, **batches}
    return {name: padding_share(ledger.tokens, slots) for name, slots in layouts.items()}


def _show_layouts(console: Console, ledger: Ledger, quality: PackingQuality) -> None:
    layouts: list[tuple[str, float]] = [
        ("packed", quality.packed_slots),
        *((f"padded, random batches of {size}", slots) for size, slots in quality.slots_in_batches.items()),
        (f"padded to {ledger.sequence_length:,}", quality.slots_to_context),
    ]
    console.table(
        "",
        ["layout", "slots", "padding", "slots per packed slot"],
        [
            [name, round(slots), f"{padding_share(ledger.tokens, slots):.2%}", f"{slots / quality.packed_slots:.2f}"]
            for name, slots in layouts
        ],
    )


def _labelled(band: LengthBand) -> tuple[str, int]:
    """The label and the count of a bar."""
    only = band.shortest == band.longest
    return (f"{band.longest:,}" if only else f"{band.shortest:,}-{band.longest:,}", band.documents)


def _rows_line(ledger: Ledger, quality: PackingQuality) -> str:
    above = ledger.rows - quality.lower_bound_rows
    return (
        f"rows: {ledger.rows:,}, {ledger.fill:.2%} full; {above:,} above the {quality.lower_bound_rows:,} "
        "that the tokens need at least"
    )


def _attention_line(quality: PackingQuality, *, isolated: bool) -> str:
    share = quality.attention_isolated / quality.attention_whole_rows
    condition = "" if isolated else " if packing.isolate_documents were true"
    return (
        f"attention: {share:.1%} of the token pairs of whole rows remain{condition} "
        f"({quality.attention_isolated:,} of {quality.attention_whole_rows:,})"
    )


def _as_json(data: PreparedData, quality: PackingQuality, seconds: dict[str, float]) -> dict[str, Any]:
    ledger = data.train.ledger
    return {
        "documents": ledger.documents,
        "tokens": ledger.tokens,
        "trained_tokens": ledger.trained_targets,
        "rows": ledger.rows,
        "sequence_length": ledger.sequence_length,
        "lower_bound_rows": quality.lower_bound_rows,
        "fill": ledger.fill,
        "padding_waste_before": _padding_before(ledger, quality),
        "attention_pairs": {"whole_rows": quality.attention_whole_rows, "isolated": quality.attention_isolated},
        "document_lengths": {
            "longest": quality.longest_tokens,
            "median": quality.median_tokens,
            "histogram": [asdict(band) for band in quality.length_bands],
        },
        "ledger": ledger.to_json(),
        "evaluation_ledger": data.evaluation.ledger.to_json() if data.evaluation else None,
        "seconds": seconds,
        "found_again": data.found_again,
        "output": str(data.folder),
    }
