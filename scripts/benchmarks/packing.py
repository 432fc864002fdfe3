"""``scripts/bench pack``: packing by trainkit and by the packers of other projects, on the same lengths in one run.

Every measurement runs alone, in a process of its own (:mod:`benchmarks.packing_child`); this one starts it, watches its
memory, stops it when it takes too long, and makes the tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import packing_data
from benchmarks.packing_peers import PEERS, TRL

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

OURS = "trainkit"
POLL_SECONDS = 0.01
LONG = (2048, 8192)
OVERLAP = 64
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Sizes:
    """How much is packed."""

    alpaca: int = 52_002
    million: int = 1_000_000
    ten_million: int = 10_000_000
    memory_tokens: int = 1_000_000_000


QUICK = Sizes(alpaca=1_000, million=4_000, ten_million=20_000, memory_tokens=2_000_000)


@dataclass
class Line:
    """One tool's line in a table. ``absent`` says why there are no numbers.

    ``seconds`` is the least time of ``runs`` runs. ``peak_bytes`` is the most memory of the process and its children
    that no file stands behind, the interpreter with its libraries included.
    """

    tool: str
    rows: int | None = None
    seconds: float | None = None
    runs: int = 0
    lost_tokens: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    overlap_tokens: int | None = None
    peak_bytes: int | None = None
    absent: str = ""


@dataclass
class Table:
    """What one work found: lines, the fewest rows the tokens need, and remarks below."""

    work: str
    title: str
    columns: tuple[str, ...]
    lower_bound_rows: int | None = None
    lines: list[Line] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """What all works share. Stores of documents are made when first asked for, and go with ``folder``."""

    folder: Path
    peers: Path | None
    material: Path | None
    sizes: Sizes
    limit_seconds: float

    def run(self, tool: str, measure: str, **arguments: Any) -> Line:
        """One measurement; a line without numbers where it takes too long or fails."""
        print(f"  {measure.replace('_', ' ')}: {tool}", file=sys.stderr, flush=True)
        task = json.dumps({"measure": measure, **arguments})
        paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "TMPDIR": str(self.folder),
        }
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.packing_child", task]
        with (self.folder / "errors").open("w+") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
            peak = _watch(child, self.limit_seconds)
            output, _ = child.communicate()
            errors.seek(0)
            said = errors.read().strip().splitlines()
        if peak is None:
            return Line(tool, absent=f"stopped after {self.limit_seconds:.0f} s")
        if child.returncode:
            return Line(tool, absent=f"failed: {said[-1][:200] if said else f'exit code {child.returncode}'}")
        return Line(tool, peak_bytes=peak, **json.loads(output))

    def run_again(self, before: Line, measure: str, **arguments: Any) -> None:
        """The same once more, when the others have had their turn; the better time of both counts."""
        again = self.run(before.tool, measure, **arguments)
        if before.seconds and again.seconds:
            before.seconds = min(before.seconds, again.seconds)
            before.runs += again.runs

    def version(self, peer: Any) -> str | None:
        """Of a peer, None where it is not there."""
        return peer.version(self.peers) if self.peers else None

    def lengths_file(self, lengths: packing_data.Lengths) -> str:
        """Lengths on disk for a child."""
        import numpy as np

        file = self.folder / "lengths.npy"
        np.save(file, lengths)
        return str(file)

    @contextmanager
    def documents(self, lengths: packing_data.Lengths) -> Iterator[tuple[str, Line]]:
        """A store of documents of ``lengths``, and how it was made; removed afterwards."""
        import shutil

        folder = self.folder / "documents"
        made = self.run(OURS, "write_documents", lengths=self.lengths_file(lengths), folder=str(folder))
        try:
            yield str(folder), made
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def measure_packing(options: argparse.Namespace) -> dict[str, Any]:
    """The works that ``--work`` names, all without."""
    with tempfile.TemporaryDirectory(prefix="bench-pack-") as folder:
        bench = Bench(
            folder=Path(folder),
            peers=Path(options.peers).resolve() if options.peers else None,
            material=packing_data.find_material(options.material),
            sizes=QUICK if options.quick else Sizes(),
            limit_seconds=options.limit,
        )
        versions = {peer.folder: bench.version(peer) for peer in PEERS}
        tables = []
        for name in options.work or WORKS:
            print(name, file=sys.stderr, flush=True)
            tables += WORKS[name](bench)
    return {"peers": versions, "cores": CORES, "tables": [asdict(table) for table in tables]}


def table(found: dict[str, Any]) -> str:
    """What :func:`measure_packing` found, as Markdown."""
    installed = [f"{folder} {version}" for folder, version in found["peers"].items() if version]
    missing = [folder for folder, version in found["peers"].items() if not version]
    parts = [_markdown(one) for one in found["tables"]]
    if installed:
        parts.append(f"Installed for this: {', '.join(installed)}.")
    if missing:
        parts.append(f"Not installed: {', '.join(missing)}; `scripts/bench pack --help` says how.")
    return "\n\n".join(parts)


# --- works ---------------------------------------------------------------------------------------------------------


def alpaca(bench: Bench) -> list[Table]:
    """Rows and time of deciding what goes where, for short documents."""
    chosen = packing_data.alpaca_lengths(bench.material, bench.sizes.alpaca)
    return [_assignment(bench, "alpaca", chosen.name, chosen.lengths_N, every_peer=True)]


def million(bench: Bench) -> list[Table]:
    """The same for long-tailed lengths; all packers get the pieces of at most 2,048 tokens."""
    chosen = packing_data.long_tailed_lengths(bench.sizes.million)
    return [_assignment(bench, "million", f"{chosen.name}, cut", chosen.lengths_N, every_peer=True)]


def ten_million(bench: Bench) -> list[Table]:
    """The same for ten times as many, by the packers that are not minutes away."""
    chosen = packing_data.long_tailed_lengths(bench.sizes.ten_million)
    return [_assignment(bench, "ten-million", f"{chosen.name}, cut", chosen.lengths_N, every_peer=False)]


def step(bench: Bench) -> list[Table]:
    """The whole packing step, from tokens on disk to rows on disk, and what a repeated overlap costs."""
    chosen = packing_data.long_tailed_lengths(bench.sizes.million)
    tokens = int(chosen.lengths_N.sum())
    packing = Table(
        "step",
        f"Tokens on disk to rows on disk: {chosen.name}, {tokens:,} tokens, rows of 2,048",
        ("rows", "lost", "seconds", "ratio", "memory"),
        -(-tokens // 2048),
    )
    overlap = Table("step", f"What an overlap of {OVERLAP} costs: {chosen.name}", ("overlap",))
    with bench.documents(chosen.lengths_N) as (documents, made):
        common = {"documents": documents, "sequence_length": 2048, "overlap": 0}
        ours = bench.run(OURS, "pack_documents", **common)
        for length in LONG:
            line = bench.run(OURS, "pack_documents", documents=documents, sequence_length=length, overlap=OVERLAP)
            line.tool = f"rows of {length:,}"
            overlap.lines.append(line)
        packing.lines = [ours, *_trl_steps(bench, documents)]
        bench.run_again(ours, "pack_documents", **common)
    longer = chosen.lengths_N[chosen.lengths_N > 2048]
    dropped, truncated = longer.sum() / tokens, (longer - 2048).sum() / tokens
    packing.remarks = [
        "trainkit packs ids and trained mask and writes an index of rows; TRL packs ids alone and writes the rows.",
        f"Dropping documents longer than a row loses {dropped:.1%} of the tokens, truncating them {truncated:.1%}.",
        f"Writing the documents themselves, once: {made.seconds or 0:.1f} s, {_memory(made.peak_bytes)}.",
    ]
    return [packing, overlap]


def _trl_steps(bench: Bench, documents: str) -> list[Line]:
    """TRL's packing of the same documents, from a file of `datasets` to another."""
    if not bench.version(TRL):
        return [_not_installed("TRL", TRL.folder)]
    file = bench.folder / "documents.arrow"
    bench.run("the same documents as a file of `datasets`", "write_arrow", documents=documents, file=str(file))
    common = {"peers": str(bench.peers), "file": str(file), "capacity": 2048}
    ways: tuple[tuple[str, str, int | None], ...] = (
        ("TRL, bfd (its default)", "bfd", None),
        ("TRL, bfd_split", "bfd_split", None),
        (f"TRL, bfd_split, {CORES} processes", "bfd_split", CORES),
    )
    lines = [bench.run(name, "trl_pack", strategy=way, processes=number, **common) for name, way, number in ways]
    file.unlink(missing_ok=True)
    return lines


