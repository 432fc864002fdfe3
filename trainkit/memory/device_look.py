"""Makes a step on fake CPU tensors take the decisions of the device that they stand for.

Fake tensors of the device type "cpu" stand for the GPU, since autograd needs CUDA itself for a backward pass over fake
"cuda" tensors. What CUDA does otherwise than the CPU is put back here: which attention kernel runs and what it keeps,
which functions autocast widens, which pairs of operators are one kernel; and what kernels take and return within
themselves (:func:`cuda_scratch_bytes`). Read in torch 2.13; sources are named beside each.

Legend: R rows, H query heads, G key/value heads, T tokens, D width of a head, N tokens of all rows.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from trainkit.memory import kernel_scratch
from trainkit.memory.scenario import AMPERE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

aten = torch.ops.aten

_NARROW = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256

# The fp32 list of aten/src/ATen/autocast_mode.h (AT_FORALL_FP32), as far as models and losses use it. The CPU's own
# list is shorter.
_WIDENED_NAMES = (  # noqa: SIM905 - a list of words reads as one
    "exp expm1 log log10 log2 log1p reciprocal rsqrt pow softmax log_softmax cumsum cumprod sum prod norm acos asin "
    "cosh sinh tan erfinv layer_norm group_norm softplus mse_loss l1_loss nll_loss kl_div smooth_l1_loss huber_loss"
).split()
_WIDENED = {
    getattr(owner, name) for name in _WIDENED_NAMES for owner in (torch, torch.Tensor, F) if hasattr(owner, name)
} | {torch.Tensor.__pow__, torch.Tensor.__rpow__}
_SOFTMAX = {F.softmax: aten._softmax, torch.softmax: aten._softmax, torch.Tensor.softmax: aten._softmax} | {
    F.log_softmax: aten._log_softmax,
    torch.log_softmax: aten._log_softmax,
    torch.Tensor.log_softmax: aten._log_softmax,
}


class Look(TorchFunctionMode):
    """The mode: calls of the functions in ``substitutes`` go to their values, in the forward and backward pass.

    ``after_backward`` is called when a backward pass is over.
    """

    def __init__(self, substitutes: Mapping[Any, Callable[..., Any]], after_backward: Callable[[], None]) -> None:
        super().__init__()
        self._substitutes = substitutes
        self._after_backward = after_backward

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` or what stands for it."""
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            with self:  # a function mode is off within its own call, and layers run again in the backward pass
                _backward(*args, **kwargs)
            return self._after_backward()
        return self._substitutes.get(func, func)(*args, **kwargs)


def cuda_substitutes(capability: tuple[int, int]) -> dict[Any, Callable[..., Any]]:
    """What a GPU of this capability does otherwise than the CPU, by function."""
    substitutes: dict[Any, Callable[..., Any]] = {func: _widening(func) for func in _WIDENED}
    substitutes |= {func: _softmax(substitutes[func], operator) for func, operator in _SOFTMAX.items()}
    substitutes |= dict.fromkeys((F.dropout, torch.dropout), _dropout)
    substitutes[F.scaled_dot_product_attention] = partial(_cuda_attention, capability >= AMPERE)
    return substitutes


def cpu_substitutes() -> dict[Any, Callable[..., Any]]:
    """The CPU is itself, but for attention: on tensors without data torch would not take the CPU's fused kernel."""
    return {F.scaled_dot_product_attention: _cpu_attention}


