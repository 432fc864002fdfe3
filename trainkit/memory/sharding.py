"""A step that is shared out over several GPUs, as one of them sees it.

DDP keeps a second set of gradients, in buckets. FSDP2 is traced: torch's own ``fully_shard`` runs in a group of
processes that are not there.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.utils._python_dispatch import _disable_current_modes

from trainkit.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def pretended_processes(count: int) -> Iterator[None]:
    """Inside, this process is the first of ``count``; collectives do nothing. Raises MachineError in a real group."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it registers the backend

    if dist.is_initialized():
        raise MachineError("a step under fsdp2 is estimated in a process of its own; run estimate-memory first")
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def pretended_mesh(processes: int) -> DeviceMesh:
    """The mesh of the processes that are not there."""
    from torch.distributed.device_mesh import init_device_mesh

    with _disable_current_modes():  # a mesh is made of real numbers
        return init_device_mesh("cpu", (processes,))
