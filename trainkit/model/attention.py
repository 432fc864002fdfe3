"""Attention that keeps the documents of a row apart, without a mask of T x T elements.

Legend: R rows, T tokens in a row, S segments of all rows, H query heads, G key/value heads, D width of a head.
A segment is a run of consecutive tokens of one row that see each other (causally) and nobody else.

How the segments reach a layer. transformers' models ask a registered *mask function* for the mask once per forward
pass and hand its answer to every layer, untouched. Ours answers with a :class:`DocumentMask`, which says where the
documents end; our *attention function* reads it. The layer's mask is one of its arguments, so a layer that is
replayed in the backward pass (activation checkpointing) gets the very same one: nothing is looked up at that time.
Outside of :func:`document_segments` both functions are transformers' own SDPA, so that generation with a cache and a
padding mask works with the same model object.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    eager_mask,
    flex_attention_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from trainkit.errors import MachineError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

Requested = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flex", "eager"]
Name = Literal["sdpa", "varlen", "flash_attention_2", "flex", "eager"]
SegmentLengths = Sequence[Sequence[int]]

# Names under which transformers finds each kernel. Ours do not contain "flash": transformers treats such a name as
# a request to load the flash-attn package or a kernel from the hub.
_IMPLEMENTATIONS: dict[Name, str] = {
    "sdpa": "trainkit_sdpa",
    "varlen": "trainkit_varlen",
    "flash_attention_2": "trainkit_fa2",
    "flex": "flex_attention",
    "eager": "eager",
}

# Arguments of a layer that change nothing in the attention of one document; `sliding_window` and
# `is_causal` are compared with the mask.
_HARMLESS = frozenset(
    {
        "position_ids",
        "sliding_window",
        "is_causal",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)

# What the variable-length flash kernels take.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_KERNEL_CAPABILITY = (8, 0)
_KERNEL_MAX_HEAD_DIM = 256

_segment_lengths: ContextVar[SegmentLengths | None] = ContextVar("segment_lengths", default=None)


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel of a run. ``implementation`` is its name inside transformers; ``reason`` is a sentence to show."""

    name: Name
    implementation: str
    reason: str


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """Stands where a layer expects its mask: the segments of all rows, one after the other.

    ``window`` is the layer's sliding window in tokens (a token sees itself and ``window - 1`` before it).
    ``boundaries`` holds 0 and the end of each segment in the flattened batch: int32, shape (S + 1,).
    """

    lengths: tuple[int, ...]
    window: int | None
    boundaries: torch.Tensor


