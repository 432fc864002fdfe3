"""The ledger's sums, and that it survives its own JSON."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.ledger import Ledger, SourceShare

SUMMED = ["read", "repeated", "trained", "masked", "truncated", "separators", "overlap", "padding", "rows", "documents"]

BALANCED = Ledger(
    sequence_length=16,
    rows=4,
    pieces=7,
    documents=5,
    read=60,
    repeated=6,
    trained=30,
    masked=20,
    truncated=9,
    dropped={"no trained token": 7},
    separators=4,
    separators_trained=3,
    overlap=2,
    overlap_trained=1,
    padding=8,
    examples_read=7,
    examples_dropped={"no trained token": 1, "empty completion": 1},
    sources=(SourceShare("a.jsonl", 1.0, 3, 20, 0.6, 1.0), SourceShare("b.jsonl", 2.0, 2, 14, 0.4, 2.5)),
)


def test_a_balanced_ledger_passes_and_counts_its_targets() -> None:
    BALANCED.check()
    assert (BALANCED.slots, BALANCED.tokens, BALANCED.trained_targets) == (64, 56, 34)
    assert BALANCED.fill == 56 / 64
    assert BALANCED.examples_kept == 5


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("change", [-1, 1])
def test_one_token_too_many_or_too_few_is_noticed(name: str, change: int) -> None:
    with pytest.raises(AssertionError, match="ledger does not balance"):
        replace(BALANCED, **{name: getattr(BALANCED, name) + change}).check()


def test_a_dropped_token_or_example_that_is_not_counted_is_noticed() -> None:
    with pytest.raises(AssertionError, match="read"):
        replace(BALANCED, dropped={}).check()
    with pytest.raises(AssertionError, match="examples"):
        replace(BALANCED, examples_dropped={}).check()


@pytest.mark.parametrize(
    "impossible", [{"separators_trained": 5}, {"overlap_trained": 3}, {"truncated": -1, "masked": 30, "padding": -2}]
)
def test_a_count_that_cannot_be_is_noticed(impossible: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        replace(BALANCED, **impossible).check()  # type: ignore[arg-type]


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Any counts whose sums come out."""
    count = st.integers(0, 10**6)
    reasons = st.dictionaries(st.sampled_from(["no trained token", "too long", "empty text"]), count)
    here: dict[str, Any] = {name: draw(count) for name in ("trained", "masked", "separators", "overlap", "padding")}
    truncated, repeated, dropped, examples_dropped = draw(count), draw(count), draw(reasons), draw(reasons)
    documents = draw(count)
    away = truncated + sum(dropped.values())
    return Ledger(
        **here,
        sequence_length=1,
        rows=sum(here.values()),
        pieces=draw(count),
        documents=documents,
        read=here["trained"] + here["masked"] + away,
        repeated=repeated,
        truncated=truncated + repeated,  # what is read twice is left out twice
        dropped=dropped,
        separators_trained=draw(st.integers(0, here["separators"])),
        overlap_trained=draw(st.integers(0, here["overlap"])),
        examples_read=documents + sum(examples_dropped.values()),
        examples_dropped=examples_dropped,
    )


@given(ledger=ledgers(), name=st.sampled_from(SUMMED), change=st.integers(-5, 5).filter(bool))
def test_any_balanced_ledger_passes_and_any_count_that_is_off_is_noticed(
    ledger: Ledger, name: str, change: int
) -> None:
    ledger.check()
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    assert 0 <= ledger.fill <= 1
    with pytest.raises(AssertionError):
        replace(ledger, **{name: getattr(ledger, name) + change}).check()


def test_json_gives_the_same_ledger_back() -> None:
    text = json.dumps(BALANCED.to_json(), allow_nan=False)
    assert Ledger.from_json(json.loads(text)) == BALANCED
    assert json.loads(text)["trained_targets"] == 34


def test_lines_name_every_loss_and_every_source() -> None:
    lines = BALANCED.lines()
    assert any("dropped: no trained token" in line and "-7" in line for line in lines)
    assert any(line.startswith("  truncated") and "-9" in line for line in lines)
    assert any("4 rows of 16" in line for line in lines)
    assert any(line.startswith("b.jsonl: 14 trained tokens, 40.0% of the mix, 2.50 passes") for line in lines)


def test_lines_leave_out_what_did_not_happen() -> None:
    plain = replace(BALANCED, repeated=0, truncated=0, dropped={}, examples_dropped={}, sources=BALANCED.sources[:1])
    text = "\n".join(plain.lines())
    assert not any(word in text for word in ("repeated by weight", "truncated", "dropped", "a.jsonl"))


def test_an_empty_ledger_divides_by_nothing() -> None:
    empty = Ledger(sequence_length=8, rows=0, pieces=0, documents=0, read=0)
    empty.check()
    assert empty.fill == 0.0
    assert empty.lines()
