"""``trainkit pack-data``: the rows that a run would train on, made or found again, and how well they are packed."""

from __future__ import annotations

import os
import re
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.console import Console
from trainkit.data.encoding import Encoder
from trainkit.data.packing_figure import FIGURE_INCHES, draw_packing
from trainkit.data.packing_quality import packing_quality, padding_share
from trainkit.data.parquet_rows import SUFFIX, check_ours, files_in, write_rows_files
from trainkit.data.preparation import default_cache, prepare
from trainkit.data.row_plan import TOO_LONG
from trainkit.data.sealed_folder import CONDEMNED, MANIFEST, TEMPORARY_PREFIX
from trainkit.errors import MachineError, ModelError, Stopped, UsageError
from trainkit.model.checking import CONFIG_FILE, read_config
from trainkit.model.loading import code_of_tokenizer, load_tokenizer, locate_model
from trainkit.plotting import check_plot_path, new_figure, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from trainkit.data.ledger import Ledger
    from trainkit.data.packed_store import PackedRows, Part
    from trainkit.data.packing_quality import LengthBand, PackingQuality
    from trainkit.data.preparation import PreparedData, Progress
    from trainkit.model.locating import ModelLocation
    from trainkit.model.trusted_code import Trust
    from trainkit.recipe.reader import ReadRecipe

Form = Literal["store", "parquet"]
SECONDS_SHOWN = 0.005
"""A person reads two decimals; ``--json`` has every stage."""


@dataclass(frozen=True)
class Wanted:
    """What is to be made besides the report: where the rows go (None: into the cache), in which form, and a picture."""

    output: Path | None = None
    form: Form = "store"
    plot: Path | None = None


def pack_data(
    read: ReadRecipe,
    *,
    trust: Trust | None = None,
    output: Path | None,
    form: Form,
    plot: Path | None,
    force: bool,
    json_output: bool,
) -> None:
    """Prepare the data of the recipe as ``fine-tune`` does, and report; ``force`` makes it anew where it is there.

    Reads the tokenizer and no weights. Raises UsageError for an output that is not ours, before anything is read, and
    DataError, ModelError and MachineError as a run would. Stopped on Ctrl+C: nothing half is left then.
    """
    wanted = Wanted(output, form, plot)
    _check_wanted(wanted)
    recipe = read.recipe
    with Console(json_only=json_output) as console:
        clock = StageClock(console.progress)
        with _interruption_said(clock):
            location = _locate(read, trust)
            beyond = _beyond_positions(location, recipe.packing.sequence_length)
            if beyond:
                console.warn(beyond)
            tokenizer = load_tokenizer(location)
            if sentence := code_of_tokenizer(location, tokenizer):
                console.show(sentence)
            encoder = Encoder(tokenizer, recipe.data, recipe.packing)
            clock.end("tokenizer")
            root = wanted.output if wanted.output is not None and wanted.form == "store" else default_cache()
            data = prepare(recipe, encoder, root, clock.progress, anew=force)
            clock.end("opening")
            data.train.ledger.check()
            quality = packing_quality(data.train)
            made = _write_files(wanted, data, quality, clock, force=force)
        _show(console, read, data, quality, made, clock.seconds())
        console.result(_as_json(data, quality, made, clock.seconds()))


def _locate(read: ReadRecipe, trust: Trust | None) -> ModelLocation:
    """Where the tokenizer lies; what is wrong with it is said of the option that named it."""
    try:
        return locate_model(read.recipe.model, trust)
    except ModelError as error:
        origin = read.origins["model.name"]
        if origin != "--tokenizer":
            raise
        raise ModelError(str(error).replace("model.name", origin)) from error


def _beyond_positions(location: ModelLocation, sequence_length: int) -> str | None:
    """What to know where the tokenizer's model cannot be trained on such rows; a tokenizer may lie without a model."""
    if not (location.folder / CONFIG_FILE).is_file():
        return None
    config = read_config(location.folder)
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings")
    if not isinstance(positions, int) or sequence_length <= positions:
        return None
    return (
        f"packing.sequence_length: {sequence_length:,} is beyond the {positions:,} positions of {location.name} "
        "(max_position_embeddings): fine-tune will refuse these rows"
    )


@contextmanager
def _interruption_said(clock: StageClock) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted during {clock.stage}; nothing half is left, and the same command goes on from what was "
            "complete",
            by_keyboard=True,
        ) from None


# --- what is written -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What was written besides the store: parquet files, whether each was there before, and the picture."""

    parquet: Mapping[Part, Path]
    kept: Mapping[Part, bool]
    plot: Path | None


