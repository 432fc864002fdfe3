"""What a step without data says when its code asks for a number: that every token is trained and nothing overflows."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _bodies() -> dict[Any, Any]:
    """Operators of torch that are written in Python over other operators: what they allocate is seen when they run.

    On tensors without data only their outputs would be made.
    """
    try:
        from torch.nn.modules.linear_cross_entropy import _linear_cross_entropy_batch_chunked as chunked
    except ImportError:  # torch below 2.13, which has no chunked loss
        return {}
    return {chunked._opoverload: chunked._init_fn}


_BODIES = _bodies()


class Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode. It stands above the tracker, which sees what the answers cost: the positions that a mask selects."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scaler = scaler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer, or run the operator."""
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it turns into operators on its local part first
        if (body := _BODIES.get(func)) is not None:
            with self:
                return body(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten.nonzero.default:
            mask = args[0]
            return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)
        if func in {aten.index.Tensor, aten._index_put_impl_.default, aten.index_put.default, aten.index_put_.default}:
            return func(args[0], _positions(args[1]), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _number(self, tensor: torch.Tensor) -> float:
        if tensor.dtype == torch.bool:
            return True
        if not tensor.is_floating_point():
            return 1
        if self._scaler is not None and tensor is self._scaler._scale:
            return 2.0**16
        return 0.0 if self._counts_overflows(tensor) else 1.0

    def _counts_overflows(self, tensor: torch.Tensor) -> bool:
        if self._scaler is None:
            return False
        states = self._scaler._per_optimizer_states.values()
        return any(tensor is found for state in states for found in state["found_inf_per_device"].values())


def _positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """A mask among indices selects everything; it becomes one vector of positions for each of its dimensions."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        else:
            found.append(index)
    return found
