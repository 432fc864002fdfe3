"""The quick engine: recorded logs instead of a trace. Torch-free; a few milliseconds for an answer.

It covers the decoders of the Llama shape (pre-norm, rotary positions, gated MLP with SiLU), trained in bf16 on a GPU
with the variable-length kernel, in full or with LoRA or QLoRA on every linear layer. Its logs are traces
(``scripts/record_memory_logs``), so that its answers are those of the trace.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple

from trainkit.memory.event_log import TRACED, Axis, EventLog, unfold
from trainkit.memory.replay import peak_of_folded
from trainkit.memory.scenario import AMPERE
from trainkit.memory.symbolic_log import Dimensions, SymbolicLog
from trainkit.recipe.schema import Adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from trainkit.memory.scenario import Scenario

Family = Literal["llama", "qwen2", "qwen3"]
Method = Literal["full", "lora", "qlora"]

_FAMILIES: dict[str, Family] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_CHUNK_TOKENS = 1024  # of trainkit.model.loss on a GPU; a test compares them
_PLAIN_LOGITS = 2**22  # there too: up to this many, the loss is not cut into chunks
_LINEAR_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_PLAIN_ROTATIONS = ("default", "linear", "llama3")  # they change numbers, not shapes
# Keys of a config that change what a layer does, and the values that change nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}


class LogKey(NamedTuple):
    """What makes a step another sequence of operators.

    ``accumulates``: gradients are there before the step. ``one_chunk``: the loss is not cut.
    """

    family: Family
    tied: bool
    method: Method
    checkpointed: bool
    accumulates: bool
    one_chunk: bool

    @property
    def file_name(self) -> str:
        """Where its log is stored."""
        words = [self.family, "tied" if self.tied else "untied", self.method]
        words += ["checkpointed"] if self.checkpointed else []
        words += ["accumulating"] if self.accumulates else []
        words += ["one-chunk"] if self.one_chunk else []
        return "-".join(words) + ".json.gz"


def all_keys() -> Iterator[LogKey]:
    """Every log that is stored."""
    families: tuple[Family, ...] = ("llama", "qwen2", "qwen3")
    methods: tuple[Method, ...] = ("full", "lora", "qlora")
    either = (False, True)
    for family, tied, method in product(families, either, methods):
        for checkpointed, accumulates, one_chunk in product(either, either, either):
            yield LogKey(family, tied, method, checkpointed, accumulates, one_chunk)


_loaded: dict[LogKey, SymbolicLog] = {}


def covers(scenario: Scenario) -> bool:
    """Whether the answer can be had from a recorded log."""
    return _covers_model(scenario.config) and _covers_training(scenario)


def quick_log(scenario: Scenario) -> EventLog:
    """The step's log at full depth, of a scenario that is covered."""
    folded = _at(scenario)
    for axis, count in _counts(scenario).items():
        folded = unfold(folded, count, axis)
    return folded


def quick_peak_bytes(scenario: Scenario) -> int:
    """The allocated peak alone, without libraries' workspaces: for a search among many scenarios, all covered."""
    return peak_of_folded(_at(scenario), _counts(scenario))


def quick_counts(scenario: Scenario) -> tuple[int, int]:
    """Parameters of the model and trained parameters, of a scenario that is covered."""
    config = scenario.config
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, key_heads, width = _heads(config)
    matrices = [
        (hidden, heads * width),
        (hidden, key_heads * width),
        (hidden, key_heads * width),
        (heads * width, hidden),
        (hidden, intermediate),
        (hidden, intermediate),
        (intermediate, hidden),
    ]
    layer = sum(inputs * outputs for inputs, outputs in matrices) + 2 * hidden
    if config["model_type"] == "qwen2":
        layer += (heads + 2 * key_heads) * width  # biases of queries, keys and values
    if config["model_type"] == "qwen3":
        layer += 2 * width  # norms of queries and keys
    embeddings = config["vocab_size"] * hidden * (1 if _is_tied(config) else 2)
    own = config["num_hidden_layers"] * layer + embeddings + hidden
    if scenario.adapter is None:
        return own, own
    return own, config["num_hidden_layers"] * scenario.adapter.r * sum(map(sum, matrices))


