"""Recipes and data files that were mutated: whatever stands in them, one of our own errors, and soon."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fuzzing.command import main
from fuzzing.mutation import KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.bad_input.room import GOOD_LINES, LONGEST_LINE, Room, Said
from trainkit.cli import run

PROCESSOR_SECONDS_FOR_ONE = 5
EXPECTED_CODES = {0, 2, 3, 4, 5}
Mutation = tuple[float, int, bytes]


def mutations_with(hostile: Sequence[bytes]) -> st.SearchStrategy[list[Mutation]]:
    """Places in a file (0 to 1), how many bytes are taken out there, and what is put in."""
    inserted = st.sampled_from(hostile) | st.binary(max_size=4)
    return st.lists(st.tuples(st.floats(0, 1), st.integers(0, 60), inserted), min_size=1, max_size=4)


def mutated(content: bytes, mutations: list[Mutation]) -> bytes:
    for share, length, inserted in mutations:
        at = int(share * len(content))
        content = content[:at] + inserted + content[at + length :]
    return content


def check_inspect_data(capfd: Said) -> None:
    capfd.readouterr()
    started = time.process_time()
    code = run(["inspect-data", "recipe.yaml", "--examples", "1"])
    said = capfd.readouterr()
    assert code in EXPECTED_CODES, said.err
    assert "Traceback" not in said.out + said.err
    assert (code != 0) == ("error: " in said.err), said.err
    assert time.process_time() - started < PROCESSOR_SECONDS_FOR_ONE


def check_mutated_recipe(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    path = room.write_recipe()
    path.write_bytes(mutated(path.read_bytes(), mutations))
    check_inspect_data(capfd)


def check_mutated_data(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    room.write_recipe()
    room.data.write_bytes(mutated("\n".join(GOOD_LINES[:4]).encode(), mutations))
    check_inspect_data(capfd)


def tries(count: int) -> settings:
    """So many examples; each leaves the room as the next one needs it."""
    return settings(
        max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )


@tries(30)
@given(mutations=mutations_with(KINDS["recipes"].hostile))
def test_no_recipe_makes_a_traceback(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    check_mutated_recipe(room, capfd, mutations)


@tries(40)
@given(mutations=mutations_with(KINDS["data"].hostile))
def test_no_data_makes_a_traceback(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    check_mutated_data(room, capfd, mutations)


# The fuzzer, which needs no shrinking and is faster: as many inputs as one likes


def fuzzed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, result


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_fuzzer_finds_nothing(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = fuzzed(capsys, kind, "--count", "200", "--seed", "1")
    assert (code, result["failures"], result["inputs"]) == (0, [], 200)
    assert sum(result["exit_codes"].values()) == 200
    assert len(result["exit_codes"]) > 1, "some mutated files are good, and most are not"
    assert result["longest_line"] <= LONGEST_LINE


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_same_numbers_give_the_same_inputs(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole = fuzzed(capsys, kind, "--count", "20", "--processes", "1")
    parts = [fuzzed(capsys, kind, "--count", "10", "--first", first)[1] for first in ("0", "10")]
    both = [Counter(part["exit_codes"]) for part in parts]
    assert Counter(whole["exit_codes"]) == both[0] + both[1]


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (lambda _: 1, "exit 1"),
        (lambda _: print("error: a", file=sys.stderr) or 0, "exit 0, 1 lines of errors"),
        (lambda _: print("Traceback (most recent call last):") or 0, "a traceback"),
        (lambda _: 3, "exit 3, 0 lines of errors"),
        (lambda _: [None for _ in itertools.count()], "hung"),
    ],
)
def test_the_fuzzer_sees_a_wrong_answer(
    program: Callable[[object], int],
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainkit.cli.run", program)
    monkeypatch.setattr("fuzzing.command.SECONDS_FOR_ONE", 0.2)
    code, result = fuzzed(capsys, "recipes", "--count", "2")
    assert code == 1
    assert [number for number, _ in result["failures"]] == [0, 1]
    assert all(what.startswith(found) for _, what in result["failures"])


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_fuzzer_finds_nothing_in_many(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """TRAINKIT_FUZZ_COUNT says how many: a million of each is the goal of a release."""
    code, result = fuzzed(capsys, kind, "--count", os.environ.get("TRAINKIT_FUZZ_COUNT", "20000"))
    print(json.dumps(result))
    assert (code, result["failures"]) == (0, [])
