"""``scripts/bench scale --part packing``: packing by shards of the files, measured on one machine, and 10^9 documents.

What is measured: how fast examples become tokens, how much time and memory packing takes for a document, what it
costs to pack shards apart, and the merging of their histograms of lengths. The rest is multiplication.

Legend: N documents, P pieces, L lengths from 0 to the capacity.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import packing_data
from benchmarks.packing import OURS, OVERLAP, Bench
from trainkit.data.packing import _place_groups, best_fit, cut, lower_bound
from trainkit.errors import MachineError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.packing import Line
    from trainkit.data.packing import Int64

CAPACITY = 2048
ALL_DOCUMENTS = 10**9
MACHINES = (1, 10, 100, 1000)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    examples: int = 52_002
    few: int = 1_000_000
    many: int = 10_000_000
    together: int = 10_000_000
    shards: tuple[int, ...] = (10, 100, 1000, 10_000)
    histograms: int = 100


QUICK = Sizes(examples=500, few=2_000, many=20_000, together=20_000, shards=(2, 10), histograms=3)


@dataclass(frozen=True)
class Costs:
    """What a machine was measured to need; seconds and bytes for one document or token."""

    encoding_documents_per_second: float
    encoding_tokens_per_second: float
    packing_seconds: float
    memory_base_bytes: float
    memory_bytes: float
    store_bytes: float
    index_bytes: float
    token_bytes: float
    tokens: float
    """Of a document, on average, where 10^9 are spoken of."""


@dataclass(frozen=True)
class Shards:
    """``documents`` packed in ``shards`` apart: rows, the least there can be, and seconds of deciding (all shards)."""

    how: str
    documents: int
    shards: int
    rows: int
    lower_bound_rows: int
    seconds: float


@dataclass(frozen=True)
class Merged:
    """Histograms of ``shards`` added up: what deciding the layout of all documents from them alone takes and gives."""

    documents: int
    shards: int
    rows: int
    rows_apart: int
    lower_bound_rows: int
    histogram_bytes: int
    seconds: float
    seconds_apart: float


# --- measuring ------------------------------------------------------------------------------------------------------


def measure_shards(options: argparse.Namespace) -> dict[str, Any]:
    """All that the tables hold. Raises MachineError where a measurement could not be made."""
    sizes = QUICK if options.quick else Sizes()
    lengths_N = packing_data.long_tailed_lengths(sizes.together).lengths_N
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        bench = Bench(
            folder=Path(folder),
            peers=None,
            material=packing_data.find_material(options.material),
            sizes=None,  # type: ignore[arg-type]  # the works' own; none of them runs here
            limit_seconds=900,
        )
        examples = packing_data.alpaca_examples(bench.material, bench.folder, sizes.examples)
        encoded = _needed(
            bench.run(OURS, "prepare", examples=str(examples.file), tokenizer=examples.tokenizer, sequence_length=2048)
        )
        few, many = (_packed(bench, short_lengths(number)) for number in (sizes.few, sizes.many))
        long = _packed(bench, lengths_N[: sizes.few])
    print("  shards", file=sys.stderr, flush=True)
    apart = [shards_of(lengths_N, number, "as they come") for number in (1, *sizes.shards)]
    apart.append(shards_of(np.sort(lengths_N), sizes.shards[1], "sorted by length: each shard has its own kind"))
    print("  histograms", file=sys.stderr, flush=True)
    return {
        "examples": examples.name,
        "packed": [few, many, long],
        "costs": asdict(_costs(encoded, sizes.examples, few, many, long)),
        "apart": [asdict(one) for one in apart],
        "merged": asdict(merged_histograms(sizes.histograms, sizes.together)),
    }


def _needed(line: Line) -> Line:
    if line.absent:
        raise MachineError(f"bench scale: a measurement {line.absent}")
    return line


def short_lengths(documents: int) -> NDArray[np.int64]:
    """27 tokens on average: to see what the number of documents costs, without writing many tokens."""
    return np.maximum(np.random.default_rng(0).lognormal(3.0, 0.8, documents).astype(np.int64), 1)


def _packed(bench: Bench, lengths_N: NDArray[np.int64]) -> dict[str, Any]:
    """Documents through the store, as pack-data does it."""
    with bench.documents(lengths_N) as (folder, made):
        _needed(made)
        store = _bytes_in(Path(folder))
        packed = _needed(bench.run(OURS, "pack_documents", documents=folder, sequence_length=CAPACITY, overlap=OVERLAP))
        index = _bytes_in(Path(folder)) - store
    return {
        "documents": lengths_N.size,
        "tokens": int(lengths_N.sum()),
        "seconds": packed.seconds,
        "peak_bytes": packed.peak_bytes,
        "store_bytes": store,
        "index_bytes": index,
    }


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


TOKEN_BYTES = 5
"""An id of four bytes and a flag of one (trainkit/data/packed_store.py)."""


def _costs(encoded: Line, examples: int, few: dict[str, Any], many: dict[str, Any], long: dict[str, Any]) -> Costs:
    """Memory for each document from ``few`` and ``many`` short ones, and what cutting adds; the rest from ``long``."""
    memory_bytes = (many["peak_bytes"] - few["peak_bytes"]) / (many["documents"] - few["documents"])
    cutting_bytes = max(0.0, (long["peak_bytes"] - few["peak_bytes"]) / long["documents"])
    seconds = encoded.seconds or 0.0
    return Costs(
        encoding_documents_per_second=examples / seconds,
        encoding_tokens_per_second=(encoded.tokens or 0) / seconds,
        packing_seconds=long["seconds"] / long["documents"],
        memory_base_bytes=few["peak_bytes"] - memory_bytes * few["documents"],
        memory_bytes=memory_bytes + cutting_bytes,
        store_bytes=(long["store_bytes"] - TOKEN_BYTES * long["tokens"]) / long["documents"],
        index_bytes=long["index_bytes"] / long["documents"],
        token_bytes=TOKEN_BYTES,
        tokens=long["tokens"] / long["documents"],
    )


def shards_of(lengths_N: NDArray[np.integer], shards: int, how: str) -> Shards:
    """Cut and pack ``lengths_N`` in ``shards`` runs of consecutive documents.

    Two shards of twos and threes fill their rows of five less well than one:

    >>> found = [shards_of(np.array([2, 2, 2, 2, 3, 3, 3, 3]), number, "") for number in (1, 2)]
    >>> [(one.rows, one.lower_bound_rows) for one in found]
    [(1, 1), (2, 1)]
    """
    pieces = [cut(part_N, CAPACITY, "split", OVERLAP).length_P for part_N in np.array_split(lengths_N, shards)]
    started = time.perf_counter()
    rows = sum(len(best_fit(length_P, CAPACITY, seed=0)) for length_P in pieces)
    seconds = time.perf_counter() - started
    return Shards(how, lengths_N.size, shards, rows, lower_bound(np.concatenate(pieces), CAPACITY), seconds)


def histogram(lengths_N: NDArray[np.integer], capacity: int, overlap: int) -> Int64:
    """How many pieces there are of each length, shape (capacity + 1,): all that a layout depends on.

    >>> histogram(np.array([3, 3, 9]), 5, 0).tolist()
    [0, 0, 0, 2, 1, 1]
    """
    return np.bincount(cut(lengths_N, capacity, "split", overlap).length_P, minlength=capacity + 1)


def rows_of(counts_L: Int64) -> tuple[int, int]:
    """Rows that best-fit-decreasing makes of a histogram, and the fewest that its tokens need.

    Bins with gaps are not filled anew, as :func:`trainkit.data.packing.best_fit` does where it saves a row.

    >>> rows_of(np.array([0, 0, 1, 1, 2, 1]))
    (4, 4)
    """
    capacity = counts_L.size - 1
    placements = _place_groups(counts_L, capacity)
    rows = int((placements[:, 0] + placements[:, 1]).max())
    return rows, -(-int(counts_L @ np.arange(capacity + 1)) // capacity)


def merged_histograms(shards: int, documents: int) -> Merged:
    """``shards`` machines with ``documents`` drawn documents each: packed apart, and laid out from the sum."""
    total_L = np.zeros(CAPACITY + 1, np.int64)
    rows_apart, seconds_apart = 0, 0.0
    for seed in range(shards):
        lengths_N = np.maximum(np.random.default_rng(seed).lognormal(5.81, 1.1, documents).astype(np.int64), 1)
        started = time.perf_counter()
        length_P = cut(lengths_N, CAPACITY, "split", OVERLAP).length_P
        rows_apart += len(best_fit(length_P, CAPACITY, seed=0))
        seconds_apart += time.perf_counter() - started
        total_L += np.bincount(length_P, minlength=CAPACITY + 1)
    started = time.perf_counter()
    rows, least = rows_of(total_L)
    seconds = time.perf_counter() - started
    return Merged(documents * shards, shards, rows, rows_apart, least, total_L.nbytes, seconds, seconds_apart / shards)


# --- showing --------------------------------------------------------------------------------------------------------


def machine_costs(costs: Costs, documents: int, machines: int) -> dict[str, float]:
    """What each of ``machines`` takes for its share of ``documents``: hours, bytes of memory and of disk."""
    share = documents / machines
    return {
        "documents": share,
        "encoding_hours": share * costs.tokens / costs.encoding_tokens_per_second / 3600,
        "packing_hours": share * costs.packing_seconds / 3600,
        "memory_bytes": costs.memory_base_bytes + share * costs.memory_bytes,
        "disk_bytes": share * (costs.tokens * costs.token_bytes + costs.store_bytes + costs.index_bytes),
    }


def shards_tables(found: dict[str, Any]) -> str:
    """What :func:`measure_shards` found, as Markdown."""
    parts = [_costs_table(found), _apart_table(found["apart"]), _merged_lines(Merged(**found["merged"]))]
    parts.append(_machines_table(Costs(**found["costs"])))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _costs_table(found: dict[str, Any]) -> list[str]:
    costs = Costs(**found["costs"])
    lines = [
        "**One machine, measured**",
        "",
        "| | |",
        "|---|---|",
        f"| a file of examples to packed rows: {found['examples']} | {_speeds(costs)} |",
    ]
    for one in found["packed"]:
        mean = one["tokens"] / one["documents"]
        lines.append(
            f"| packing alone: {one['documents']:,} documents of {mean:.0f} tokens | {one['seconds']:.2f} s, "
            f"peak memory {one['peak_bytes'] / 2**30:.2f} GiB |"
        )
    lines.append(
        f"| packing, each document | {costs.packing_seconds * 1e9:.0f} ns, {costs.memory_bytes:.0f} bytes of memory |"
    )
    lines.append(
        f"| on disk | {costs.token_bytes:.0f} bytes a token, {costs.store_bytes:.0f} a document, and "
        f"{costs.index_bytes:.0f} a document for the index of rows |"
    )
    return lines


def _speeds(costs: Costs) -> str:
    tokens = costs.encoding_tokens_per_second / 1e6
    return f"{costs.encoding_documents_per_second:,.0f} documents/s, {tokens:.2f} million tokens/s"


def _apart_table(apart: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"**{apart[0]['documents']:,} documents, lengths log-normal (5.81, 1.1), rows of {CAPACITY:,}, in shards**",
        "",
        "| shards | documents | rows | above the least | fill |",
        "|---|---|---|---|---|",
    ]
    for one in apart:
        above, least = one["rows"] - one["lower_bound_rows"], one["lower_bound_rows"]
        lines.append(
            f"| {one['shards']:,} | {one['how']} | {one['rows']:,} | {above:,} ({above / least:.4%}) | "
            f"{least / one['rows']:.3%} |"
        )
    return lines


def _merged_lines(merged: Merged) -> list[str]:
    saved = merged.rows_apart - merged.rows
    return [
        f"**{merged.documents:,} documents in {merged.shards:,} shards, histograms merged**",
        "",
        "| | |",
        "|---|---|",
        f"| a shard: cutting and deciding what goes where | {merged.seconds_apart:.2f} s |",
        f"| a shard's histogram | {merged.histogram_bytes:,} bytes |",
        f"| deciding the layout of all from the sum | {merged.seconds:.3f} s |",
        f"| rows: the least there can be | {merged.lower_bound_rows:,} |",
        f"| rows, all packed together | {merged.rows:,} |",
        f"| rows, shards packed apart | {merged.rows_apart:,} |",
        f"| what packing together would save | {saved:,} rows ({saved / merged.rows_apart:.5%}) |",
    ]


def _machines_table(costs: Costs) -> list[str]:
    lines = [
        f"**{ALL_DOCUMENTS:,} documents of {costs.tokens:,.0f} tokens on N machines like it, extrapolated**",
        "",
        "| machines | documents each | encoding, hours | packing, minutes | memory, GiB | disk, GB |",
        "|---|---|---|---|---|---|",
    ]
    for machines in MACHINES:
        each = machine_costs(costs, ALL_DOCUMENTS, machines)
        minutes, memory, disk = each["packing_hours"] * 60, each["memory_bytes"] / 2**30, each["disk_bytes"] / 1e9
        lines.append(
            f"| {machines:,} | {each['documents']:,.0f} | {each['encoding_hours']:,.1f} | {minutes:,.1f} | "
            f"{memory:,.1f} | {disk:,.0f} |"
        )
    return lines
