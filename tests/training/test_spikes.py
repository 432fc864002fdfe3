"""Which losses are called spikes."""

from __future__ import annotations

import random

import pytest

from trainkit.training.loop import Counters
from trainkit.training.spikes import FEWEST, THRESHOLD, WINDOW, spike_score


def noisy(count: int, around: float = 2.0, spread: float = 0.1) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(around, spread) for _ in range(count)]


def test_the_score_counts_standard_deviations() -> None:
    score = spike_score(2.0 + 10 * 0.1, noisy(WINDOW))
    assert score == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("loss", [2.3, 2.0, 0.1, -5.0])
def test_what_is_usual_or_low_is_none(loss: float) -> None:
    assert spike_score(loss, noisy(WINDOW)) is None


def test_a_spike_among_the_last_losses_does_not_hide_the_next() -> None:
    assert spike_score(4.0, [*noisy(50), 400.0, 400.0]) is not None


def test_a_falling_curve_and_a_flat_one_have_none() -> None:
    counters = Counters()
    falling = [8.0 * 0.97**step for step in range(150)]
    flat = [0.01 + 1e-6 * (step % 3) for step in range(150)]
    assert [counters.note_loss(loss) for loss in falling + flat] == [(None, False)] * 300


def test_few_losses_are_no_judgement() -> None:
    assert spike_score(1e6, noisy(FEWEST - 1)) is None
    assert spike_score(1e6, noisy(FEWEST)) is not None


def test_steps_that_stay_high_are_one_spike_and_the_window_moves_on() -> None:
    counters = Counters(recent_losses=noisy(WINDOW))
    said = [counters.note_loss(loss) for loss in (5.0, 5.1, 2.0, 5.0)]
    assert [begins for _, begins in said] == [True, False, False, True]
    assert [score is not None and score > THRESHOLD for score, _ in said] == [True, True, False, True]
    assert counters.spikes == 2
    assert counters.recent_losses == [*noisy(WINDOW)[4:], 5.0, 5.1, 2.0, 5.0]
