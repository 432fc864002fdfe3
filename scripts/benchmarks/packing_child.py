"""One measurement in a process of its own: ``python -m benchmarks.packing_child TASK``; see :func:`main`.

A process a measurement, so that nobody pays for another's imports and the peak of memory is the measured work's own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import packing_data, packing_peers
from trainkit.recipe.schema import Data, Model, Packing, Recipe, Source, Training

if TYPE_CHECKING:
    from collections.abc import Callable

ENOUGH_SECONDS = 2.0
MOST_RUNS = 7


def main() -> None:
    """Do the task, a JSON object {"measure": name of a function here, ...its arguments}, and print what it found.

    Whatever libraries print goes to standard error.
    """
    out = os.dup(1)
    os.dup2(2, 1)
    task = json.loads(sys.argv[1])
    found = MEASURES[task.pop("measure")](**task)
    with os.fdopen(out, "w") as file:
        json.dump(found, file)


def assign(peer: str | None, peers: str, lengths: str, capacity: int) -> dict[str, Any]:
    """Rows and seconds of one packer, trainkit's without ``peer``."""
    import numpy as np

    lengths_P = np.load(lengths)
    if peer is None:
        from trainkit.data.packing import best_fit

        return _timed(lambda: {"rows": len(best_fit(lengths_P, capacity, seed=0))})
    chosen = next(one for one in packing_peers.PEERS if one.name == peer)
    pack = chosen.ready(Path(peers) / chosen.folder, lengths_P, capacity)
    return _timed(lambda: {"rows": pack()})


def write_documents(lengths: str, folder: str) -> dict[str, Any]:
    """A store on disk."""
    import numpy as np

    return _timed(lambda: packing_data.write_documents(np.load(lengths), Path(folder)), runs=1)


def write_arrow(documents: str, file: str) -> dict[str, Any]:
    """A store's ids as a file of ``datasets``."""
    return _timed(lambda: packing_data.write_arrow(Path(documents), Path(file)), runs=1)


def pack_documents(documents: str, sequence_length: int, overlap: int) -> dict[str, Any]:
    """The whole packing step of trainkit: from a store's documents to an index of rows on disk, checked and synced."""
    import numpy as np

    from trainkit.data.packed_store import Documents, write_rows
    from trainkit.data.row_plan import Selection, plan_rows
    from trainkit.data.sealed_folder import building

    packing = Packing(sequence_length=sequence_length, overlap=overlap)

    def pack() -> dict[str, Any]:
        store = Documents.open(Path(documents))
        selection = Selection((Source(path="drawn"),), 0, np.arange(len(store)), {})
        rows = plan_rows(store, selection, packing, seed=0)
        with building(Path(documents) / "rows" / "rows", "rows", "rows", replace=True) as builder:
            write_rows(builder, {"train": rows}, "[]", {"sentences": []})
        ledger = rows.ledger
        return _rows_and_tokens(ledger.rows, ledger.read, ledger.read - ledger.trained - ledger.masked, ledger.overlap)

    return _timed(pack)


def trl_pack(peers: str, file: str, capacity: int, strategy: str, processes: int | None) -> dict[str, Any]:
    """TRL's packing step: from a file of ``datasets`` to another."""
    sys.path.insert(0, str(Path(peers) / packing_peers.TRL.folder))
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_file(file)
    tokens = _tokens_of(dataset, "input_ids")

    with tempfile.TemporaryDirectory() as folder:
        options = {"num_proc": processes, "cache_file_name": f"{folder}/packed.arrow"}

        def pack() -> dict[str, Any]:
            packed = pack_dataset(dataset, capacity, strategy, options)
            return _rows_and_tokens(len(packed), tokens, tokens - _tokens_of(packed, "input_ids"), 0)

        return _timed(pack, runs=1)


