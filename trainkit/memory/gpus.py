"""What a GPU offers to a process: ``configs/gpus.yaml``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trainkit.errors import UsageError
from trainkit.memory.sizes import GIB
from trainkit.memory.tables import configs_folder, near_names, plain_name, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name in the table: usable memory in bytes, CUDA compute capability, other names."""

    name: str
    usable_bytes: int
    capability: tuple[int, int]
    aliases: tuple[str, ...]


@cache
def known_gpus() -> Mapping[str, Gpu]:
    """The GPUs of the table by name, in the table's order."""
    found = {}
    for name, facts in read_table(configs_folder() / "gpus.yaml").items():
        major, minor = str(float(facts["capability"])).split(".")
        usable = int(facts["usable_gib"] * GIB)
        found[name] = Gpu(name, usable, (int(major), int(minor)), tuple(facts["aliases"]))
    return found


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, however it is spelt. Raises UsageError with the near names for one that is not known."""
    by_name = {spelling: gpu for gpu in known_gpus().values() for spelling in (gpu.name, *gpu.aliases)}
    plain = plain_name(name).removeprefix("nvidia-").removeprefix("geforce-")
    for spelling in (plain, f"rtx-{plain}", plain.replace("rtx", "rtx-", 1)):
        if spelling in by_name:
            return by_name[spelling]
    near = near_names(plain, by_name) or list(known_gpus())
    raise UsageError(f"--gpu: `{name[:40]}` is not known; near: {', '.join(near)}; or give --memory, as --memory 24GiB")
