"""The state of every random number generator a run draws from, as tensors and JSON: no pickle."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class RandomState:
    """Generator states of one process at one moment. ``tensors`` are uint8 or int64, ``numbers`` is plain JSON."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]

    def to_bytes(self) -> bytes:
        """As one string of bytes: the length of the JSON (8 bytes), the JSON, the tensors as safetensors."""
        numbers = json.dumps(self.numbers).encode()
        return len(numbers).to_bytes(8, "little") + numbers + save(self.tensors)

    @staticmethod
    def from_bytes(content: bytes) -> RandomState:
        """What :meth:`to_bytes` made."""
        length = int.from_bytes(content[:8], "little")
        return RandomState(load(content[8 + length :]), json.loads(content[8 : 8 + length]))


def capture_random_state() -> RandomState:
    """States of Python's, numpy's, torch's and this process's CUDA device's generator."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state().clone(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
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
    if torch.cuda.is_available() and "cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["cuda"])


def side_by_side(states: Sequence[RandomState]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The states of all processes, by rank, as tensors ``<rank>.<name>`` and a list of numbers."""
    tensors = {f"{rank}.{name}": tensor for rank, state in enumerate(states) for name, tensor in state.tensors.items()}
    return tensors, [state.numbers for state in states]


def taken_apart(tensors: dict[str, torch.Tensor], numbers: Sequence[dict[str, Any]]) -> tuple[RandomState, ...]:
    """What :func:`side_by_side` put together."""
    return tuple(
        RandomState(
            {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{rank}.")}, own
        )
        for rank, own in enumerate(numbers)
    )


def seed_everything(seed: int, rank: int = 0) -> None:
    """Start every generator from ``seed``; processes of different ``rank`` draw different numbers."""
    if rank:
        seed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries still draw from it
    torch.manual_seed(seed)
