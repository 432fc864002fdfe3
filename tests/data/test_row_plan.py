"""Which documents stand in which rows: the ledger against a count by hand, weights, and the held-out share."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from trainkit.data import row_plan
from trainkit.data.packed_store import Documents, PackedRows
from trainkit.data.row_plan import (
    NO_TARGET,
    PIECE_WITHOUT_TARGET,
    TOO_LONG,
    TRUNCATED_TO_NO_TARGET,
    Selection,
    copies_by_weight,
    count_trained,
    held_out,
    plan_rows,
)
from trainkit.errors import DataError
from trainkit.recipe.schema import Packing, Source

Document = tuple[list[bool], bool]  # trained flags, whether the last token is a separator
PACKING = Packing(sequence_length=8, overlap=2)
ONE_SOURCE = (Source(path="a.jsonl"),)


def in_memory(made: Sequence[Document], sources: Sequence[int] | None = None) -> Documents:
    """Documents whose token ids are their own positions in the store."""
    lengths = [len(flags) for flags, _ in made]
    places = [f"a.jsonl:{n + 1}".encode() for n in range(len(made))]
    trained = [np.array([False, *flags[1:]]) for flags, _ in made]
    arrays = {
        "tokens": np.arange(sum(lengths), dtype=np.int32),
        "trained": np.concatenate(trained),
        "offsets": np.cumsum([0, *lengths]),
        "targets": np.array([flags.sum() for flags in trained]),
        "separators": np.array([separator for _, separator in made]),
        "trained-separators": np.array(
            [separator and bool(flags[-1]) for flags, (_, separator) in zip(trained, made, strict=True)]
        ),
        "sources": np.array(sources or [0] * len(made), np.int32),
        "examples": np.arange(len(made)),
        "digests": np.arange(len(made), dtype=np.uint64),
        "prompts": np.zeros(len(made), np.bool_),
        "place-ends": np.cumsum([len(place) for place in places]),
        "places": np.frombuffer(b"".join(places), np.uint8),
    }
    return Documents(Path("memory"), arrays, facts={})


def everything(documents: Documents, sources: Sequence[Source] = ONE_SOURCE) -> Selection:
    return Selection(sources, 0, np.arange(len(documents)), {})


def plan(made: Sequence[Document], packing: Packing = PACKING) -> PackedRows:
    documents = in_memory(made)
    return PackedRows(documents, plan_rows(documents, everything(documents), packing, seed=1))


def all_trained(length: int, *, separator: bool = False) -> Document:
    return [True] * length, separator


documents_made = st.lists(
    st.tuples(st.lists(st.booleans(), min_size=1, max_size=40), st.booleans()), min_size=1, max_size=12
)


@given(
    made=documents_made,
    policy=st.sampled_from(["split", "truncate", "drop"]),
    strategy=st.sampled_from(["best-fit", "none"]),
    overlap=st.integers(0, 4),
    train_on_overlap=st.booleans(),
    weights=st.sampled_from([None, (1.0, 1.0), (1.0, 7.0)]),
)
def test_the_ledger_is_what_a_count_by_hand_gives(
    made: list[Document],
    policy: str,
    strategy: str,
    overlap: int,
    train_on_overlap: bool,
    weights: tuple[float, float] | None,
) -> None:
    packing = Packing(
        sequence_length=8,
        long_documents=policy,  # type: ignore[arg-type]
        strategy=strategy,  # type: ignore[arg-type]
        overlap=overlap,
        train_on_overlap=train_on_overlap,
    )
    sources = [Source(path=name, weight=weights and weights[i]) for i, name in enumerate("ab")]
    documents = in_memory(made, [n % 2 for n in range(len(made))])
    try:
        rows = PackedRows(documents, plan_rows(documents, everything(documents, sources), packing, seed=3))
    except DataError:  # nothing to train in one of the sources; tested below
        reject()
    ledger = rows.ledger
    assembled = [rows.row(i) for i in range(len(rows))]

    assert len(rows) == ledger.rows
    assert sum(row.ids_T.size for row in assembled) == ledger.tokens
    assert [int(row.trained_T.sum()) for row in assembled] == [rows.trained_tokens(i) for i in range(len(rows))]
    assert sum(rows.trained_tokens(i) for i in range(len(rows))) == ledger.trained_targets
    assert all(row.ids_T.size <= 8 and row.trained_T.any() for row in assembled)
    assert sum(row.segment_lengths.size for row in assembled) == ledger.pieces
    assert strategy == "best-fit" or ledger.pieces == ledger.rows

    separator_ids = {
        int(end) - 1 for end, (_, separator) in zip(documents.offsets_N[1:], made, strict=True) if separator
    }
    seen: Counter[int] = Counter()
    for row in assembled:
        seen.update(row.ids_T.tolist())
    assert sum(seen[id_] for id_ in separator_ids) == ledger.separators
    words = [id_ for id_ in range(documents.tokens_K.size) if id_ not in separator_ids]
    assert len(words) == ledger.read
    in_rows = sum(seen[id_] for id_ in words)
    assert in_rows == ledger.trained + ledger.masked + ledger.overlap
    if weights is None:
        assert ledger.repeated == 0
        never = sum(not seen[id_] for id_ in words)
        assert never <= ledger.truncated + sum(ledger.dropped.values())
        if policy != "split" or overlap == 0:
            assert max(seen.values()) == 1
    if not train_on_overlap and weights is None:
        targets = Counter(id_ for row in assembled for id_ in row.ids_T[row.trained_T].tolist())
        assert max(targets.values()) == 1
        assert set(targets) <= set(np.flatnonzero(documents.trained_K).tolist())


@given(made=documents_made, seed=st.integers(0, 5))
def test_without_prompts_every_token_of_every_document_is_in_the_rows(made: list[Document], seed: int) -> None:
    whole = [([True] * max(2, len(flags)), separator) for flags, separator in made]
    documents = in_memory(whole)
    rows = PackedRows(documents, plan_rows(documents, everything(documents), PACKING, seed))
    seen = {id_ for i in range(len(rows)) for id_ in rows.row(i).ids_T.tolist()}
    assert seen == set(range(documents.tokens_K.size))
    assert not rows.ledger.dropped
    # Overlap keeps the context of each later piece's first new token, so only a document's first token is no target.
    assert rows.ledger.trained_targets == documents.tokens_K.size - len(documents)


def test_a_piece_without_a_trained_token_is_left_out_and_counted() -> None:
    rows = plan([([False] * 20 + [True] * 4, False)], replace(PACKING, overlap=0))
    assert rows.row(0).ids_T.tolist() == list(range(16, 24))
    assert rows.ledger.dropped == {PIECE_WITHOUT_TARGET: 16}
    assert (rows.ledger.examples_kept, rows.ledger.read) == (1, 24)


def test_a_document_without_a_trained_token_is_dropped_and_counted() -> None:
    rows = plan([all_trained(4), ([False] * 5, True)])
    assert rows.ledger.dropped == {NO_TARGET: 4}
    assert rows.ledger.examples_dropped == {NO_TARGET: 1}


def test_a_document_truncated_to_its_prompt_is_dropped_and_counted() -> None:
    rows = plan([all_trained(4), ([False] * 9 + [True] * 3, True)], replace(PACKING, long_documents="truncate"))
    assert rows.ledger.dropped == {TRUNCATED_TO_NO_TARGET: 8}
    assert rows.ledger.truncated == 3
    assert rows.ledger.examples_dropped == {TRUNCATED_TO_NO_TARGET: 1}


def test_long_documents_are_dropped_on_request_and_counted() -> None:
    rows = plan([all_trained(4), all_trained(9, separator=True)], replace(PACKING, long_documents="drop"))
    assert rows.ledger.dropped == {TOO_LONG: 8}
    assert rows.ledger.examples_dropped == {TOO_LONG: 1}


def test_a_separator_is_counted_apart_from_what_was_read() -> None:
    ledger = plan([all_trained(4, separator=True), ([False, True, False], True)]).ledger
    assert (ledger.read, ledger.separators, ledger.separators_trained) == (5, 2, 1)
    assert (ledger.trained, ledger.masked) == (3, 2)
    assert ledger.trained_targets == 4


def test_a_document_longer_than_a_row_is_refused_on_request() -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl:2: 9 tokens, and packing\.sequence_length is 8 \(2 such .* 12\)"):
        plan([all_trained(8), all_trained(9), all_trained(12)], replace(PACKING, long_documents="error"))
    assert len(plan([all_trained(8)], replace(PACKING, long_documents="error"))) == 1


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(DataError, match="of 1 documents none has a trained token"):
        plan([([False] * 5, False)])


def test_weights_are_met_in_trained_tokens_and_every_document_stays() -> None:
    rng = np.random.default_rng(0)
    targets = np.concatenate([rng.integers(1, 50, 1000), rng.integers(50, 200, 40), np.array([5, 5])])
    source = np.repeat([0, 1, 2], [1000, 40, 2])
    sources = [Source(path=name, weight=weight) for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2))]
    copies = copies_by_weight(targets, source, sources, seed=1)
    assert copies.min() == 1
    assert (copies[:1000] == 1).all()
    shares = np.bincount(source, targets * copies) / (targets * copies).sum()
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.01
    assert copies[1000:1040].max() - copies[1000:1040].min() <= 1
    assert copies.tolist() == copies_by_weight(targets, source, sources, seed=1).tolist()
    assert copies.tolist() != copies_by_weight(targets, source, sources, seed=2).tolist()


def test_equal_weights_of_equal_sources_repeat_nothing() -> None:
    sources = [Source(path="a", weight=1.0), Source(path="b", weight=1.0)]
    assert copies_by_weight(np.array([3, 4, 7]), np.array([0, 0, 1]), sources, seed=0).tolist() == [1, 1, 1]


def test_a_weight_without_anything_to_train_is_refused() -> None:
    sources = [Source(path="a", weight=1.0), Source(path="b", weight=1.0)]
    with pytest.raises(DataError, match="b: no trained token, so its weight"):
        copies_by_weight(np.array([3, 0]), np.array([0, 1]), sources, seed=0)


def test_repeated_tokens_are_in_the_ledger() -> None:
    sources = [Source(path="a", weight=1.0), Source(path="b", weight=3.0)]
    documents = in_memory([all_trained(7), all_trained(7)], [0, 1])
    ledger = plan_rows(documents, everything(documents, sources), PACKING, seed=0).ledger
    assert (ledger.read, ledger.repeated, ledger.rows) == (14, 14, 4)
    assert [(one.passes, one.share) for one in ledger.sources] == [(1.0, 0.25), (3.0, 0.75)]


@given(fraction=st.floats(0.05, 0.95), seed=st.integers(0, 100))
def test_held_out_depends_on_content_and_seed_alone(fraction: float, seed: int) -> None:
    digests = np.random.default_rng(5).integers(0, 2**63, 400).astype(np.uint64)
    held = held_out(digests, fraction, seed)
    assert held.tolist() == held_out(digests[::-1], fraction, seed)[::-1].tolist()
    assert held[:100].tolist() == held_out(digests[:100], fraction, seed).tolist()
    assert abs(held.mean() - fraction) < 0.15
    assert (held_out(digests, fraction * 0.5, seed) <= held).all()


def test_held_out_is_the_same_on_every_machine_and_in_every_version() -> None:
    held = held_out(np.arange(24, dtype=np.uint64), 0.3, seed=42)
    assert np.flatnonzero(held).tolist() == [4, 7, 20]


def test_seeds_hold_out_independently_of_each_other() -> None:
    """Also for digests that differ in little, and for seeds that do."""
    digests = np.arange(40_000, dtype=np.uint64)
    first, second = held_out(digests, 0.3, seed=1), held_out(digests, 0.3, seed=2)
    assert abs(first.mean() - 0.3) < 0.01
    assert abs((first & second).mean() - 0.09) < 0.005
    assert abs((first[1:] & first[:-1]).mean() - 0.09) < 0.005


def test_everything_or_nothing_is_held_out_at_the_ends() -> None:
    digests = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert held_out(digests, 1.0, seed=0).all()
    assert not held_out(digests, 0.0, seed=0).any()


@given(
    flags=st.lists(st.booleans(), min_size=1, max_size=100),
    edges=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)), min_size=1, max_size=12),
    at_once=st.sampled_from([8, 16, 64, 2**20]),
)
def test_trained_tokens_are_counted_across_blocks(
    flags: list[bool], edges: list[tuple[int, int]], at_once: int
) -> None:
    begins = np.array(sorted(min(begin, len(flags)) for begin, _ in edges))
    ends = np.maximum.accumulate(np.minimum(begins + [length for _, length in edges], len(flags)))
    documents = in_memory([(flags, False)])
    documents.trained_K[:] = flags
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_plan, "TOKENS_COUNTED_AT_ONCE", at_once)
        counted = count_trained(documents, begins, ends)
    assert counted.tolist() == [sum(flags[a:b]) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=30), at_once=st.sampled_from([1, 3, 100]), data=st.data()
)
def test_sums_by_document_do_not_depend_on_the_blocks(counts: list[int], at_once: int, data: st.DataObject) -> None:
    documents = np.repeat(np.arange(len(counts)), counts)
    values = np.array(
        data.draw(st.lists(st.integers(0, 9), min_size=documents.size, max_size=documents.size)), np.int32
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_plan, "PIECES_SUMMED_AT_ONCE", at_once)
        sums = row_plan._sums_by_document(documents, values, len(counts))
    assert sums.tolist() == [int(values[documents == n].sum()) for n in range(len(counts))]


def test_rows_of_one_token_have_nothing_to_train() -> None:
    with pytest.raises(DataError, match="none has a trained token in its rows"):
        plan([all_trained(5), all_trained(1)], replace(PACKING, sequence_length=1, overlap=0))


def test_one_document_far_longer_than_a_row() -> None:
    rows = plan([all_trained(100_003, separator=True)], replace(PACKING, overlap=0))
    assert (rows.ledger.pieces, len(rows)) == (12_501, 12_501)
    assert rows.ledger.trained_targets == 100_003 - 12_501
    assert rows.ledger.fill > 0.9999


def test_equal_lengths_leave_no_gap_where_they_divide_a_row() -> None:
    rows = plan([all_trained(4)] * 50)
    assert (len(rows), rows.ledger.fill) == (25, 1.0)


def test_documents_of_one_token_are_dropped_and_counted() -> None:
    rows = plan([all_trained(1), all_trained(1, separator=True), all_trained(8)])
    assert (rows.ledger.documents, rows.ledger.examples_dropped, rows.ledger.dropped) == (
        1,
        {NO_TARGET: 2},
        {NO_TARGET: 1},
    )


def test_an_overlap_that_leaves_no_room_is_refused_where_a_document_is_cut() -> None:
    packing = replace(PACKING, overlap=8)
    assert len(plan([all_trained(8)], packing)) == 1
    with pytest.raises(ValueError, match="an overlap of 8 tokens leaves nothing new in pieces of 8"):
        plan([all_trained(9)], packing)
