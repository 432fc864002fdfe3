"""The families of decoders that the quick engine has logs of, and which configurations belong to them. Torch-free.

A configuration belongs to a family when every key of it is one of its dimensions, one that changes no piece of memory,
or a setting as it was recorded: a key that nobody thought of leaves the model to the trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from trainkit.memory.event_log import TRACED

if TYPE_CHECKING:
    from collections.abc import Mapping

# Keys that change numbers, or nothing, but no piece of memory.
_NEUTRAL = frozenset(
    (
        *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp"),
        *("_name_or_path", "max_position_embeddings", "n_positions", "n_ctx", "original_max_position_embeddings"),
        *("tie_word_embeddings", "vocab_size", "initializer_range", "rms_norm_eps", "layer_norm_eps", "rope_theta"),
        *("layer_norm_epsilon", "rotary_emb_base", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"),
        *("cache_implementation", "max_window_layers", "embedding_multiplier", "residual_multiplier"),
        *("attention_multiplier", "logits_scaling"),
    )
)
_NO_DROPOUT = {"attention_dropout": (0, None), "hidden_dropout": (0,), "resid_pdrop": (0,), "embd_pdrop": (0,)}
_PLAIN: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    **_NO_DROPOUT,
}
_GELU = {"hidden_act": ("gelu_pytorch_tanh",), "hidden_activation": ("gelu_pytorch_tanh",)}
_PLAIN_ROTATIONS = ("default", "linear", "llama3")  # they change numbers, not shapes


@dataclass(frozen=True)
class Family:
    """Models of one ``model_type`` whose steps are the same but for their dimensions.

    ``ties`` are the kinds that are recorded: input embedding and head one matrix, or two. ``settings`` are values of
    keys that the log holds for; a key that is left out has the class's default, which is the recorded one.
    ``free_width``: a head's width is set by itself, else it is ``hidden_size`` over the heads. ``cuts_loss``: the head
    stands apart, so that the loss is made in chunks.
    """

    name: str
    model_type: str
    ties: tuple[bool, ...] = (False, True)
    settings: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _PLAIN)
    free_width: bool = False
    default_width: int | None = None
    default_tied: bool = False
    cuts_loss: bool = True


class Shape(NamedTuple):
    """The dimensions of a model of a family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_width: int
    vocabulary: int


FAMILIES = (
    Family("llama", "llama", free_width=True),
    Family("qwen2", "qwen2"),
    Family("qwen3", "qwen3", free_width=True, default_width=128),
    Family(
        "gemma", "gemma", ties=(True,), settings=_PLAIN | _GELU, free_width=True, default_width=256, default_tied=True
    ),
    Family("granite", "granite", ties=(True,), cuts_loss=False),
    Family("olmo", "olmo", settings=_PLAIN | {"clip_qkv": (None,)}),
    Family("olmo2", "olmo2", ties=(False,)),
)
_LIKE_LLAMA = {"mistral": "llama"}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a configuration belongs to; None where no log holds for it."""
    kind = config.get("model_type")
    kind = _LIKE_LLAMA.get(str(kind), kind)
    for family in FAMILIES:
        if family.model_type == kind:
            return family if _belongs(config, family) else None
    return None


def shape_of(config: Mapping[str, Any], family: Family) -> Shape:
    """The dimensions of a configuration that belongs to ``family``."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") if family.free_width else None
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        intermediate=config["intermediate_size"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_width=width or family.default_width or hidden // heads,
        vocabulary=config["vocab_size"],
    )


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Whether input embedding and output head are one matrix."""
    return bool(config.get("tie_word_embeddings", family.default_tied))


def recorded_config(family: Family, shape: Shape, *, tied: bool, positions: int) -> dict[str, Any]:
    """A configuration of the family with these dimensions."""
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }
    return config | ({"head_dim": shape.head_width} if family.free_width else {})


def _belongs(config: Mapping[str, Any], family: Family) -> bool:
    needed = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    needed += ["num_key_value_heads"] if family.model_type != "llama" else []  # else the class's own default
    if not all(type(config.get(key)) is int for key in needed) or is_tied(config, family) not in family.ties:
        return False
    shape = shape_of(config, family)
    dimensions = {*needed, "num_key_value_heads"}
    shaping = {"rope_scaling", "rope_parameters", "layer_types", "head_dim"}
    for key, value in config.items():
        if key in family.settings:
            if value not in family.settings[key]:
                return False
        elif key not in dimensions | shaping | _NEUTRAL:
            return False
    if not family.free_width and config.get("head_dim") not in (None, shape.hidden // shape.heads):
        return False
    return (
        _rotation_is_plain(config)
        and _layers_are_equal(config)
        and shape.layers >= TRACED
        and shape.heads % shape.key_value_heads == 0
        and (family.free_width or shape.hidden % shape.heads == 0)
        and shape.head_width % 8 == 0
        and shape.head_width <= 256
    )


def _rotation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rotation_is_plain(config: Mapping[str, Any]) -> bool:
    rotation = _rotation(config)
    kind = rotation.get("rope_type", rotation.get("type", "default"))
    return kind in _PLAIN_ROTATIONS and rotation.get("partial_rotary_factor", 1) == 1


def _layers_are_equal(config: Mapping[str, Any]) -> bool:
    return not set(config.get("layer_types") or ()) - {"full_attention"}
