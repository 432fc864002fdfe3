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

from trainkit.errors import MachineError, first_line
from trainkit.launched import AGENTS_FILE, launched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from accelerate import Accelerator

# A process that does not answer for so long is taken for dead; those of a machine load their models one by one.
COLLECTIVE_SECONDS = 1800

SIGNS_OF_LOSS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


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

    processes = launched().processes
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    try:
        # Of several processes on a CPU it makes none of a group, unless it is told that they are to be on the CPU.
        on_cpu = processes > 1 and device_of_this_process().type == "cpu"
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[timeout])
    except (ValueError, RuntimeError) as error:
        if processes == 1:
            raise
        mend = "" if AGENTS_FILE in os.environ else "; unset WORLD_SIZE, or use --launch or torchrun"
        reason = first_line(error, 150 - len(mend))
        raise MachineError(f"{processes} processes were launched and did not meet: {reason}{mend}") from error
    if accelerator.num_processes != processes:
        raise MachineError(f"{processes} processes were launched, and {accelerator.num_processes} met")
    return accelerator


def is_of_lost_process(error: BaseException | None) -> bool:
    """Whether an error, or one that it came in the way of, says that another process took no part in a collective."""
    if launched().processes == 1:
        return False
    while error is not None:
        words = str(error).lower()
        if isinstance(error, torch.distributed.DistError) or (
            isinstance(error, RuntimeError | OSError) and any(sign in words for sign in SIGNS_OF_LOSS)
        ):
            return True
        error = error.__context__
    return False


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
