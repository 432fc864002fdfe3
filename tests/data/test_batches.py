"""Rows → tensors: every switch by itself, and targets that no switch moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.batches import NOT_A_TARGET, empty_batch, epoch_order, make_batch, share_out
from trainkit.data.packed_store import Row
from trainkit.recipe.schema import Packing

PACKING = Packing(sequence_length=8)
PAD = 99


def row(*segments: tuple[list[int], list[int]]) -> Row:
    """Segments as (ids, trained flags)."""
    return Row(
        np.concatenate([np.array(ids, np.int32) for ids, _ in segments]),
        np.concatenate([np.array(trained, np.bool_) for _, trained in segments]),
        np.array([len(ids) for ids, _ in segments], np.int32),
    )


TWO_DOCUMENTS = row(([10, 11, 12], [0, 1, 1]), ([20, 21], [0, 1]))
FULL = row(([30, 31, 32, 33, 34, 35, 36, 37], [0, 0, 0, 0, 1, 1, 1, 1]))


@given(rows=st.integers(0, 200), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(rows))
    assert order.tolist() == epoch_order(rows, seed, epoch).tolist()
    assert rows < 20 or order.tolist() != epoch_order(rows, seed, epoch + 1).tolist()
    assert rows < 20 or order.tolist() != epoch_order(rows, seed + 1, epoch).tolist()


def test_labels_are_the_next_token_where_that_is_a_target() -> None:
    batch = make_batch([TWO_DOCUMENTS, FULL], PACKING, PAD)
    assert batch.input_ids_RT.tolist() == [[10, 11, 12, 20, 21, PAD, PAD, PAD], [30, 31, 32, 33, 34, 35, 36, 37]]
    assert batch.labels_RT.tolist() == [
        [11, 12, -100, 21, -100, -100, -100, -100],
        [-100, -100, -100, 34, 35, 36, 37, -100],
    ]
    assert (batch.trained_tokens, batch.tokens) == (7, 13)


def test_documents_and_padding_are_segments_with_positions_of_their_own() -> None:
    batch = make_batch([TWO_DOCUMENTS, FULL], PACKING, PAD)
    assert batch.segment_lengths == ((3, 2, 3), (8,))
    assert batch.position_ids_RT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]


def test_without_isolation_a_row_is_one_segment_and_positions_still_restart() -> None:
    batch = make_batch([TWO_DOCUMENTS], replace(PACKING, isolate_documents=False), PAD)
    assert batch.segment_lengths == ((8,),)
    assert batch.position_ids_RT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def test_without_reset_positions_run_through_the_row_and_documents_stay_isolated() -> None:
    batch = make_batch([TWO_DOCUMENTS], replace(PACKING, reset_positions=False), PAD)
    assert batch.segment_lengths == ((3, 2, 3),)
    assert batch.position_ids_RT.tolist() == [list(range(8))]


def test_rows_that_are_not_packed_are_padded_to_the_longest_of_the_micro_batch() -> None:
    short, longer = row(([1, 2], [0, 1])), row(([3, 4, 5, 6, 7], [0, 0, 1, 1, 1]))
    batch = make_batch([short, longer], replace(PACKING, strategy="none"), PAD)
    assert batch.input_ids_RT.tolist() == [[1, 2, PAD, PAD, PAD], [3, 4, 5, 6, 7]]
    assert batch.segment_lengths == ((2, 3), (5,))
    assert (batch.trained_tokens, batch.tokens) == (4, 7)


def test_a_pad_token_that_is_also_a_real_token_stays_a_target_where_it_is_real() -> None:
    batch = make_batch([row(([1, PAD], [0, 1]))], PACKING, PAD)
    assert batch.labels_RT.tolist()[0][:2] == [PAD, -100]
    assert batch.trained_tokens == 1


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        make_batch([], PACKING, PAD)


segments = st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4)


@given(
    rows=st.lists(segments, min_size=1, max_size=4), isolate=st.booleans(), reset=st.booleans(), seed=st.integers(0, 9)
)
def test_every_target_is_predicted_from_the_token_before_it(
    rows: list[list[list[bool]]], isolate: bool, reset: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    made = [row(*[(rng.integers(0, 90, len(s)).tolist(), [0, *s[1:]]) for s in segments]) for segments in rows]
    packing = Packing(sequence_length=20, isolate_documents=isolate, reset_positions=reset)
    batch = make_batch(made, packing, PAD)
    assert batch.trained_tokens == sum(int(one.trained_T.sum()) for one in made)
    assert batch.tokens == sum(one.ids_T.size for one in made)
    for one, labels, positions, lengths in zip(
        made, batch.labels_RT.tolist(), batch.position_ids_RT.tolist(), batch.segment_lengths, strict=True
    ):
        size = one.ids_T.size
        assert labels == [int(one.ids_T[t + 1]) if t + 1 < size and one.trained_T[t + 1] else -100 for t in range(20)]
        of_documents = [*one.segment_lengths.tolist(), 20 - size][: None if size < 20 else -1]
        assert list(lengths) == (of_documents if isolate else [20])
        assert positions == [t for length in (of_documents if reset else [20]) for t in range(length)]
    assert {t.dtype for t in (batch.input_ids_RT, batch.labels_RT, batch.position_ids_RT)} == {torch.int64}


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_rows_are_shared_out_each_once_and_evenly(work: list[int], processes: int) -> None:
    shares = share_out(work, processes)
    assert len(shares) == processes
    assert sorted(index for share in shares for index in share) == list(range(len(work)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert all(share == sorted(share) for share in shares)


def test_the_work_is_about_the_same() -> None:
    """At most the heaviest row apart, where rows are many; cutting by position is far worse."""
    work = [((index * 7919) % 101) ** 2 for index in range(64)]
    for processes in (2, 4, 8):
        sums = [sum(work[index] for index in share) for share in share_out(work, processes)]
        assert max(sums) - min(sums) <= max(work) / 2
        by_position = [sum(work[process::processes]) for process in range(processes)]
        assert max(sums) < max(by_position)


def test_an_empty_batch_trains_nothing() -> None:
    batch = empty_batch(pad_id=3)
    assert batch.trained_tokens == batch.tokens == 0
    assert (batch.labels_RT == NOT_A_TARGET).all()
    assert sum(batch.segment_lengths[0]) == batch.input_ids_RT.shape[1]


def test_the_order_of_an_epoch_is_drawn_once_and_not_to_be_written_to() -> None:
    order = epoch_order(100, 1, 0)
    assert epoch_order(100, 1, 0) is order
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