def prepare(
    examples: str, tokenizer: str, sequence_length: int, overlap: int = 64, *, loading: bool = False
) -> dict[str, Any]:
    """Our own way from a file of examples to rows on disk, by the function that pack-data and fine-tune call.

    The tokenizer is loaded before the time is taken, gigatoken's tables of it too unless ``loading`` is measured.
    """
    from trainkit.data import preparation
    from trainkit.data.encoding import Encoder
    from trainkit.model.loading import load_tokenizer, locate_model

    recipe = Recipe(
        model=Model(name=tokenizer),
        data=Data(train=(Source(path=examples),), max_dropped=1.0),
        packing=Packing(sequence_length=sequence_length, overlap=overlap),
        training=Training(epochs=1.0),
        output_dir="runs/packing",
    )
    loaded = load_tokenizer(locate_model(recipe.model))
    with tempfile.TemporaryDirectory() as cache:
        known = Encoder(loaded, recipe.data, recipe.packing)
        if not loading:
            _ = known.fast

        def pack() -> dict[str, Any]:
            encoder = Encoder(loaded, recipe.data, recipe.packing) if loading else known
            ledger = preparation.prepare(recipe, encoder, Path(cache), lambda *_: None, anew=True).train.ledger
            lost = sum(ledger.dropped.values()) + ledger.truncated
            found = _rows_and_tokens(ledger.rows, ledger.tokens - ledger.overlap, lost, ledger.overlap)
            return found | {"trained_tokens": ledger.trained_targets}

        return _timed(pack)


def trl_prepare(
    peers: str, examples: str, tokenizer: str, sequence_length: int, processes: int | None
) -> dict[str, Any]:
    """TRL from a file of prompts and completions to rows on disk, by SFTTrainer's own preparation."""
    sys.path.insert(0, str(Path(peers) / packing_peers.TRL.folder))
    import datasets
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from trainkit.data.batches import NOT_A_TARGET
    from trainkit.model.loading import load_tokenizer, locate_model

    datasets.disable_progress_bars()
    loaded = load_tokenizer(locate_model(Model(name=tokenizer)))
    tiny = LlamaConfig(
        vocab_size=len(loaded), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    seconds: list[float] = []

    class Timed(SFTTrainer):  # type: ignore[misc]
        """Takes the time of the preparation alone: a trainer does other things when it is made."""

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return prepared

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        dataset = datasets.load_dataset("json", data_files=examples, split="train", cache_dir=folder)
        seconds.append(time.perf_counter() - started)
        arguments = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=sequence_length,
            dataset_num_proc=processes,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = Timed(model=LlamaForCausalLM(tiny), args=arguments, train_dataset=dataset, processing_class=loaded)
        rows = trainer.train_dataset
        tokens = _tokens_of(rows, "input_ids")
        labels = rows.data.column("labels").combine_chunks().flatten()
        trained = int(np.count_nonzero(labels.to_numpy() != NOT_A_TARGET))
        found = _rows_and_tokens(len(rows), tokens, 0, 0)
    return found | {"trained_tokens": trained, "seconds": sum(seconds), "runs": 1}


def _rows_and_tokens(rows: int, tokens: int, lost: int, overlap: int) -> dict[str, Any]:
    return {"rows": rows, "tokens": tokens, "lost_tokens": lost, "overlap_tokens": overlap}


def _tokens_of(dataset: Any, column: str) -> int:
    import pyarrow.compute as pc

    return sum(int(pc.sum(pc.list_value_length(chunk)).as_py()) for chunk in dataset.data.column(column).chunks)


def _timed(work: Callable[[], dict[str, Any] | None], runs: int = MOST_RUNS) -> dict[str, Any]:
    """What ``work`` found, and the least time it took: in ``runs`` runs, or fewer when they take long."""
    taken: list[float] = []
    found: dict[str, Any] | None = None
    while len(taken) < runs and sum(taken) < ENOUGH_SECONDS:
        started = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - started)
    return (found or {}) | {"seconds": min(taken), "runs": len(taken)}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (assign, write_documents, write_arrow, pack_documents, trl_pack, prepare, trl_prepare)
}

if __name__ == "__main__":
    main()
