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
_EQUAL_LAYERS: dict[str, tuple[object, ...]] = {"layer_types": ("full_attention",)}
_GELU = {"hidden_act": ("gelu_pytorch_tanh",), "hidden_activation": ("gelu_pytorch_tanh",)}
_ROTATED_SHARE = ("partial_rotary_factor", "rotary_pct")
_AS_MANY_KEYS = ("llama", "phi", "phi3")  # as query heads, by the class's own default
_PLAIN_ROTATIONS = ("default", "linear", "llama3")  # they change numbers, not shapes


class Keys(NamedTuple):
    """What a configuration calls its dimensions; None for what it does not have."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    intermediate: str = "intermediate_size"
    heads: str = "num_attention_heads"
    key_value_heads: str | None = "num_key_value_heads"
    positions: str = "max_position_embeddings"


_STANDARD = Keys()


@dataclass(frozen=True)
class Family:
    """Models of one ``model_type`` whose steps are the same but for their dimensions.

    ``ties`` are the kinds that are recorded: input embedding and head one matrix, or two. ``settings`` are values of
    keys that the log holds for; a key that is left out has the class's default, which is the recorded one.
    ``free_width``: a head's width is set by itself, else it is ``hidden_size`` over the heads. ``cuts_loss``: the head
    stands apart, so that the loss is made in chunks. ``rotated`` is the share of a head's width that positions rotate,
    and ``default_rotated`` the class's own, where it is another. ``cycles`` are keys with an entry for each layer, and
    what comes again and again in them; ``left_over`` are the numbers of layers beyond whole periods that are recorded.
    ``row_differs``: with one row, what is a copy with several is a view (heads stand before tokens in memory there, and
    rows are to be put end to end). ``one_key_head`` is recorded apart for the same reason.
    """

    name: str
    model_type: str
    ties: tuple[bool, ...] = (False, True)
    settings: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _PLAIN)
    free_width: bool = False
    default_width: int | None = None
    default_tied: bool = False
    cuts_loss: bool = True
    keys: Keys = _STANDARD
    rotated: float = 1
    default_rotated: float | None = None
    cycles: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _EQUAL_LAYERS)
    left_over: tuple[int, ...] = (0,)
    row_differs: bool = False
    one_key_head: bool = False

    @property
    def period(self) -> int:
        """After how many layers the same kinds of layers come again."""
        return max(map(len, self.cycles.values()))


class Shape(NamedTuple):
    """The dimensions of a model of a family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_width: int
    vocabulary: int
    positions: int


FAMILIES = (
    Family("llama", "llama", free_width=True),
    Family("qwen2", "qwen2"),
    Family("qwen3", "qwen3", free_width=True, default_width=128),
    *(
        Family(
            name,
            "gemma",
            ties=(True,),
            settings=_PLAIN | _GELU,
            free_width=True,
            default_width=256,
            default_tied=True,
            one_key_head=one_key_head,
        )
        for name, one_key_head in (("gemma", False), ("gemma-one-key-head", True))
    ),
    Family("granite", "granite", ties=(True,), cuts_loss=False),
    Family("olmo", "olmo", settings=_PLAIN | {"clip_qkv": (None,)}),
    Family("olmo2", "olmo2", ties=(False,)),
    Family(
        "gpt_neox",
        "gpt_neox",
        ties=(False,),
        settings=_PLAIN | {"hidden_act": ("gelu",), "attention_bias": (True,), "use_parallel_residual": (True,)},
        keys=Keys(key_value_heads=None),
        rotated=0.25,
        row_differs=True,
    ),
    Family(
        "phi",
        "phi",
        ties=(False,),
        settings=_PLAIN | {"hidden_act": ("gelu_new",), "qk_layernorm": (False,)},
        rotated=0.5,
        row_differs=True,
    ),
    Family("phi3", "phi3", ties=(False,), row_differs=True),
    Family("phi3-partial", "phi3", ties=(True,), rotated=0.75, default_rotated=1, row_differs=True),
    Family(
        "stablelm",
        "stablelm",
        ties=(False,),
        settings=_PLAIN | dict.fromkeys(("use_qkv_bias", "qk_layernorm", "use_parallel_residual"), (False,)),
        rotated=0.25,
        row_differs=True,
    ),
    Family(
        "gpt2",
        "gpt2",
        ties=(True,),
        settings={
            "activation_function": ("gelu_new",),
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), (0.1,)),
            **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"), (False,)),
            **dict.fromkeys(("add_cross_attention",), (False,)),
            "scale_attn_weights": (True,),
        },
        default_tied=True,
        keys=Keys("n_layer", "n_embd", "n_inner", "n_head", None, "n_positions"),
        row_differs=True,
    ),
    Family(
        "smollm3",
        "smollm3",
        ties=(True,),
        settings=_PLAIN | {"no_rope_layer_interval": (4,)},
        default_tied=True,
        cycles={"layer_types": ("full_attention",), "no_rope_layers": (1, 1, 1, 0)},
    ),
    Family(
        "gemma2",
        "gemma2",
        ties=(True,),
        settings=_PLAIN | _GELU | {"final_logit_softcapping": (30.0,), "attn_logit_softcapping": (50.0,)},
        free_width=True,
        default_width=256,
        default_tied=True,
        cuts_loss=False,
        cycles={"layer_types": ("sliding_attention", "full_attention")},
        row_differs=True,
    ),
    *(
        Family(
            name,
            "gemma3_text",
            ties=(True,),
            settings=_PLAIN | _GELU | {"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)},
            free_width=True,
            default_width=256,
            default_tied=True,
            cycles={"layer_types": ("sliding_attention",) * 5 + ("full_attention",)},
            left_over=left_over,
            one_key_head=one_key_head,
        )
        for name, one_key_head, left_over in (("gemma3", False, (0, 2, 4)), ("gemma3-one-key-head", True, (2,)))
    ),
)
_LIKE_LLAMA = {"mistral": "llama"}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a configuration belongs to; None where no log holds for it."""
    kind = config.get("model_type")
    kind = _LIKE_LLAMA.get(str(kind), kind)
    return next((family for family in FAMILIES if family.model_type == kind and _belongs(config, family)), None)


def shape_of(config: Mapping[str, Any], family: Family) -> Shape:
    """The dimensions of a configuration that belongs to ``family``."""
    keys = family.keys
    hidden, heads = config[keys.hidden], config[keys.heads]
    width = config.get("head_dim") if family.free_width else None
    return Shape(
        layers=config[keys.layers],
        hidden=hidden,
        intermediate=config.get(keys.intermediate) or 4 * hidden,
        heads=heads,
        key_value_heads=(config.get(keys.key_value_heads) if keys.key_value_heads else None) or heads,
        head_width=width or family.default_width or hidden // heads,
        vocabulary=config["vocab_size"],
        positions=config.get(keys.positions) or 1,
    )


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Whether input embedding and output head are one matrix."""
    return bool(config.get("tie_word_embeddings", family.default_tied))


