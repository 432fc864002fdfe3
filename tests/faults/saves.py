"""Saves without training, for tests that make them go wrong: the functions run in forks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from trainkit.errors import MachineError
from trainkit.training.checkpoint import TrainingState
from trainkit.training.random_state import capture_random_state
from trainkit.training.retention import Retention
from trainkit.training.saving import Saver

RUN = "0123456789abcdef"


def state_of(step: int, elements: int) -> TrainingState:
    """A state with the tensors of AdamW; ``elements`` numbers of 4 bytes, three times."""
    weights = {"w": torch.full((elements,), float(step))}
    moments = {"step": torch.tensor(float(step)), "exp_avg": weights["w"] * 2, "exp_avg_sq": weights["w"] * 3}
    return TrainingState(
        step=step,
        weights=weights,
        optimizer={"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        scaler=None,
        random=(capture_random_state(),),
        counters={"step": step},
        log_bytes={"metrics": 17},
    )


def saves(root: str, first: int, last: int, keep_last: int, elements: int) -> int:
    """Save ``first`` to ``last``, one after the other; the exit code that trainkit would give."""
    try:
        with Saver(Path(root), RUN) as saver:
            for step in range(first, last + 1):
                saver.save(state_of(step, elements), Retention(keep_last))
                saver.wait()
    except MachineError as error:
        os.pwrite(1, f"{error}\n".encode(), 0)  # not by write, which may be what is made to fail
        return error.exit_code
    return 0