def _check_wanted(wanted: Wanted) -> None:
    """Refuse what cannot be written, or must not be, before any work is done."""
    if wanted.plot is not None:
        check_plot_path(wanted.plot)
    output = wanted.output
    if output is None:
        if wanted.form == "parquet":
            raise UsageError("--format parquet: needs --output, a folder or a file that ends in .parquet")
        return
    if wanted.form == "store":
        if output.suffix == SUFFIX:
            raise UsageError(
                f"--output: {output} is the name of a parquet file; add --format parquet, or name a folder"
            )
        _check_store_root(output)
    else:
        if output.suffix != SUFFIX and os.path.lexists(output) and not output.is_dir():
            raise UsageError(f"--output: {output} is a file; name a new folder, or a file that ends in {SUFFIX}")
        for path in files_in(output).values():
            check_ours(path)
    _check_can_be_made(output)


def _check_store_root(output: Path) -> None:
    if os.path.lexists(output) and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; name a new folder")
    for entry in sorted(output.iterdir()) if output.is_dir() else []:
        marked = any((entry / name).is_file() for name in (MANIFEST, CONDEMNED))
        ours = marked and re.fullmatch("[0-9a-f]{32}", entry.name)
        if not ours and not entry.name.startswith(TEMPORARY_PREFIX):
            raise UsageError(
                f"--output: {output} holds {entry.name}, which trainkit did not write; name a new or an empty folder"
            )


def _check_can_be_made(output: Path) -> None:
    above = output
    while not os.path.lexists(above):
        above = above.parent
    if above != output and not above.is_dir():
        raise UsageError(f"--output: {output} cannot be made: {above} is a file")
    if not os.access(above if above.is_dir() else above.parent, os.W_OK):
        raise MachineError(f"--output: {output} cannot be written: no permission in {above}")


def _write_files(
    wanted: Wanted, data: PreparedData, quality: PackingQuality, clock: StageClock, *, force: bool
) -> Made:
    """The parquet files and the picture, where they are asked for."""
    files: dict[Part, Path] = {}
    kept: dict[Part, bool] = {}
    if wanted.form == "parquet":
        assert wanted.output is not None
        parts: dict[Part, PackedRows] = {"train": data.train}
        if data.evaluation is not None:
            parts["evaluation"] = data.evaluation
        places = files_in(wanted.output)
        kept = write_rows_files(places, parts, data.key, clock.progress, replace=force)
        files = {part: places[part] for part in parts}
    if wanted.plot is not None:
        figure = new_figure(*FIGURE_INCHES)
        draw_packing(figure, data.train, _layouts(data.train.ledger, quality))
        save(figure, wanted.plot, "how the documents are packed")
    clock.end("writing")
    return Made(files, kept, wanted.plot)


STAGES = ("tokenizer", "checking", "encoding", "packing", "opening", "writing")
"""What takes time: loading the tokenizer; reading the data files for the key; reading, tokenising and writing the
documents; planning and writing the rows; checking what was found again and mapping it; parquet and picture."""


