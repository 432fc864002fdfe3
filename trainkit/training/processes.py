"""How the processes of one run meet, agree and tell each other small things. With one process all of it is trivial.

Nothing is pickled: what travels is numbers, and JSON or safetensors as bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from trainkit.errors import MachineError
from trainkit.launched import launched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from accelerate import Accelerator

# A process that does not answer for so long is taken for dead; those of a machine load their models one by one.
COLLECTIVE_SECONDS = 1800


def device_of_this_process() -> torch.device:
    """The device that Accelerate will take, known before any process group exists."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", launched().local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def make_accelerator() -> Accelerator:
    """Accelerate's view of device and processes; with several, this is where they first meet.

    It places, wraps and reduces. Precision and accumulation are ours, and so is sharding: torch's own ``fully_shard``
    is what Accelerate would call, and on a CPU it would not. Raises MachineError when they do not meet.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    try:
        return Accelerator(mixed_precision="no", kwargs_handlers=[timeout])
    except (ValueError, RuntimeError) as error:
        if launched().processes == 1:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise MachineError(f"{launched().processes} processes were launched and did not meet: {reason}") from error


def prepares_alone(cache: Path) -> AbstractContextManager[None]:
    """With several processes, one at a time is inside: the first makes the rows, the others find them."""
    return nullcontext() if launched().processes == 1 else _turn(cache)


@contextmanager
def _turn(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / "preparing.lock").open("a")
    except OSError as error:
        raise MachineError(f"{cache}: cannot be written: {error.strerror}; set TRAINKIT_CACHE") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def any_of(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set in any process; every process must ask."""
    return flag if accelerator.num_processes == 1 else sums(accelerator, [flag])[0] > 0


def sums(accelerator: Accelerator, numbers: Sequence[float]) -> list[float]:
    """Each number summed over all processes, in float64: counts are exact up to 2^53."""
    if accelerator.num_processes == 1:
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    reduced: torch.Tensor = accelerator.reduce(total, reduction="sum")
    return [float(number) for number in reduced.tolist()]


def from_first(accelerator: Accelerator, value: Any) -> Any:
    """What the first process gives, as JSON brings it over; the ``value`` of the others is not looked at."""
    if accelerator.num_processes == 1:
        return value
    own = json.dumps(value).encode() if accelerator.is_main_process else b""
    return json.loads(gathered(accelerator, own)[0])


def gathered(accelerator: Accelerator, content: bytes) -> list[bytes]:
    """The bytes of every process, by rank; every process gets all."""
    if accelerator.num_processes == 1:
        return [content]
    sizes = _gathered(accelerator, torch.tensor([len(content)], dtype=torch.int64))
    padded = torch.zeros(int(max(size.item() for size in sizes)), dtype=torch.uint8)
    padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else padded[:0]
    everyone = _gathered(accelerator, padded)
    return [own[: int(size.item())].numpy().tobytes() for own, size in zip(everyone, sizes, strict=True)]


def _gathered(accelerator: Accelerator, tensor: torch.Tensor) -> list[torch.Tensor]:
    there = tensor.to(accelerator.device)
    everyone = [torch.empty_like(there) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(everyone, there)
    return [own.cpu() for own in everyone]