def memory(bench: Bench) -> list[Table]:
    """Memory while a thousand million tokens are written as documents and packed."""
    import numpy as np

    every = packing_data.long_tailed_lengths(int(bench.sizes.memory_tokens / 500)).lengths_N
    lengths_N = every[: int(np.searchsorted(np.cumsum(every), bench.sizes.memory_tokens)) + 1]
    found = Table(
        "memory",
        f"Memory: {int(lengths_N.sum()):,} tokens in {lengths_N.size:,} documents, rows of 2,048",
        ("rows", "lost", "seconds", "memory"),
    )
    with bench.documents(lengths_N) as (documents, made):
        made.tool = "writing the documents"
        packed = bench.run(OURS, "pack_documents", documents=documents, sequence_length=2048, overlap=OVERLAP)
        packed.tool = "packing them"
        found.lines = [made, packed]
    return [found]


def prepare(bench: Bench) -> list[Table]:
    """A file of examples to packed rows on disk: template, tokens, masks, packing."""
    examples = packing_data.alpaca_examples(bench.material, bench.folder, bench.sizes.alpaca)
    found = Table(
        "prepare",
        f"A file to packed rows on disk, template and masks included: {examples.name}, rows of 2,048",
        ("rows", "trained", "seconds", "ratio", "memory"),
    )
    # The same file for all, in the form that TRL takes.
    file = bench.folder / "prompts-and-completions.jsonl"
    packing_data.write_prompts_and_completions(examples.file, file)
    common = {"examples": str(file), "tokenizer": examples.tokenizer, "sequence_length": 2048}
    ours = bench.run(OURS, "prepare", **common)
    found.lines.append(ours)
    cold = bench.run(
        f"{OURS}, loading gigatoken's tables of the tokenizer",
        "prepare",
        loading=True,
        **common,
    )
    found.lines.append(cold)
    if not bench.version(TRL):
        found.lines.append(_not_installed("TRL", TRL.folder))
        return [found]
    for processes in (None, CORES):
        found.lines.append(
            bench.run(
                "TRL, SFTTrainer's preparation" + (f", {processes} processes" if processes else ""),
                "trl_prepare",
                peers=str(bench.peers),
                processes=processes,
                **common,
            )
        )
    bench.run_again(ours, "prepare", **common)
    return [found]


