"""A step that is shared out over several GPUs, as one of them sees it.

DDP keeps a second set of gradients, in buckets. FSDP2 is traced: torch's own ``fully_shard`` runs in a group of
processes that are not there.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trainkit.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainkit.model.precision import PrecisionPlan


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


def shard_fully(
    loss_model: torch.nn.Module, model: Any, layers: torch.nn.ModuleList, precision: PrecisionPlan, processes: int
) -> None:
    """FSDP2 over all processes: every layer and the embedding gather their weights when they run, the rest once.

    Shards are stored as before, gathered in the compute type, and gradients are reduced in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with _disable_current_modes():  # a mesh is made of real numbers
        mesh = init_device_mesh("cpu", (processes,))
    policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for module in (*layers, *(() if tied else (embedding,)), loss_model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
