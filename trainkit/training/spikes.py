"""Loss spikes: steps whose loss stands far above that of the steps before.

Pure and torch-free. How far is measured by the median of the last losses and the median distance from it, not by mean
and standard deviation: a spike that is itself among the last losses would widen a standard deviation so much that the
next one passes unseen.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WINDOW = 200  # losses that are looked back on
FEWEST = 20  # of them, before there is a judgement
THRESHOLD = 6.0
TO_STANDARD_DEVIATION = 1.4826  # of the median distance, for normally distributed losses
LEAST_SPREAD = 0.01  # of the median: where the losses hardly differ, no small step up is a spike


def spike_score(loss: float, recent: Sequence[float]) -> float | None:
    """How many (robust) standard deviations ``loss`` stands above the median of ``recent``; None where it is no spike.

    It is one above :data:`THRESHOLD`, with at least :data:`FEWEST` losses to compare with.

    >>> calm = [2.0, 2.1, 1.9, 2.05] * 5
    >>> spike_score(2.2, calm), round(spike_score(4.0, calm), 1)
    (None, 26.6)
    >>> spike_score(4.0, calm[:19])
    """
    if len(recent) < FEWEST:
        return None
    middle = median(recent)
    spread = TO_STANDARD_DEVIATION * median(abs(other - middle) for other in recent)
    score = (loss - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-12)
    return score if score > THRESHOLD else None