def overlap(bench: Bench) -> list[Table]:
    """What a repeated overlap costs on books."""
    found = Table("overlap", f"What an overlap of {OVERLAP} costs: books, Qwen tokenizer", ("overlap",))
    for book in packing_data.BOOKS:
        if bench.material is None or not (bench.material / book).is_file():
            found.remarks.append(f"{Path(book).name} is not there.")
            continue
        for length in LONG:
            line = bench.run(
                OURS,
                "prepare",
                examples=str(bench.material / book),
                tokenizer=str(bench.material / packing_data.TOKENIZER),
                sequence_length=length,
                overlap=OVERLAP,
            )
            line.tool = f"{Path(book).stem}, rows of {length:,}"
            found.lines.append(line)
    return [found]


WORKS: dict[str, Callable[[Bench], list[Table]]] = {
    "alpaca": alpaca,
    "million": million,
    "ten-million": ten_million,
    "step": step,
    "prepare": prepare,
    "memory": memory,
    "overlap": overlap,
}


def _assignment(bench: Bench, work: str, name: str, lengths_N: packing_data.Lengths, *, every_peer: bool) -> Table:
    from trainkit.data.packing import cut, lower_bound

    lengths_P = cut(lengths_N, 2048, "split").length_P.astype("int64")
    found = Table(
        work,
        f"Deciding what goes where: {name}, rows of 2,048",
        ("rows", "seconds", "ratio"),
        lower_bound(lengths_P, 2048),
    )
    common = {"peers": str(bench.peers), "lengths": bench.lengths_file(lengths_P), "capacity": 2048}
    ours = bench.run(OURS, "assign", peer=None, **common)
    found.lines.append(ours)
    for peer in PEERS:
        if not every_peer and peer.folder != "lightbinpack":
            continue
        if not bench.version(peer):
            found.lines.append(_not_installed(peer.name, peer.folder))
        elif lengths_P.size > peer.most_pieces:
            found.lines.append(Line(peer.name, absent=f"not tried: {peer.why_no_more}"))
        else:
            line = bench.run(peer.name, "assign", peer=peer.name, **common)
            line.tool = f"{peer.name}: {peer.manner}"
            found.lines.append(line)
    bench.run_again(ours, "assign", peer=None, **common)
    return found