class StageClock:
    """Passes progress on, and keeps how long each stage took.

    A stage speaks when it begins with nothing done, and then of what is done: the time before its first word belongs
    to the stage that spoke before, every other to itself. ``stage`` is the one that spoke last.
    """

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress = on_progress
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self.stage = STAGES[0]
        self._started = self._counted_until = time.perf_counter()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """Fits every ``on_progress``. The sources of one recipe are encoded in one stage."""
        name = stage.partition(" ")[0]
        if done:
            self.end(name)
        else:
            self.end(self.stage)
            self.stage = name
        self._on_progress(stage, done, total)

    def end(self, stage: str) -> None:
        """What passed since the last word was spent on ``stage``."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._counted_until
        self._counted_until, self.stage = now, stage

    def seconds(self) -> dict[str, float]:
        """Seconds by stage (0 for one that was not needed), and their sum as ``total``."""
        return {**self._seconds, "total": self._counted_until - self._started}


# --- what is said --------------------------------------------------------------------------------------------------


def _show(
    console: Console,
    read: ReadRecipe,
    data: PreparedData,
    quality: PackingQuality,
    made: Made,
    seconds: dict[str, float],
) -> None:
    ledger, packing = data.train.ledger, read.recipe.packing
    for line in (*data.sentences, "", *ledger.lines(sources=False), ""):
        console.show(line)
    if len(ledger.sources) > 1:
        _show_sources(console, ledger)
    _show_layouts(console, ledger, quality)
    console.show(_rows_line(ledger, quality))
    console.show(_long_documents_line(_long_documents(data.train), ledger))
    console.show(_attention_line(quality, isolated=packing.isolate_documents))
    console.show()
    console.bars("documents by length in tokens", [_labelled(band) for band in quality.length_bands])
    console.show()
    for part, path in made.parquet.items():
        console.show(f"parquet: {part} rows {'found again' if made.kept[part] else 'written'} in {path}")
    if made.plot is not None:
        console.show(f"plot: {made.plot}")
    spent = (f"{stage} {taken:.2f}" for stage, taken in seconds.items() if taken >= SECONDS_SHOWN)
    console.show(f"seconds: {', '.join(spent)}")


def _show_sources(console: Console, ledger: Ledger) -> None:
    weights = [source.weight for source in ledger.sources]
    total = sum(weight or 0 for weight in weights)
    console.table(
        "sources, by trained tokens",
        ["source", "documents", "trained", "wanted", "share", "passes"],
        [
            [
                source.path,
                source.documents,
                source.trained_tokens,
                "-" if source.weight is None else f"{source.weight / total:.2%}",
                f"{source.share:.2%}",
                f"{source.passes:.2f}",
            ]
            for source in ledger.sources
        ],
    )
    console.show()


@dataclass(frozen=True)
class LongDocuments:
    """Documents in the rows that are longer than one, and their pieces there."""

    documents: int
    pieces: int


def _long_documents(rows: PackedRows) -> LongDocuments:
    document_P, offsets_N = rows.plan.pieces.document_P, rows.documents.offsets_N
    long_P = offsets_N[document_P + 1] - offsets_N[document_P] > rows.sequence_length
    return LongDocuments(int(np.unique(document_P[long_P]).size), int(np.count_nonzero(long_P)))


def _long_documents_line(long: LongDocuments, ledger: Ledger) -> str:
    """What became of documents that are longer than a row."""
    read = ledger.read + ledger.repeated
    if dropped := ledger.examples_dropped.get(TOO_LONG, 0):
        lost = ledger.dropped.get(TOO_LONG, 0)
        return f"long documents: {dropped:,} dropped, {lost / read:.2%} of the tokens read ({lost:,})"
    if not long.documents:
        return f"long documents: none is longer than a row of {ledger.sequence_length:,}"
    longer = f"long documents: {long.documents:,} of {ledger.documents:,}"
    if ledger.truncated:
        return f"{longer} truncated, {ledger.truncated / read:.2%} of the tokens read ({ledger.truncated:,})"
    return f"{longer}, in {long.pieces:,} pieces; overlap adds {ledger.overlap / read:.2%} ({ledger.overlap:,} tokens)"


def _padding_before(ledger: Ledger, quality: PackingQuality) -> dict[str, float]:
    """Share of padding in the layouts that packing is compared with."""
    batches = {f"batches_of_{size}": slots for size, slots in quality.slots_in_batches.items()}
    layouts = {"to_sequence_length": quality.slots_to_context, **batches}
    return {name: padding_share(ledger.tokens, slots) for name, slots in layouts.items()}


def _layouts(ledger: Ledger, quality: PackingQuality) -> list[tuple[str, float]]:
    """The packed rows and what they are compared with, as (name, slots)."""
    return [
        ("packed", quality.packed_slots),
        *((f"padded, random batches of {size}", slots) for size, slots in quality.slots_in_batches.items()),
        (f"padded to {ledger.sequence_length:,}", quality.slots_to_context),
    ]


def _show_layouts(console: Console, ledger: Ledger, quality: PackingQuality) -> None:
    console.table(
        "",
        ["layout", "slots", "padding", "slots per packed slot"],
        [
            [name, round(slots), f"{padding_share(ledger.tokens, slots):.2%}", f"{slots / quality.packed_slots:.2f}"]
            for name, slots in _layouts(ledger, quality)
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


def _as_json(data: PreparedData, quality: PackingQuality, made: Made, seconds: dict[str, float]) -> dict[str, Any]:
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
        "long_documents": asdict(_long_documents(data.train)),
        "ledger": ledger.to_json(),
        "evaluation_ledger": data.evaluation.ledger.to_json() if data.evaluation else None,
        "seconds": seconds,
        "found_again": data.found_again,
        "output": str(data.folder),
        "parquet": {part: str(path) for part, path in made.parquet.items()} or None,
        "plot": None if made.plot is None else str(made.plot),
    }
