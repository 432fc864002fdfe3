"""The state of every random number generator a run draws from, as tensors and JSON: no pickle."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """Generator states at one moment. ``tensors`` are uint8 or uint32, ``numbers`` is plain JSON."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]


def capture_random_state() -> RandomState:
    """States of Python's, numpy's, torch's and each CUDA device's generator."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state().clone(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    numbers = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"name": str(name), "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    return RandomState(tensors, numbers)


def restore_random_state(state: RandomState) -> None:
    """Put every generator back to where :func:`capture_random_state` found it."""
    python, numpy = state.numbers["python"], state.numbers["numpy"]
    random.setstate((python["version"], tuple(state.tensors["python"].tolist()), python["gauss"]))
    keys = state.tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002 - the legacy generator is the global one
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state.tensors["torch"])
    if torch.cuda.is_available():
        devices = sorted(name for name in state.tensors if name.startswith("cuda."))
        for name in devices[: torch.cuda.device_count()]:
            torch.cuda.set_rng_state(state.tensors[name], int(name.removeprefix("cuda.")))


def seed_everything(seed: int) -> None:
    """Start every generator from ``seed``."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries still draw from it
    torch.manual_seed(seed)