# --- watching and showing ------------------------------------------------------------------------------------------


def _watch(child: subprocess.Popen[str], limit_seconds: float) -> int | None:
    """The most memory without a file behind it, in bytes; None where the child had to be stopped."""
    import psutil

    peak, until = 0, time.monotonic() + limit_seconds
    process = psutil.Process(child.pid)
    while child.poll() is None:
        if time.monotonic() > until:
            for one in (*process.children(recursive=True), process):
                one.kill()
            return None
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(_anonymous_bytes(one.memory_info()) for one in family))
        except psutil.NoSuchProcess:
            continue
        time.sleep(POLL_SECONDS)
    return peak


def _anonymous_bytes(info: Any) -> int:
    """Resident memory without the pages of mapped files, which the page cache holds (Linux tells them apart)."""
    return int(info.rss - getattr(info, "shared", 0))


def _not_installed(name: str, folder: str) -> Line:
    return Line(name, absent=f"not installed in --peers/{folder}")


def _markdown(found: dict[str, Any]) -> str:
    columns = found["columns"]
    heads = {
        "rows": f"rows (at least {found['lower_bound_rows']:,})" if found["lower_bound_rows"] else "rows",
        "lost": "tokens lost",
        "trained": "trained tokens",
        "seconds": "seconds (runs)",
        "ratio": "time against trainkit",
        "memory": "peak memory",
        "overlap": "tokens repeated",
    }
    lines = [f"**{found['title']}**", ""]
    lines.append("| | " + " | ".join(heads[column] for column in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    ours = found["lines"][0]["seconds"] if found["lines"] else None
    for line in found["lines"]:
        cells = [line["absent"], *[""] * (len(columns) - 1)] if line["absent"] else _cells(line, columns, ours)
        lines.append(f"| {line['tool']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", *found["remarks"]] if found["remarks"] else [])])


def _cells(line: dict[str, Any], columns: tuple[str, ...], ours: float | None) -> list[str]:
    overlap, tokens = line["overlap_tokens"] or 0, line["tokens"] or 0
    cells = {
        "rows": lambda: f"{line['rows']:,}" if line["rows"] is not None else "",
        "lost": lambda: f"{line['lost_tokens']:,}" if line["lost_tokens"] is not None else "",
        "trained": lambda: f"{line['trained_tokens']:,} of {tokens:,}",
        "seconds": lambda: f"{line['seconds']:.3g} ({line['runs']})",
        "ratio": lambda: _times(line["seconds"] / ours) if ours else "",
        "memory": lambda: _memory(line["peak_bytes"]),
        "overlap": lambda: f"{overlap:,} of {tokens:,} ({overlap / tokens:.2%})",
    }
    return [cells[column]() for column in columns]


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} ×" if ratio >= 100 else f"{ratio:.2g} ×"


def _memory(peak_bytes: int | None) -> str:
    return f"{(peak_bytes or 0) / 2**30:.2f} GiB"