def _covers_model(config: Mapping[str, Any]) -> bool:
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if config.get("model_type") not in _FAMILIES or not all(isinstance(config.get(key), int) for key in needed):
        return False
    if any(key in config and config[key] not in values for key, values in _HARMLESS.items()):
        return False
    rotation = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rotation.get("rope_type", rotation.get("type", "default")) not in _PLAIN_ROTATIONS:
        return False
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        return False
    if config["model_type"] != "llama" and not isinstance(config.get("num_key_value_heads"), int):
        return False  # the class's own default, which is not always one for each query head
    heads, key_heads, width = _heads(config)
    return config["num_hidden_layers"] >= TRACED and heads % key_heads == 0 and width % 8 == 0 and width <= 256


def _covers_training(scenario: Scenario) -> bool:
    device = scenario.device
    adapter = scenario.adapter
    logits = scenario.tokens * scenario.config["vocab_size"]
    return (
        scenario.loop == "trainkit"
        and (device.kind == "cuda" and device.capability >= AMPERE)
        and scenario.precision == scenario.frozen_storage == "bf16"
        and scenario.attention in {"auto", "varlen", "flash_attention_2"}
        and scenario.optimizer == "adamw"
        and scenario.documents_per_row == 1
        and (scenario.shard in {"none", "ddp"} or scenario.gpus == 1)
        and logits > _PLAIN_LOGITS
        and (adapter is None or _adapts_every_linear_layer(adapter))
    )


def _adapts_every_linear_layer(adapter: Adapter) -> bool:
    """With one rank, no dropout and nothing besides."""
    targets = adapter.target_modules
    plain = Adapter(type=adapter.type, r=adapter.r)
    numbers = replace(adapter, target_modules="all-linear", alpha_pattern={}, alpha=plain.alpha)
    same = replace(numbers, use_rslora=False, init_lora_weights=True)
    return same == plain and (targets == "all-linear" or frozenset(targets) == _LINEAR_LAYERS)


def _at(scenario: Scenario) -> EventLog:
    config = scenario.config
    heads, key_heads, width = _heads(config)
    chunks = _chunks(scenario)
    dimensions = Dimensions(
        rows=scenario.micro_batch_size,
        tokens=scenario.sequence_length,
        key_value_heads=key_heads,
        queries_per_key=heads // key_heads,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        head_width=width,
        vocabulary=config["vocab_size"],
        rank=1 if scenario.adapter is None else scenario.adapter.r,
        chunk=_CHUNK_TOKENS,
        last_chunk=scenario.tokens - (chunks - 1) * _CHUNK_TOKENS,
    )
    return _load(key_of(scenario)).at(dimensions)


def key_of(scenario: Scenario) -> LogKey:
    """Which log a scenario's step is, where it is covered."""
    return LogKey(
        family=_FAMILIES[scenario.config["model_type"]],
        tied=_is_tied(scenario.config),
        method=scenario.method,
        checkpointed=scenario.activation_checkpointing,
        accumulates=scenario.micro_batches > 1,
        one_chunk=_chunks(scenario) == 1,
    )


def _load(key: LogKey) -> SymbolicLog:
    if key not in _loaded:
        data = (files("trainkit.memory") / "logs" / key.file_name).read_bytes()
        _loaded[key] = SymbolicLog.from_bytes(data)
    return _loaded[key]


def _counts(scenario: Scenario) -> dict[Axis, int]:
    """How many units of each axis that repeats."""
    chunks = _chunks(scenario)
    return {Axis.LAYER: scenario.config["num_hidden_layers"]} | ({Axis.CHUNK: chunks} if chunks > 1 else {})


def _chunks(scenario: Scenario) -> int:
    return -(-scenario.tokens // _CHUNK_TOKENS)


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Of these families only a config that says so is tied."""
    return bool(config.get("tie_word_embeddings", False))


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads, width of a head."""
    heads = config["num_attention_heads"]
    default_width = 128 if config["model_type"] == "qwen3" else config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or default_width
