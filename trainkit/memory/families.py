"""The families of decoders that the quick engine has logs of, and which configurations belong to them. Torch-free.

A configuration belongs to a family when every key of it is one of its dimensions, one that changes no piece of memory,
or a setting as it was recorded: a key that nobody thought of leaves the model to the trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from trainkit.memory.event_log import TRACED

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT: frozenset[type] = frozenset({str, NoneType})
_INTEGER: frozenset[type] = frozenset({int})
_NUMBER: frozenset[type] = frozenset({int, float})
# Keys that change numbers, or nothing, but no piece of memory, and the types of value that every class takes there.
_NEUTRAL: dict[str, frozenset[type]] = {
    **dict.fromkeys(("model_type", "transformers_version", "_name_or_path", "cache_implementation"), _TEXT),
    **dict.fromkeys(("torch_dtype", "dtype"), _TEXT),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "original_max_position_embeddings"), _INTEGER),
    **dict.fromkeys(("vocab_size", "max_window_layers", "pretraining_tp"), _INTEGER),
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), frozenset({float})),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "embedding_multiplier", "residual_multiplier"), _NUMBER),
    **dict.fromkeys(("attention_multiplier", "logits_scaling"), _NUMBER),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "sliding_window"), _INTEGER | {NoneType}),
    "eos_token_id": frozenset({int, list, NoneType}),
    "architectures": frozenset({list, NoneType}),
    "tie_word_embeddings": frozenset({bool}),
    "use_cache": frozenset({bool}),
}
_WORDS = {
    **dict.fromkeys(("torch_dtype", "dtype"), (None, "float32", "float16", "bfloat16")),
    "cache_implementation": (None, "static", "hybrid"),
}
_NO_DROPOUT = {"attention_dropout": (0,), "hidden_dropout": (0,), "resid_pdrop": (0,), "embd_pdrop": (0,)}
_PLAIN: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "auto_map": (None,),
    **_NO_DROPOUT,
}
_EQUAL_LAYERS: dict[str, tuple[object, ...]] = {"layer_types": ("full_attention",)}
_GELU = {"hidden_act": ("gelu_pytorch_tanh",), "hidden_activation": ("gelu_pytorch_tanh",)}
_ROTATED_SHARE = ("partial_rotary_factor", "rotary_pct")
_AS_MANY_KEYS = ("llama", "phi", "phi3")  # as query heads, by the class's own default
# Sizes that a class takes as null, by model_type.
_NULL_SIZES = {
    "llama": {"num_key_value_heads", "head_dim"},
    "mistral": {"head_dim"},
    "phi": {"num_key_value_heads"},
    "phi3": {"num_key_value_heads"},
    "gpt2": {"n_inner"},
}
# Rotations that change numbers, not shapes, and the numbers that each needs.
ROTATIONS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROTATION_NUMBERS = (*ROTATIONS["llama3"], "original_max_position_embeddings", "rope_theta", *_ROTATED_SHARE)


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
    and ``default_rotated`` the class's own, where it is another. ``default_pad`` is the class's token of padding, which
    the vocabulary must have. ``cycles`` are keys with an entry for each layer, and what comes again and again in them;
    ``left_over`` are the numbers of layers beyond whole periods that are recorded.
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
    default_pad: int | None = None
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
    Family("olmo", "olmo", settings=_PLAIN | {"clip_qkv": (None,)}, default_pad=1),
    Family("olmo2", "olmo2", ties=(False,), default_pad=1),
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
    Family("phi3", "phi3", ties=(False,), default_pad=32000, row_differs=True),
    Family(
        "phi3-partial",
        "phi3",
        ties=(True,),
        default_pad=32000,
        rotated=0.75,
        default_rotated=1,
        row_differs=True,
    ),
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
        default_pad=128004,
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
    if not _sizes_are_plain(config, family) or is_tied(config, family) not in family.ties:
        return False
    keys = family.keys
    sizes = {*keys, "head_dim"}
    shape = shape_of(config, family)
    shaping = {"rope_scaling", "rope_parameters", *_ROTATED_SHARE, *family.cycles}
    for key, value in config.items():
        if key in family.settings:
            if not any(_is_same(value, setting) for setting in family.settings[key]):
                return False
        elif key not in sizes | shaping and not _is_neutral(key, value):
            return False
    if not family.free_width and config.get("head_dim") not in (None, shape.hidden // shape.heads):
        return False
    pad = config.get("pad_token_id", family.default_pad)
    return (
        _rotation_is_recorded(config, family)
        and (pad is None or -shape.vocabulary <= pad < shape.vocabulary)
        and _layers_come_again(config, family, shape.layers)
        and shape.layers >= TRACED * family.period
        and shape.layers % family.period in family.left_over
        and family.one_key_head is (shape.key_value_heads == 1)
        and shape.heads % shape.key_value_heads == 0
        and shape.hidden % shape.heads == 0
        and shape.head_width % 8 == 0
        and shape.head_width <= 256
    )


def _sizes_are_plain(config: Mapping[str, Any], family: Family) -> bool:
    """Whether every dimension is a whole number above 0, or is left to the class where its default is the recorded."""
    keys, kind = family.keys, str(config.get("model_type"))
    needed = {keys.hidden, keys.layers, keys.heads, "vocab_size"}
    if keys.intermediate != "n_inner":  # four times as wide, where it is not said
        needed.add(keys.intermediate)
    if keys.key_value_heads is not None and kind not in _AS_MANY_KEYS:
        needed.add(keys.key_value_heads)
    if keys.positions != "max_position_embeddings" and "max_position_embeddings" in config:
        return False  # the class takes it as another name of its own
    may_be_null = _NULL_SIZES.get(kind, set())
    sizes = (key for key in (*keys, "head_dim", "vocab_size") if key in config)
    return config.keys() >= needed and all(
        _is_size(config[str(key)]) or (config[str(key)] is None and key in may_be_null) for key in sizes
    )


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_same(value: object, setting: object) -> bool:
    """Whether a setting is as it was recorded; 0 is not False, which a class checks."""
    return isinstance(value, bool) is isinstance(setting, bool) and bool(value == setting)


def _is_neutral(key: str, value: Any) -> bool:
    """Whether nothing hangs on a value; one that transformers may refuse is left to the trace, which asks it."""
    if type(value) not in _NEUTRAL.get(key, ()):
        return False
    if key == "initializer_range":
        return bool(0 <= value <= 1)
    return key not in _WORDS or value in _WORDS[key]


def _rotation_is_recorded(config: Mapping[str, Any], family: Family) -> bool:
    written = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    if not all(isinstance(rotation, dict) for rotation in written):
        return False
    rotation: dict[str, Any] = next(filter(None, written), {})
    by_kind = family.model_type == "gemma3_text" and rotation.keys() == set(family.cycles["layer_types"])
    rotations = list(rotation.values()) if by_kind else [rotation]
    if not all(map(_changes_numbers_alone, rotations)):
        return False
    shares = [where[name] for where in (*rotations, config) for name in _ROTATED_SHARE if name in where]
    default = family.rotated if family.default_rotated is None else family.default_rotated
    return all(type(share) in _NUMBER and share == family.rotated for share in shares or [default])


def _changes_numbers_alone(rotation: object) -> bool:
    """Whether a rotation is of a kind that is recorded, and whole."""
    if not isinstance(rotation, dict):
        return False
    kind = rotation.get("rope_type", rotation.get("type", "default"))
    return (
        isinstance(kind, str)
        and kind in ROTATIONS
        and rotation.keys() >= set(ROTATIONS[kind])
        and all(
            key in {"rope_type", "type"} or (key in _ROTATION_NUMBERS and type(value) in _NUMBER)
            for key, value in rotation.items()
        )
    )


def _layers_come_again(config: Mapping[str, Any], family: Family, layers: int) -> bool:
    return all(
        config.get(key) is None or config[key] == [cycle[index % len(cycle)] for index in range(layers)]
        for key, cycle in family.cycles.items()
    )
