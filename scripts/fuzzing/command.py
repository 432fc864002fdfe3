"""``fuzz KIND``: how many mutated inputs were tried, with which exit codes, and which got a wrong answer.

An input is answered well where the command ends with an exit code of its table other than 1 (a bug), within
five seconds of the processor, without a traceback, and says `error:` exactly where the code is not 0.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

from fuzzing.mutation import KINDS, mutated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECONDS_FOR_ONE = 5
EXPECTED_CODES = frozenset({0, 2, 3, 4, 5})
FAILURES_KEPT = 20
RECIPE = """\
model: {name: tiny}
data: {train: train.jsonl}
training: {steps: 1}
output_dir: run
"""


class Hung(BaseException):
    """An input took longer than ``SECONDS_FOR_ONE``; no `except Exception` of the program may take it for its own."""


@dataclass
class Tried:
    """What became of the inputs. ``failures`` are (number, what was wrong)."""

    inputs: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    slowest_number: int = 0
    longest_line: int = 0
    longest_number: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Tried) -> None:
        """Count another's inputs too."""
        self.inputs += other.inputs
        self.exit_codes.update(other.exit_codes)
        if other.slowest_seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest_number = other.slowest_seconds, other.slowest_number
        if other.longest_line > self.longest_line:
            self.longest_line, self.longest_number = other.longest_line, other.longest_number
        self.failures = sorted([*self.failures, *other.failures])[:FAILURES_KEPT]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where an input was not answered well."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS), help="what is mutated")
    parser.add_argument("--count", type=int, default=10_000, help="how many inputs (default 10,000)")
    parser.add_argument("--seconds", type=float, help="stop after so long, whatever the count")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other inputs (default 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input: to make one again")
    parser.add_argument("--processes", type=int, default=1, help="how many at once (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    deadline = started + options.seconds if options.seconds else float("inf")
    total = Tried()
    share = functools.partial(_share, options.kind, options.seed, options.first, options.count, deadline)
    if options.processes == 1:
        total.add(share((0, 1)))
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for tried in pool.imap_unordered(share, [(one, options.processes) for one in range(options.processes)]):
                total.add(tried)
    seconds = time.monotonic() - started
    _show(options, total, seconds)
    return 1 if total.failures else 0


def _share(kind: str, seed: int, first: int, count: int, deadline: float, part: tuple[int, int]) -> Tried:
    """Every so-manieth input, tried in a folder of its own."""
    start, step = part
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return _tried(kind, seed, range(first + start, first + count, step), deadline)
        finally:
            os.chdir(before)


def _tried(kind: str, seed: int, numbers: range, deadline: float) -> Tried:
    tried = Tried()
    Path("recipe.yaml").write_text(RECIPE)
    file = Path(KINDS[kind].file)
    with _made_once():
        for number in itertools.takewhile(lambda _: time.monotonic() < deadline, numbers):
            file.write_bytes(mutated(kind, seed, number))
            _try_one(KINDS[kind].arguments, number, tried)
    return tried


@contextmanager
def _made_once() -> Iterator[None]:
    """What is the same whatever the input is, and takes longer than the rest: the model's tokenizer, the commands."""
    import typer.main

    from trainkit.data.token_bytes import FastTokens, fast_tokens
    from trainkit.model.loading import load_tokenizer

    engines: dict[str, FastTokens] = {}

    def engine_of(tokenizer: Any, described: str) -> FastTokens:
        if described not in engines:
            engines[described] = fast_tokens(tokenizer, described)
        return engines[described]

    with ExitStack() as stack:
        for place, made in {
            "trainkit.commands.inspect_data.load_tokenizer": functools.cache(load_tokenizer),
            "trainkit.data.encoding.fast_tokens": engine_of,
            "typer.main.get_command": functools.cache(typer.main.get_command),
        }.items():
            stack.enter_context(mock.patch(place, made))
        yield


def _try_one(arguments: Sequence[str], number: int, tried: Tried) -> None:
    from trainkit.cli import run

    shown, said = io.StringIO(), io.StringIO()
    started = time.process_time()
    try:
        with _limited(), redirect_stdout(shown), redirect_stderr(said):
            code = run(arguments)
    except Hung:
        code = -1
    seconds = time.process_time() - started
    tried.inputs += 1
    tried.exit_codes[code] += 1
    if seconds > tried.slowest_seconds:
        tried.slowest_seconds, tried.slowest_number = seconds, number
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    longest = max((len(line.removeprefix("error: ")) for line in errors), default=0)
    if longest > tried.longest_line:
        tried.longest_line, tried.longest_number = longest, number
    if code not in EXPECTED_CODES:
        tried.failures.append((number, "hung" if code == -1 else f"exit {code}: {errors[:1]}"))
    elif "Traceback" in shown.getvalue() + said.getvalue():
        tried.failures.append((number, "a traceback"))
    elif (code != 0) != bool(errors):
        tried.failures.append((number, f"exit {code}, {len(errors)} lines of errors"))


class _limited:  # noqa: N801 - a context, used as one
    """Raise Hung within what takes more than ``SECONDS_FOR_ONE`` of the processor, however busy the machine is."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGPROF, _give_up)
        signal.setitimer(signal.ITIMER_PROF, SECONDS_FOR_ONE)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)


def _give_up(*_: object) -> NoReturn:
    raise Hung


def _show(options: argparse.Namespace, total: Tried, seconds: float) -> None:
    result: dict[str, Any] = {"kind": options.kind, "seed": options.seed, **asdict(total), "seconds": seconds}
    result["exit_codes"] = dict(sorted(total.exit_codes.items()))
    if options.json:
        print(json.dumps(result))
        return
    codes = ", ".join(f"{count:,} with {code}" for code, count in sorted(total.exit_codes.items()))
    print(f"{total.inputs:,} mutated {options.kind} (seed {options.seed}) in {seconds:,.0f} s; exit codes: {codes}")
    print(f"slowest: {total.slowest_seconds:.2f} s of the processor (number {total.slowest_number})")
    print(f"longest line: {total.longest_line} characters (number {total.longest_number})")
    for number, what in total.failures:
        print(f"FAILED {number}: {what}  (again: --seed {options.seed} --first {number} --count 1)")
    print(f"{len(total.failures)} failures" if total.failures else "no failure")
