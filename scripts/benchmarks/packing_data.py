"""What is packed in a measurement: lengths, documents on disk, and examples; real where the material is there.

Legend: N documents, K tokens of all documents.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    Lengths = NDArray[np.int64]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOKENIZER = "tokenizers/qwen2"
ALPACA = "data/alpaca_data.json"
ALPACA_LENGTHS = "data/alpaca_lengths.npy"
BOOKS = ("data/war_and_peace_2600-0.txt", "data/ru_crime_and_punishment.txt")
VOCABULARY = 150_000
DOCUMENTS_AT_ONCE = 1000
LONGEST_PROMPT = 200
WORDS = ("the", "red", "kite", "garden", "Tom", "found", "a", "on", "Monday", "and", "what", "is", "it", "then", "tell")


def find_material(asked: str | None) -> Path | None:
    """The folder of real material: as asked, $TRAINKIT_MATERIAL, or `shared` beside the repository; None without."""
    folder = Path(asked or os.environ.get("TRAINKIT_MATERIAL") or REPOSITORY.parent / "shared")
    return folder if folder.is_dir() else None


@dataclass(frozen=True)
class LengthSet:
    """Lengths of documents and what they are, in words."""

    name: str
    lengths_N: Lengths


def alpaca_lengths(material: Path | None, most: int) -> LengthSet:
    """Alpaca's 52,002 (Qwen tokenizer), or as many drawn from a log-normal with their mean and spread."""
    import numpy as np

    if material is not None and (material / ALPACA_LENGTHS).is_file():
        lengths_N = np.load(material / ALPACA_LENGTHS).astype(np.int64)[:most]
        return LengthSet(f"{lengths_N.size:,} documents of Alpaca, Qwen tokenizer", lengths_N)
    drawn = np.random.default_rng(0).lognormal(4.52, 0.46, min(most, 52_002))
    lengths_N = drawn.astype(np.int64).clip(1, 2048)
    return LengthSet(f"{lengths_N.size:,} lengths drawn to stand in for Alpaca's", lengths_N)


def long_tailed_lengths(documents: int) -> LengthSet:
    """Log-normal: half of the documents have up to 334 tokens, one in twenty more than 2,000."""
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(5.81, 1.1, documents)
    lengths_N = np.maximum(drawn.astype(np.int64), 1)
    return LengthSet(f"{documents:,} documents, lengths log-normal (5.81, 1.1)", lengths_N)


def write_documents(lengths_N: Lengths, folder: Path) -> None:
    """A store of documents with drawn tokens and a masked prompt in each, as `trainkit pack-data` leaves one."""
    import numpy as np

    from trainkit.data.packed_store import DocumentBatch, DocumentWriter
    from trainkit.data.sealed_folder import building

    rng = np.random.default_rng(0)
    with building(folder, "documents", folder.name) as builder:
        writer = DocumentWriter(builder)
        for first in range(0, lengths_N.size, DOCUMENTS_AT_ONCE):
            some_N = lengths_N[first : first + DOCUMENTS_AT_ONCE]
            numbers_N = np.arange(first, first + some_N.size)
            begins_N = np.cumsum(some_N) - some_N
            within_K = np.arange(int(some_N.sum())) - np.repeat(begins_N, some_N)
            prompt_N = np.minimum(some_N // 4, LONGEST_PROMPT)
            batch = DocumentBatch(
                ids_K=rng.integers(0, VOCABULARY, within_K.size, np.int32),
                trained_K=within_K >= np.repeat(np.maximum(prompt_N, 1), some_N),
                lengths_N=some_N,
                separators_N=np.ones(some_N.size, np.bool_),
                has_prompt_N=np.zeros(some_N.size, np.bool_),
                source=0,
                examples_N=numbers_N,
                digests_N=numbers_N.astype(np.uint64),
                places=[f"drawn:{number}" for number in numbers_N.tolist()],
            )
            writer.append_many(batch)
        writer.finish({"sources": []})


def write_arrow(documents: Path, file: Path) -> None:
    """The ids of a store as a file of `datasets`: one column, int32, a thousand documents a record batch."""
    import pyarrow as pa

    from trainkit.data.packed_store import Documents

    store = Documents.open(documents)
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(store), 1000):
            offsets = store.offsets_N[first : first + 1001]
            ids = pa.array(store.tokens_K[int(offsets[0]) : int(offsets[-1])])
            column = pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype("int32")), ids)
            writer.write_batch(pa.record_batch([column], schema=schema))


@dataclass(frozen=True)
class ExampleSet:
    """A file of examples, the tokenizer for it, and both in words."""

    name: str
    file: Path
    tokenizer: str


def alpaca_examples(material: Path | None, folder: Path, most: int) -> ExampleSet:
    """Alpaca with the Qwen tokenizer, or as many drawn examples with the shipped model's."""
    if material is not None and (material / ALPACA).is_file():
        examples = json.loads((material / ALPACA).read_text())[:most]
        name, tokenizer = f"{len(examples):,} examples of Alpaca, Qwen tokenizer", str(material / TOKENIZER)
    else:
        examples = list(_drawn_examples(most))
        name, tokenizer = f"{most:,} examples of drawn words, the shipped model's tokenizer", "tiny"
    file = folder / "examples.json"
    file.write_text(json.dumps(examples))
    return ExampleSet(name, file, tokenizer)


def _drawn_examples(number: int) -> Iterator[dict[str, str]]:
    import random

    draw = random.Random(0)
    for index in range(number):
        asked, answered = draw.choices(WORDS, k=draw.randint(4, 30)), draw.choices(WORDS, k=draw.randint(4, 90))
        yield {"instruction": f"{index}: {' '.join(asked)}", "input": "", "output": " ".join(answered)}


def write_prompts_and_completions(examples: Path, file: Path) -> None:
    """The same examples as TRL takes them: prompt and completion, each a list of messages, as trainkit reads them."""
    from trainkit.data.conversations import Conversation, parse
    from trainkit.data.formats import recognise
    from trainkit.data.sources import read_source
    from trainkit.recipe.schema import Source

    source = Source(path=str(examples))
    read = list(read_source(source))
    recognised = recognise(source, read[:100])

    def messages(part: Any) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in part]

    with file.open("w") as out:
        for parsed in (parse(example, recognised) for example in read):
            if isinstance(parsed, Conversation):  # what is left out here is dropped by trainkit too
                *prompt, answer = parsed.messages
                out.write(json.dumps({"prompt": messages(prompt), "completion": messages([answer])}) + "\n")
