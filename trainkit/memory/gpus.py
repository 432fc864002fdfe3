"""What a GPU offers to a process: ``configs/gpus.yaml``. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from trainkit.errors import UsageError
from trainkit.memory.sizes import GIB
from trainkit.memory.tables import configs_folder, near_names, plain_name, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping

# What the names that nvidia-smi prints hold besides, and what says nothing about memory. "Laptop GPU" and "Ti" do.
_NO_MATTER = re.compile(
    r"-(nvidia|tesla|geforce|sxm[0-9]?|pcie|hbm[0-9]e?|generation|blackwell|(max-q-)?(server|workstation)-edition)(?=-)"
)
_SHOWN = 3  # names of the table, where none is near


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
    """The GPU of this name, however it is spelt. Raises UsageError with the near names for one that is not known.

    >>> [find_gpu(name).name for name in ("4090", "NVIDIA A100-SXM4-80GB", "a100-80")]
    ['rtx-4090-24gb', 'a100-80gb', 'a100-80gb']
    """
    by_name = {spelling: gpu for gpu in known_gpus().values() for spelling in (gpu.name, *gpu.aliases)}
    plain = _NO_MATTER.sub("", f"-{plain_name(name)}-").strip("-")
    for spelling in (plain, f"rtx-{plain}", plain.replace("rtx", "rtx-", 1), f"{plain}gb", f"rtx-{plain}gb"):
        if spelling in by_name:
            return by_name[spelling]
    if near := near_names(plain, by_name):
        hint = f"near: {', '.join(near)}"
    else:
        shown = list(known_gpus())[:_SHOWN]
        hint = f"known are {', '.join(shown)} and {len(known_gpus()) - len(shown)} more (configs/gpus.yaml)"
    raise UsageError(f"--gpu: `{name[:40]}` is not known; {hint}; or give --memory, as --memory 24GiB")