def recorded_config(family: Family, shape: Shape, *, tied: bool) -> dict[str, Any]:
    """A configuration of the family with these dimensions."""
    keys = family.keys
    config: dict[str, Any] = {
        "model_type": family.model_type,
        keys.hidden: shape.hidden,
        keys.intermediate: shape.intermediate,
        keys.layers: shape.layers,
        keys.heads: shape.heads,
        "vocab_size": shape.vocabulary,
        keys.positions: shape.positions,
        "tie_word_embeddings": tied,
    }
    if keys.key_value_heads is not None:
        config[keys.key_value_heads] = shape.key_value_heads
    if family.free_width:
        config["head_dim"] = shape.head_width
    if family.default_rotated not in (None, family.rotated):
        rotation = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": family.rotated}
        config["rope_parameters"] = rotation
    return config


def _belongs(config: Mapping[str, Any], family: Family) -> bool:
    keys = family.keys
    needed = [keys.hidden, keys.layers, keys.heads, "vocab_size"]
    needed += [keys.intermediate] if keys.intermediate != "n_inner" else []  # four times as wide, where it is not said
    if keys.key_value_heads is not None and family.model_type not in _AS_MANY_KEYS:
        needed += [keys.key_value_heads]
    if not all(type(config.get(key)) is int for key in needed) or is_tied(config, family) not in family.ties:
        return False
    shape = shape_of(config, family)
    dimensions = {*needed, keys.intermediate, keys.key_value_heads}
    shaping = {"rope_scaling", "rope_parameters", "head_dim", *_ROTATED_SHARE, *family.cycles}
    for key, value in config.items():
        if key in family.settings:
            if value not in family.settings[key]:
                return False
        elif key not in dimensions | shaping | _NEUTRAL:
            return False
    if not family.free_width and config.get("head_dim") not in (None, shape.hidden // shape.heads):
        return False
    return (
        _rotation_is_recorded(config, family)
        and _layers_come_again(config, family, shape.layers)
        and shape.layers >= TRACED * family.period
        and shape.layers % family.period in family.left_over
        and family.one_key_head is (shape.key_value_heads == 1)
        and shape.heads % shape.key_value_heads == 0
        and (family.free_width or shape.hidden % shape.heads == 0)
        and shape.head_width % 8 == 0
        and shape.head_width <= 256
    )


def _rotation_is_recorded(config: Mapping[str, Any], family: Family) -> bool:
    rotation = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rotation.get("rope_type", rotation.get("type", "default"))
    shares = [where[name] for where in (rotation, config) for name in _ROTATED_SHARE if where.get(name) is not None]
    default = family.rotated if family.default_rotated is None else family.default_rotated
    return kind in _PLAIN_ROTATIONS and set(shares or [default]) == {family.rotated}


def _layers_come_again(config: Mapping[str, Any], family: Family, layers: int) -> bool:
    return all(
        config.get(key) is None or config[key] == [cycle[index % len(cycle)] for index in range(layers)]
        for key, cycle in family.cycles.items()
    )
