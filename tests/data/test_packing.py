"""Lengths → pieces → bins, against the rules they must keep and the textbook algorithm."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data import packing
from trainkit.data.packing import Bins, _place_groups, _spread_groups, best_fit, cut, lower_bound, one_a_bin

lengths_of_documents = st.lists(st.integers(0, 60), max_size=30)
lengths_of_pieces = st.lists(st.integers(1, 24), min_size=1, max_size=120)


def fill_of_bins(bins: Bins, lengths: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> list[int]:
    return [int(lengths[part].sum()) for part in np.split(bins.order_P, bins.offsets_B[1:-1])]


def textbook_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


@given(lengths=lengths_of_documents, sequence_length=st.integers(1, 20), data=st.data())
def test_pieces_without_their_overlap_join_to_the_document(
    lengths: list[int], sequence_length: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, sequence_length - 1))
    pieces = cut(np.array(lengths, np.int64), sequence_length, "split", overlap)
    joined: dict[int, list[int]] = {document: [] for document in range(len(lengths))}
    for document, start, length, repeated in zip(
        pieces.document_P.tolist(),
        pieces.start_P.tolist(),
        pieces.length_P.tolist(),
        pieces.overlap_P.tolist(),
        strict=True,
    ):
        assert repeated < length <= sequence_length
        so_far = joined[document]
        assert repeated == (overlap if so_far else 0)
        assert so_far[len(so_far) - repeated :] == list(range(start, start + repeated))
        so_far.extend(range(start + repeated, start + length))
    assert joined == {document: list(range(length)) for document, length in enumerate(lengths)}


def test_every_piece_but_the_last_of_a_document_is_full() -> None:
    pieces = cut(np.array([100]), 16, "split", 4)
    assert pieces.length_P.tolist() == [16] * 8
    assert pieces.start_P.tolist() == list(range(0, 96, 12))
    assert cut(np.array([101]), 16, "split", 4).length_P.tolist() == [*[16] * 8, 5]


def test_a_document_that_just_fits_is_not_cut() -> None:
    assert len(cut(np.array([16]), 16, "split", 15)) == 1
    assert cut(np.array([17]), 16, "split", 15).length_P.tolist() == [16, 16]


def test_truncate_keeps_the_beginning_and_drop_nothing_of_a_long_document() -> None:
    truncated = cut(np.array([9, 4, 5]), 4, "truncate")
    assert (truncated.document_P.tolist(), truncated.length_P.tolist()) == ([0, 1, 2], [4, 4, 4])
    assert not truncated.start_P.any()
    assert not truncated.overlap_P.any()
    assert cut(np.array([9, 4, 5]), 4, "drop").document_P.tolist() == [1]


def test_positions_beyond_32_bits_stay_exact() -> None:
    pieces = cut(np.array([3 * 2**31]), 2**20, "split", 0)
    assert len(pieces) == 3 * 2**11
    assert int(pieces.start_P[-1]) == 3 * 2**31 - 2**20


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_an_overlap_without_room_for_a_new_token_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="leaves nothing new"):
        cut(np.array([100]), 8, "split", overlap)


@given(lengths=lengths_of_pieces, seed=st.integers(0, 2**32 - 1))
def test_every_piece_is_in_one_bin_and_no_bin_is_too_full(lengths: list[int], seed: int) -> None:
    array = np.array(lengths)
    bins = best_fit(array, 24, seed)
    assert sorted(bins.order_P.tolist()) == list(range(len(lengths)))
    fills = fill_of_bins(bins, array)
    assert min(fills) > 0
    assert max(fills) <= 24
    assert len(bins) >= lower_bound(array, 24)


@given(lengths=lengths_of_pieces)
def test_groups_are_placed_as_the_textbook_places_pieces(lengths: list[int]) -> None:
    bin_P, slot_P = _spread_groups(_place_groups(np.bincount(lengths, minlength=25), 24))
    fills = np.bincount(bin_P, weights=sorted(lengths, reverse=True)).astype(int)
    assert sorted(fills.tolist()) == textbook_best_fit_decreasing(lengths, 24)
    assert len(set(zip(bin_P.tolist(), slot_P.tolist(), strict=True))) == len(lengths)


@given(lengths=lengths_of_pieces, seed=st.integers(0, 3))
def test_there_are_never_more_bins_than_in_the_textbook(lengths: list[int], seed: int) -> None:
    assert len(best_fit(np.array(lengths), 24, seed)) <= len(textbook_best_fit_decreasing(lengths, 24))


def test_bins_with_gaps_are_refilled_where_that_saves_one() -> None:
    lengths = np.random.default_rng(0).integers(20, 120, 3000)
    assert len(textbook_best_fit_decreasing(lengths.tolist(), 256)) == 833
    assert len(best_fit(lengths, 256, 0)) == lower_bound(lengths, 256) == 828


@given(lengths=lengths_of_pieces)
def test_the_same_seed_gives_the_same_bins(lengths: list[int]) -> None:
    first, second = (best_fit(np.array(lengths), 24, seed=7) for _ in range(2))
    assert first.order_P.tolist() == second.order_P.tolist()
    assert first.offsets_B.tolist() == second.offsets_B.tolist()


def test_another_seed_shuffles_documents_and_bins() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    first, second = best_fit(lengths, 512, seed=1), best_fit(lengths, 512, seed=2)
    assert len(first) == len(second)
    assert first.order_P.tolist() != second.order_P.tolist()
    longest_first = [int(np.argmax(lengths[part])) == 0 for part in np.split(first.order_P, first.offsets_B[1:-1])]
    assert sum(longest_first) < 0.8 * len(first)


def test_bins_are_not_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    bins = best_fit(lengths, 512, seed=1)
    longest = [int(lengths[part].max()) for part in np.split(bins.order_P, bins.offsets_B[1:-1])]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 10


@pytest.mark.parametrize("capacity", [1, 8, 100_000])
def test_equal_lengths_fill_bins_evenly(capacity: int) -> None:
    assert len(best_fit(np.full(10, capacity), capacity, 0)) == 10
    assert len(best_fit(np.ones(10, np.int64), capacity, 0)) == -(-10 // capacity)


def test_no_pieces_give_no_bins() -> None:
    assert len(best_fit(np.array([], np.int64), 8, 0)) == 0
    assert len(one_a_bin(0)) == 0


@pytest.mark.parametrize("length", [0, 9])
def test_a_piece_that_fits_no_bin_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        best_fit(np.array([4, length]), 8, 0)


def test_alpaca_is_packed_close_to_the_bound(material: Path) -> None:
    lengths = np.load(material / "data" / "alpaca_lengths.npy")
    bins = best_fit(lengths, 2048, seed=42)
    assert lower_bound(lengths, 2048) == 2620
    assert len(bins) <= 2621


@given(
    lengths=lengths_of_documents, sequence_length=st.integers(1, 20), overlap=st.integers(0, 5), seed=st.integers(0, 9)
)
def test_cut_and_packed_every_token_stands_in_one_bin_once(
    lengths: list[int], sequence_length: int, overlap: int, seed: int
) -> None:
    pieces = cut(np.array(lengths, np.int64), sequence_length, "split", min(overlap, sequence_length - 1))
    bins = best_fit(pieces.length_P, sequence_length, seed)
    placed = pieces.take(bins.order_P)
    tokens = sorted(
        (document, at)
        for document, start, length, repeated in zip(
            placed.document_P.tolist(),
            placed.start_P.tolist(),
            placed.length_P.tolist(),
            placed.overlap_P.tolist(),
            strict=True,
        )
        for at in range(start + repeated, start + length)
    )
    assert tokens == [(document, at) for document, length in enumerate(lengths) for at in range(length)]


SHAPES = {
    "just over half": np.full(5000, 1025),
    "over half, all different": np.arange(1025, 2025),
    "all equal": np.full(5000, 300),
    "two lengths": np.repeat([1500, 700], 2500),
    "three that never fill a bin": np.tile([1000, 700, 683], 2000),
    "powers of two": 2 ** (np.arange(6000) % 12),
    "powers of two and one": 2 ** (np.arange(6000) % 11) + 1,
    "a third and a little": 683 + np.arange(6000) % 50,
    "one": np.array([7]),
    "ones": np.ones(5000, np.int64),
    "multiples of seven": 7 * (1 + np.arange(6000) % 290),
    "every length": np.arange(1, 2049),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_are_hard_to_fill_are_packed_as_the_textbook_does_or_better(shape: str) -> None:
    lengths = SHAPES[shape]
    bins = best_fit(lengths, 2048, seed=3)
    assert sorted(bins.order_P.tolist()) == list(range(lengths.size))
    assert max(fill_of_bins(bins, lengths)) <= 2048
    groups = packing._place_groups(np.bincount(lengths, minlength=2049), 2048)
    assert len(bins) <= int((groups[:, 0] + groups[:, 1]).max())


@pytest.mark.parametrize("shape", ["just over half", "three that never fill a bin", "a third and a little"])
def test_the_second_pass_stops_where_a_bin_can_no_longer_be_saved(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    search = packing._pair_that_closes

    def counted(left_L: "np.ndarray[tuple[int], np.dtype[np.int64]]", room: int) -> list[int]:
        searches.append(room)
        return search(left_L, room)

    monkeypatch.setattr(packing, "_pair_that_closes", counted)
    monkeypatch.setattr(packing, "MOST_LENGTHS_COMPARED", 2**20)
    best_fit(np.tile(SHAPES[shape], 20), 2048, seed=0)
    assert sum(searches) + len(searches) * packing.LENGTHS_A_CALL_IS_WORTH < 2**21


def test_without_time_for_the_second_pass_the_first_one_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(20, 120, 3000)
    monkeypatch.setattr(packing, "MOST_LENGTHS_COMPARED", 0)
    assert len(best_fit(lengths, 256, 0)) == 833


def test_rows_longer_than_16_bits_are_packed_alike() -> None:
    """Sorting takes two passes from 65,536 on; scaled lengths make the same bins."""
    lengths = np.random.default_rng(1).integers(1, 200, 3000)
    small, large = best_fit(lengths, 400, seed=5), best_fit(lengths * 1000, 400_000, seed=5)
    assert small.order_P.tolist() == large.order_P.tolist()
    assert small.offsets_B.tolist() == large.offsets_B.tolist()


def test_a_million_long_tailed_documents_come_within_a_few_rows_of_the_bound() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.8093, 1.1, 1_000_000), 1, 2**17).astype(np.int64)
    pieces = cut(lengths, 2048, "split")
    assert int(pieces.length_P.sum(dtype=np.int64)) == int(lengths.sum())
    bins = best_fit(pieces.length_P, 2048, seed=42)
    assert len(bins) <= lower_bound(lengths, 2048) + 8
    fills = np.add.reduceat(pieces.length_P[bins.order_P], bins.offsets_B[:-1])
    assert fills.max() <= 2048
    assert np.array_equal(np.sort(bins.order_P), np.arange(len(pieces)))


def test_positions_are_narrow_where_they_fit() -> None:
    pieces = cut(np.array([5, 6]), 4, "split")
    assert [str(array.dtype) for array in (pieces.document_P, pieces.start_P)] == ["int32", "int32"]
    assert str(cut(np.array([2**31]), 2**20, "split").start_P.dtype) == "int64"
