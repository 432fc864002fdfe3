"""Weights, gradients and moments shared out over processes (FSDP2); the memory estimate traces this very code.

Every layer is a group: its weights are gathered when it runs and given back afterwards. Gathered, they have the
compute type of the run, in which autocast would use them; shards keep the type that the run stores them in, and
gradients are reduced in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainkit.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trainkit.model.loss import LossModel
    from trainkit.model.precision import PrecisionPlan


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules, which holds the decoder's layers. Raises ModelError where there is none."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not name.endswith("experts")
    ]
    if not lists:
        raise ModelError(f"{type(model).__name__} keeps its layers in no list, so that they can be found")
    return max(lists, key=len)


def shard_fully(loss_model: LossModel, precision: PrecisionPlan, mesh: DeviceMesh) -> None:
    """Share the weights of ``loss_model`` out over ``mesh``, in place: layer by layer, the embedding, and the rest.

    Each piece moves to the mesh's device when it is shared out, so that a model which lies in host memory needs no
    room on the device but for its shard and one layer. Besides the forward pass, ``logits``, ``generate`` and
    ``find_head`` of the :class:`LossModel` gather what they need; every process must call them alike.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=torch.float32)
    model: Any = loss_model.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for module in (*decoder_layers(model), *(() if tied else (embedding,)), loss_model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for method in ("logits", "generate", "find_head"):
        register_fsdp_forward_method(loss_model, method)


def give_back(loss_model: nn.Module) -> None:
    """Let every gathered weight be a shard again: what a forward pass without a backward one leaves gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in loss_model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the part of one process."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of ``tensor`` lies in this process; all of it where it is not shared out."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is shared out, or partial sums added up; every process must ask, and gets it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of_part(tensor: torch.Tensor) -> tuple[int, int]:
    """Which rows (first dimension) of the whole tensor lie here: the first, and the one behind the last.

    torch cuts a dimension of n rows into pieces of ceil(n / processes); late processes may have none.
    """
    from torch.distributed.tensor import DTensor

    rows = tensor.shape[0]
    if not isinstance(tensor, DTensor):
        return 0, rows
    processes, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    most = -(-rows // processes)
    return min(rank * most, rows), min((rank + 1) * most, rows)


def part_like(local: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``local`` as this process's part of a tensor that is shared out as ``whole`` is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(whole, DTensor):
        return local
    return DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
