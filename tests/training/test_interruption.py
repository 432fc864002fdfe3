"""What a signal does inside and outside of what may not be interrupted."""

from __future__ import annotations

import signal

import pytest

from trainkit.training.interruption import Interruption


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT])
def test_after_another_signal_a_second_ctrl_c_stops_at_once_and_a_first_one_does_not(first: signal.Signals) -> None:
    told: list[signal.Signals] = []
    with Interruption(told.append) as interruption:
        with pytest.raises(KeyboardInterrupt), interruption.deferring():  # noqa: PT012 - the last of three counts
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGINT)
            assert interruption.received is first
            signal.raise_signal(first)
            assert told == [first]
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")
        assert interruption.requested()


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(lambda _: None) as interruption:
            with interruption.ending_at_once():
                signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