def _backward(loss: torch.Tensor, gradient: torch.Tensor | None = None, **_: Any) -> None:
    """What Tensor.backward does; every function of torch above the engine would switch the mode off again."""
    gradient = torch.ones_like(loss) if gradient is None else gradient
    torch.autograd.graph._engine_run_backward(
        (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _widening(func: Callable[..., Any]) -> Callable[..., Any]:
    def widened(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    return widened


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _NARROW else value


def _softmax(otherwise: Callable[..., Any], operator: Any) -> Callable[..., Any]:
    """fp16 in, fp32 out is one kernel on CUDA (SoftMax.cu, half_to_float); bf16 is cast first."""

    def softmax(input: torch.Tensor, dim: int = -1, **kwargs: Any) -> Any:  # noqa: A002 - torch's own name
        if kwargs.get("dtype") is torch.float32 and input.dtype is torch.float16:
            return operator(input, dim, True)
        return otherwise(input, dim, **kwargs)

    return softmax


def _dropout(
    input: torch.Tensor,  # noqa: A002 - torch's own name
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """One kernel on CUDA, which keeps a mask of booleans (Dropout.cu)."""
    assert not inplace, "no model here drops in place"
    return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else input


def _as_autocast_casts(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the type that autocast computes in, where it is on."""
    return tensor.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else tensor


def _cuda_attention(
    has_flash: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that sdp_utils.cpp selects: flash, else memory-efficient, else plain mathematics.

    The memory-efficient kernel does not share key/value heads, so that GQA without flash is mathematics, with all
    T x T scores.
    """
    query, key, value = (_as_autocast_casts(tensor) for tensor in (query, key, value))
    same_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    narrow = query.dtype in _NARROW and query.shape[-1] <= _FLASH_MAX_HEAD_DIM
    if has_flash and attn_mask is None and narrow and same_width:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        mathematics = aten._scaled_dot_product_attention_math
        options = {"scale": scale, "enable_gqa": True}
        return mathematics(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]  # type: ignore[no-any-return]
    return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scale: float | None
) -> torch.Tensor:
    """Heads are padded to a multiple of 8, as pad_last_dim in transformers/attention.cpp does."""
    width = query.shape[-1]
    padding = -width % 8
    if padding:
        query, key, value = (F.pad(tensor, [0, padding]) for tensor in (query, key, value))
        scale = scale or width**-0.5
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    return out[..., :width] if padding else out


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """A boolean mask becomes an additive one of the query's type, expanded to all heads."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    out: torch.Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, trains, dropout, causal, scale=scale
    )[0]
    return out


def _cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The fused kernel where torch would choose it for real tensors of these heads and types."""
    query, key, value = (_as_autocast_casts(tensor) for tensor in (query, key, value))
    if _cpu_fuses(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]
    mathematics = aten._scaled_dot_product_attention_math
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return mathematics(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]  # type: ignore[no-any-return]


def _cpu_fuses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    gqa: bool,
) -> bool:
    """Ask torch, with real tensors of one row and two tokens."""
    with _disable_current_modes():
        small = [
            torch.empty(1, tensor.shape[1], 2, tensor.shape[3], dtype=tensor.dtype) for tensor in (query, key, value)
        ]
        small_mask = None if mask is None else torch.zeros(1, 1, 2, 2, dtype=mask.dtype)
        choice: Any = torch._fused_sdp_choice
        return bool(choice(*small, small_mask, dropout, causal, enable_gqa=gqa))


# --- what kernels take and return within themselves ---------------------------------------------------------------


def cuda_scratch(func: Any, args: tuple[Any, ...]) -> tuple[str, tuple[int, ...]] | None:
    """Which of :mod:`trainkit.memory.kernel_scratch` an operator's CUDA kernel takes, and for which numbers."""
    found = _SCRATCH.get(func)
    return None if found is None else (found[0].__name__, found[1](*args))


def cuda_scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the CUDA kernel of an operator allocates and frees within its call."""
    found = cuda_scratch(func, args)
    return 0 if found is None else kernel_scratch.BY_NAME[found[0]](*found[1])


def _flash_backward(_grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> tuple[int, ...]:
    rows, heads, tokens, width = query.shape
    return rows, tokens, heads, width, key.shape[2], key.shape[1], query.element_size()


def _varlen_backward(_grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any) -> tuple[int, ...]:
    tokens, heads, width = query.shape
    boundaries = next(tensor for tensor in rest if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32)
    return boundaries.numel() - 1, tokens, heads, width, key.shape[0], key.shape[1], query.element_size()


def _efficient_backward(_grad: torch.Tensor, query: torch.Tensor, *_: Any) -> tuple[int, ...]:
    return (query.shape[:-1].numel(),)


def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, *_: Any) -> tuple[int, ...]:
    return (grad.numel() * max(grad.element_size(), output.element_size()),)


def _index_backward(_target: torch.Tensor, indices: Any, *_: Any) -> tuple[int, ...]:
    return (max((index.numel() for index in indices if index is not None), default=0),)


_SCRATCH: dict[Any, tuple[Callable[..., int], Callable[..., tuple[int, ...]]]] = {
    aten._softmax_backward_data.default: (kernel_scratch.softmax_backward, _softmax_backward),
    aten._scaled_dot_product_flash_attention_backward.default: (kernel_scratch.flash_backward, _flash_backward),
    aten._scaled_dot_product_efficient_attention_backward.default: (
        kernel_scratch.efficient_backward,
        _efficient_backward,
    ),
    aten._index_put_impl_.default: (kernel_scratch.index_backward, _index_backward),
}
if find_spec("torch.nn.attention.varlen") is not None:
    import torch.nn.attention.varlen  # it defines the operator

    _SCRATCH[torch.ops.torch_attn._varlen_attn_backward.default] = (kernel_scratch.varlen_backward, _varlen_backward)