def choose_attention(
    requested: Requested,
    device: torch.device,
    config: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> AttentionChoice:
    """The kernel for ``model.attention: requested`` on this device and model.

    ``capability`` is that of a GPU that is not here; without it the device is asked for its own. Raises
    :class:`MachineError` where the device or an optional package is missing, :class:`ModelError` where the model
    computes attention in a way that the kernel does not.
    """
    register()
    text = config.get_text_config()
    if getattr(text, "attention_chunk_size", None) is not None:
        raise ModelError(
            f"{config.model_type}: chunked attention cannot be combined with document isolation; use another model"
        )
    only_eager = _only_eager(text)
    name: Name
    if requested != "auto":
        name, reason = requested, _check_request(requested, device, text, only_eager, capability)
    elif only_eager is not None:
        name, reason = "eager", only_eager
    else:
        name, reason = _fastest(device, text, capability)
    return AttentionChoice(name, _IMPLEMENTATIONS[name], f"{name}: {reason}")


def install_attention(model: PreTrainedModel | PeftModel, choice: AttentionChoice) -> None:
    """Make every layer use the chosen kernel. Raises :class:`ModelError` where the architecture does not let it."""
    register()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        base.set_attn_implementation(choice.implementation)
    except (ValueError, ImportError) as error:
        raise ModelError(f"{type(base).__name__} has no attention {choice.name}; set model.attention: eager") from error
    installed = base.config.get_text_config()._attn_implementation  # noqa: SLF001 - its only name
    if installed != choice.implementation:
        way_out = "train another model" if choice.name == "eager" else "set model.attention: eager"
        raise ModelError(f"{type(base).__name__} does not let its attention be replaced; {way_out}")


@contextmanager
def document_segments(lengths: SegmentLengths) -> Iterator[None]:
    """Inside, the model's forward pass treats each row as these segments: ``lengths[row]`` sums to the row's tokens."""
    token = _segment_lengths.set(lengths)
    try:
        yield
    finally:
        _segment_lengths.reset(token)


def register() -> None:
    """Make our kernels known to transformers. Doing it again changes nothing.

    ``eager`` and ``flex_attention`` are transformers' own kernels: only their mask functions are replaced, by ones
    that do what transformers does unless segments are given.
    """
    kernels: dict[Name, Callable[..., tuple[torch.Tensor, None]]] = {
        "sdpa": _layer_function(_by_document),
        "varlen": _layer_function(_varlen),
        "flash_attention_2": _layer_function(_flash_attention_2, "softcap"),
    }
    for name, function in kernels.items():
        AttentionInterface.register(_IMPLEMENTATIONS[name], function)
        AttentionMaskInterface.register(_IMPLEMENTATIONS[name], _document_mask)
    AttentionMaskInterface.register("eager", _isolating(eager_mask))
    AttentionMaskInterface.register("flex_attention", _isolating(flex_attention_mask))


# --- choosing ---------------------------------------------------------------------------------------------------


def _only_eager(config: PretrainedConfig) -> str | None:
    """Why this model's attention is right only in transformers' plain Python form; None if it is not so."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its attention scores, which no fused kernel here does"
    try:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None
    # transformers keeps what a class can do under these names alone.
    if not architecture._supports_sdpa:  # noqa: SLF001
        return f"{config.model_type} has attention arithmetic of its own, which no fused kernel here does"
    if not architecture._can_set_attn_implementation():  # noqa: SLF001
        return f"{config.model_type} does not let its attention be replaced"
    return None


def _fastest(device: torch.device, config: PretrainedConfig, capability: tuple[int, int] | None) -> tuple[Name, str]:
    obstacle = _varlen_obstacle(device, config, capability)
    if obstacle is None:
        return "varlen", "one kernel call for all documents (in fp32: one causal call per document)"
    return "sdpa", f"one causal call per document; {obstacle}"


def _varlen_obstacle(device: torch.device, config: PretrainedConfig, capability: tuple[int, int] | None) -> str | None:
    """Why torch's variable-length kernel cannot run here, as half a sentence; None if it can."""
    if device.type != "cuda":
        return "varlen needs CUDA"
    if (capability or torch.cuda.get_device_capability(device)) < _KERNEL_CAPABILITY:
        return "varlen needs a GPU of capability 8.0 or higher"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "varlen needs a newer torch"
    if getattr(config, "attention_dropout", 0.0):
        return "varlen has no attention dropout"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not _kernel_takes_width(head_dim):
        return f"varlen does not take heads of width {head_dim}"
    return None


def _check_request(
    requested: Name,
    device: torch.device,
    config: PretrainedConfig,
    only_eager: str | None,
    capability: tuple[int, int] | None,
) -> str:
    """The sentence that comes with an explicit choice; raises where the choice cannot be."""
    if requested == "eager":
        return "as the recipe says; builds a mask of sequence_length x sequence_length"
    # flash-attn and flex know capped scores; what they do not know, their functions refuse.
    caps = getattr(config, "attn_logit_softcapping", None) is not None
    if only_eager and not (caps and requested in ("flash_attention_2", "flex")):
        raise ModelError(f"model.attention: {requested}: {only_eager}; use eager or auto")
    if requested == "varlen" and (obstacle := _varlen_obstacle(device, config, capability)):
        raise MachineError(f"model.attention: {obstacle}; use sdpa or auto")
    if requested == "flash_attention_2":
        _check_flash_attention(device)
    if requested == "flex":
        _check_flex(device, config)
    return "as the recipe says"


def _check_flash_attention(device: torch.device) -> None:
    if device.type != "cuda":
        raise MachineError("model.attention: flash_attention_2 needs CUDA; use sdpa or auto")
    if importlib.util.find_spec("flash_attn") is None:
        raise MachineError(
            "model.attention: flash_attention_2 needs the package flash-attn, not installed here; use varlen or auto"
        )


def _check_flex(device: torch.device, config: PretrainedConfig) -> None:
    if device.type == "cpu":
        raise MachineError("model.attention: flex has no backward pass on the CPU; use sdpa or auto")
    if getattr(config, "attention_dropout", 0.0):
        raise ModelError(
            f"model.attention: flex has no attention dropout, which {config.model_type} asks for; use sdpa or auto"
        )


# --- masks ------------------------------------------------------------------------------------------------------


def _document_mask(*args: Any, **kwargs: Any) -> DocumentMask | torch.Tensor | None:
    """What transformers calls for the mask of our kernels: the segments, or (none given) SDPA's own mask."""
    lengths = _segment_lengths.get()
    if lengths is None:
        return cast("torch.Tensor | None", sdpa_mask(*args, **kwargs))
    _check_mask_request(lengths, kwargs)
    flat = tuple(chain.from_iterable(lengths))
    boundaries = torch.tensor([0, *accumulate(flat)], dtype=torch.int32, device=kwargs["device"])
    return DocumentMask(flat, kwargs.get("local_size"), boundaries)


def _isolating(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A stock mask function that also keeps segments apart, where there are any.

    The mask pattern is made anew, because transformers guesses documents from positions that restart; what is one
    document is said by the segments alone, so that both switches of the recipe (isolation, positions) stay independent.
    """

    def mask(*args: Any, **kwargs: Any) -> Any:
        lengths = _segment_lengths.get()
        if lengths is None:
            return stock(*args, **kwargs)
        _check_mask_request(lengths, kwargs)
        window = kwargs.get("local_size")
        pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        document_RT = _document_index(lengths, kwargs["device"])
        same_document = packed_sequence_mask_function(document_RT)
        return stock(*args, **{**kwargs, "mask_function": and_masks(pattern, same_document), "attention_mask": None})

    return mask


def _document_index(lengths: SegmentLengths, device: torch.device | str) -> torch.Tensor:
    """Number of the segment that each token belongs to; shape (R, T)."""
    rows = [[index for index, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows, device=device)


def _check_mask_request(lengths: SegmentLengths, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_vmap"):
        raise ModelError(
            "this model changes its causal mask (bidirectional parts), which document isolation does not know"
        )
    shape = (kwargs["batch_size"], {kwargs["q_length"], kwargs["kv_length"]})
    if any(shape != (len(lengths), {sum(row)}) for row in lengths):
        raise ValueError(
            f"segments of {len(lengths)} rows of {[sum(row) for row in lengths]} tokens do not cover a batch of {shape}"
        )


# --- kernels ----------------------------------------------------------------------------------------------------


def _layer_function(kernel: Callable[..., torch.Tensor], *knows: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """What transformers calls in each layer for one of our kernels; it returns the shape (R, T, H, D).

    ``knows`` names the arguments of special layers that the kernel honours; any other is refused.
    """

    def attention(
        module: torch.nn.Module,
        query_RHTD: torch.Tensor,
        key_RGTD: torch.Tensor,
        value_RGTD: torch.Tensor,
        attention_mask: DocumentMask | torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if isinstance(attention_mask, DocumentMask):
            known = {name: kwargs.pop(name) for name in knows if name in kwargs}
            _refuse_unknown(module, attention_mask, kwargs)
            return kernel(query_RHTD, key_RGTD, value_RGTD, attention_mask, dropout, scaling, **known), None
        if _segment_lengths.get() is not None:
            raise ModelError(
                f"{type(module).__name__} makes its own mask, so that documents leak; use attention: eager"
            )
        out, _ = sdpa_attention_forward(
            module, query_RHTD, key_RGTD, value_RGTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None

    return attention


def _refuse_unknown(module: torch.nn.Module, mask: DocumentMask, kwargs: dict[str, Any]) -> None:
    """Nothing that a layer asks of its attention is ignored: what the kernel does not know is an error."""
    layer = type(module).__name__
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{layer} is not causal; document isolation knows only causal models")
    window = kwargs.get("sliding_window", mask.window)
    if window != mask.window:
        raise ModelError(f"{layer} has a window of {window}, its mask one of {mask.window}; set model.attention: eager")
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    unknown = sorted(asked - _HARMLESS)
    if unknown:
        names = ", ".join(unknown)
        raise ModelError(f"{layer} asks its attention for {names}, unknown to this kernel; set model.attention: eager")


def _by_document(
    query_RHTD: torch.Tensor,
    key_RGTD: torch.Tensor,
    value_RGTD: torch.Tensor,
    mask: DocumentMask,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """One causal SDPA call for each run of segments of equal length.

    Neighbours of equal length share a call, as a batch and without a copy: rows of one document each are one call.
    The tensors are split rather than sliced, since the backward pass of a split writes each gradient once.
    """
    runs = [(length, len(list(same))) for length, same in groupby(mask.lengths)]
    sizes = [length * count for length, count in runs]
    pieces = [torch.split_with_sizes(_flatten(tensor), sizes) for tensor in (query_RHTD, key_RGTD, value_RGTD)]
    outputs = []
    for (length, count), *run in zip(runs, *pieces, strict=True):
        query, key, value = (torch.unflatten(tensor, 0, (count, length)).transpose(1, 2) for tensor in run)
        groups = query.shape[1] // key.shape[1]
        band = None
        if mask.window is not None and length > mask.window:
            # A fused kernel takes a mask or shared key/value heads, not both.
            band = _band(length, mask.window, query.device)
            key, value, groups = repeat_kv(key, groups), repeat_kv(value, groups), 1
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=band,
            dropout_p=dropout,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return torch.unflatten(flat, 0, (query_RHTD.shape[0], -1))


def _varlen(
    query_RHTD: torch.Tensor,
    key_RGTD: torch.Tensor,
    value_RGTD: torch.Tensor,
    mask: DocumentMask,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Torch's variable-length flash kernel: one call for all documents. What it does not take goes by document."""
    if dropout or not _kernel_takes(query_RHTD, value_RGTD):
        return _by_document(query_RHTD, key_RGTD, value_RGTD, mask, dropout, scaling)
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = query_RHTD.shape[1] != key_RGTD.shape[1]
    else:  # a torch whose kernel wants a key and a value for every query head
        groups = query_RHTD.shape[1] // key_RGTD.shape[1]
        key_RGTD, value_RGTD = repeat_kv(key_RGTD, groups), repeat_kv(value_RGTD, groups)
    query, key, value = _for_kernel(query_RHTD, key_RGTD, value_RGTD)
    longest = max(mask.lengths)
    out = varlen_attn(
        query,
        key,
        value,
        mask.boundaries,
        mask.boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=_kernel_window(mask),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return torch.unflatten(out, 0, (query_RHTD.shape[0], -1))


def _flash_attention_2(
    query_RHTD: torch.Tensor,
    key_RGTD: torch.Tensor,
    value_RGTD: torch.Tensor,
    mask: DocumentMask,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The flash-attn package's variable-length kernel; it knows dropout and capped scores (``softcap``)."""
    if not _kernel_takes(query_RHTD, value_RGTD):
        if softcap is not None:
            raise ModelError("flash_attention_2 caps attention scores in 16 bit only; set model.attention: eager")
        return _by_document(query_RHTD, key_RGTD, value_RGTD, mask, dropout, scaling)
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    query, key, value = _for_kernel(query_RHTD, key_RGTD, value_RGTD)
    longest = max(mask.lengths)
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=mask.boundaries,
        cu_seqlens_k=mask.boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=_kernel_window(mask),
        softcap=softcap or 0.0,
    )
    return torch.unflatten(out, 0, (query_RHTD.shape[0], -1))


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token sees another: itself and the ``window - 1`` before it; shape (length, length)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _flatten(tensor_RHTD: torch.Tensor) -> torch.Tensor:
    """All rows one after the other; shape (R * T, H, D)."""
    return tensor_RHTD.transpose(1, 2).flatten(0, 1)


def _for_kernel(*tensors_RHTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Flattened, in the type to compute in: a custom kernel is not cast by autocast."""
    return tuple(_flatten(tensor).to(_compute_dtype(tensor)) for tensor in tensors_RHTD)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that autocast would compute in. Rotary embeddings widen queries and keys back to fp32."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def _kernel_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        _compute_dtype(query) in _KERNEL_DTYPES
        and query.shape[-1] == value.shape[-1]
        and _kernel_takes_width(query.shape[-1])
    )


def _kernel_takes_width(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= _KERNEL_MAX_HEAD_DIM


def _kernel_window(mask: DocumentMask) -> tuple[int, int]:
    """Tokens seen to the left and right of a token, itself not counted; -1 is no limit."""
    return (-1 if mask.window is None else mask.window - 1, 0)
