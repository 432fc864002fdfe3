"""What a packing is compared with: every number against a count by hand or by brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.packing_quality import length_bands, padding_share, slots_in_random_batches

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 7))
def test_expected_slots_are_the_mean_over_every_order(lengths: list[int], batch_size: int) -> None:
    slots = []
    for order in itertools.permutations(lengths):
        batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
        slots.append(sum(len(batch) * max(batch) for batch in batches))
    assert slots_in_random_batches(np.array(lengths), batch_size) == pytest.approx(float(np.mean(slots)))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=80), st.integers(1, 40))
def test_batches_need_no_less_than_the_tokens_and_no_more_than_the_longest(lengths: list[int], size: int) -> None:
    slots = slots_in_random_batches(np.array(lengths), size)
    assert sum(lengths) - 1e-6 <= slots <= max(lengths) * len(lengths) + 1e-6
    assert slots <= slots_in_random_batches(np.array(lengths), len(lengths)) + 1e-6


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_bands_follow_each_other_and_hold_every_document_once(lengths: list[int]) -> None:
    bands = length_bands(np.array(lengths))
    assert [band.documents for band in bands] == [
        sum(band.shortest <= length <= band.longest for length in lengths) for band in bands
    ]
    assert sum(band.documents for band in bands) == len(lengths)
    assert all(below.longest + 1 == above.shortest for below, above in itertools.pairwise(bands))
    assert bands[0].documents
    assert bands[-1].documents
    assert len(bands) <= 15


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50), st.integers(0, 14))
def test_no_band_straddles_a_power_of_two_that_is_as_wide(lengths: list[int], power: int) -> None:
    for band in length_bands(np.array(lengths)):
        if band.longest - band.shortest < 2**power:
            assert not band.shortest <= 2**power < band.longest


def test_padding_of_real_lengths_is_what_was_measured_elsewhere(material: Path) -> None:
    """Alpaca with the Qwen tokenizer: drawn batches say 47 % and 62 %; padded to 2048 almost nothing is text."""
    lengths = np.load(material / "data" / "alpaca_lengths.npy")
    tokens = int(lengths.sum())
    assert padding_share(tokens, slots_in_random_batches(lengths, 8)) == pytest.approx(0.47, abs=0.01)
    assert padding_share(tokens, slots_in_random_batches(lengths, 32)) == pytest.approx(0.62, abs=0.01)
    rng = np.random.default_rng(0)
    drawn = rng.permutation(lengths)[: lengths.size // 32 * 32].reshape(-1, 32)
    assert padding_share(int(drawn.sum()), 32 * float(drawn.max(axis=1).sum())) == pytest.approx(
        padding_share(tokens, slots_in_random_batches(lengths, 32)), abs=0.01
    )
