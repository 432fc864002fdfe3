"""The run's own model without a single weight: its class built from its config, adapted, and made of fake tensors.

Everything is built on the meta device, which knows shapes and types, and only then turned into fake tensors: peft
cannot build its layers on those.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from trainkit.errors import ModelError, TrainkitError
from trainkit.memory.event_log import TRACED
from trainkit.memory.four_bit import FourBitLinear, quantise
from trainkit.model.adapters import attach_adapter, trained_share
from trainkit.model.attention import AttentionChoice, choose_attention
from trainkit.model.checking import CONFIG_FILE, reason_of
from trainkit.model.loading import quiet_libraries
from trainkit.model.sharding import decoder_layers
from trainkit.model.trusted_code import needs_code

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainkit.memory.scenario import Scenario
    from trainkit.recipe.precision import PrecisionName
    from trainkit.recipe.schema import Adapter

DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SEED = 0  # weights without values need no better
_LONGEST_PERIOD = 6  # Gemma 3: five local layers, a global one
_NUMBERING = ("layer_idx", "layer_id")  # what a layer knows of its place


@dataclass(frozen=True)
class FakeModel:
    """A model whose tensors are fake, and what is known of the real one.

    ``depth`` is the real number of layers; ``layers`` are those that were built. ``period`` of them are a unit, which
    repeats; the first unit has the odd layers besides.
    """

    model: Any
    attention: AttentionChoice
    mode: FakeTensorMode
    layers: nn.ModuleList
    depth: int
    parameters: int
    trainable_parameters: int
    period: int = 1

    @property
    def units(self) -> int:
        """How often a unit repeats in the whole depth."""
        return self.depth // self.period

    def unit_of(self, index: int) -> int:
        """The unit of a layer."""
        return unit_of(index, self.depth, self.period)


def unit_of(index: int, depth: int, period: int) -> int:
    """The unit of a layer, where the layers that are left over are the first.

    >>> [unit_of(index, depth=7, period=3) for index in range(7)]
    [0, 0, 0, 0, 1, 1, 1]
    """
    return max(0, index - depth % period) // period


def parse_config(config: Mapping[str, Any], place: str = CONFIG_FILE) -> Any:
    """The transformers configuration of a config.json's content, which an error says to stand at ``place``.

    Raises ModelError where there is no such class.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.get("model_type")
    if needs_code(config):
        raise ModelError(
            f"{place}: model_type {kind!r} needs code of its own (trust_remote_code), which no estimate runs"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(f"{place}: model_type {kind!r} is unknown to this transformers; use another model")
    values = {name: value for name, value in config.items() if name not in {"model_type", "auto_map"}}
    try:
        with quiet_libraries():
            parsed = CONFIG_MAPPING[kind](**values)
    except Exception as error:  # validation differs from class to class
        raise ModelError(f"{place}: {reason_of(error, values)}; restore the file") from error
    if type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(parsed.get_text_config()) not in (
        MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise ModelError(f"{place}: transformers has no causal language model of type {kind}; use another model")
    return parsed


def fake_model(scenario: Scenario, *, full_depth: bool, period: int = 1) -> FakeModel:
    """The model of a scenario; with :data:`TRACED` units of ``period`` layers unless ``full_depth`` or it has fewer.

    Raises ModelError where it cannot be built, UsageError for an adapter that does not fit it.
    """
    whole = parse_config(scenario.config, scenario.place)
    depth = whole.get_text_config().num_hidden_layers
    built = depth if full_depth else min(depth, TRACED * period + depth % period)
    device = torch.device(scenario.device.kind)
    # The flash-attn package is the same kernel for memory's sake, and cannot be called without a GPU.
    stands_in = scenario.attention == "flash_attention_2" and device.type == "cuda"
    requested = "varlen" if stands_in else scenario.attention
    attention = choose_attention(requested, device, whole, capability=scenario.device.capability)
    less_deep = parse_config(_with_layers(scenario.config, built), scenario.place)
    model = _adapted(_base_model(scenario, less_deep, attention), scenario)
    layers = decoder_layers(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(model, mode)
    total, trained = _counts(model, layers, depth, period)
    return FakeModel(model, attention, mode, layers, depth, total, trained, period)


def unit_of_tensors(model: FakeModel) -> dict[int, int]:
    """Which unit a parameter or a buffer belongs to, by its identity."""
    return {
        id(tensor): model.unit_of(index)
        for index, layer in enumerate(model.layers)
        for tensor in (*layer.parameters(), *layer.buffers())
    }


def period_of(config: Mapping[str, Any], place: str = CONFIG_FILE) -> int | None:
    """After how many layers the same kinds of layers come again: 1 where all are of one kind; None where it is never.

    Layers are of one kind that have the same modules, shapes and settings. The first unit may differ from the others.
    """
    model = _on_meta(parse_config(config, place), torch.float32, None, place)
    kinds = [_signature(layer) for layer in decoder_layers(model)]
    for period in range(1, min(_LONGEST_PERIOD, max(1, len(kinds) // TRACED)) + 1):
        first = period + len(kinds) % period
        if all(one == other for one, other in zip(kinds[first:], kinds[first + period :], strict=False)):
            return period
    return None


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    settings = []
    for name, module in layer.named_modules():
        plain = sorted(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in _NUMBERING and not key.startswith("_")
        )
        shapes = tuple((key, tuple(tensor.shape)) for key, tensor in module.named_parameters(recurse=False))
        settings.append((name, type(module).__name__, tuple(plain), shapes))
    return tuple(settings)


def _with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config with fewer layers; a list with an entry for each layer is cut too."""
    depth = config.get("num_hidden_layers")
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": _with_layers(config["text_config"], layers)}
    cut = {
        name: value[:layers] if isinstance(value, list) and len(value) == depth else value
        for name, value in config.items()
    }
    return {**cut, "num_hidden_layers": layers}


def _base_model(scenario: Scenario, config: Any, attention: AttentionChoice) -> Any:
    """The model as trainkit loads it: fp32 where all of it trains, else the type of the frozen weights, or 4 bit."""
    dtype = torch.float32 if scenario.adapter is None else DTYPES[scenario.frozen_storage]
    stock = {"eager": "eager"}.get(attention.name, "sdpa") if scenario.loop == "transformers" else None
    model = _on_meta(config, dtype, stock, scenario.place)
    if scenario.method == "qlora":
        plain = scenario.loop == "trainkit"
        quantise(model, model.get_output_embeddings(), dtype, double_quantisation=plain)
        if not plain:
            _widen_small(model)
    if scenario.activation_checkpointing:
        # The generators' states are no memory of the device; without them a fake step needs no generator.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(options)
    model.config.use_cache = False
    return model.train()


def _on_meta(config: Any, dtype: torch.dtype, attention: str | None, place: str = CONFIG_FILE) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"), no_init_weights(), quiet_libraries():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
            model.tie_weights()  # without initialisation it is not done
    except TrainkitError:
        raise
    except Exception as error:  # whatever a model class makes of a config that does not fit
        reason = reason_of(error, config.to_dict())
        raise ModelError(f"{place}: no model can be built: {reason}; restore the file") from error
    return model


def _widen_small(model: nn.Module) -> None:
    """What peft's prepare_model_for_kbit_training does: every weight that is not packed becomes fp32."""
    model.requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _adapted(model: Any, scenario: Scenario) -> Any:
    adapter = scenario.adapter
    if adapter is not None:
        adapter = _without_values(adapter)
    with torch.device("meta"):  # where peft makes its factors, before it moves them to the layer's device
        adapted, _ = attach_adapter(model, adapter, _SEED)
    if scenario.method != "qlora":
        return adapted
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, FourBitLinear):
            module.base_layer.is_adapted = True
            # peft's 4-bit layer leaves its input alone under autocast, and casts it otherwise.
            module.cast_input_dtype_enabled = scenario.loop == "transformers" or scenario.precision == "fp32"
    return adapted


def _without_values(adapter: Adapter) -> Adapter:
    """How the factors start needs values (a decomposition of the weights) and changes no size."""
    return replace(adapter, init_lora_weights=True)


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Meta tensors → fake tensors of the type "cpu"; shared ones stay shared."""
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the meta tensor is kept, so that its id stays its own

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            meta = tensor.detach()
            if not meta.is_meta:
                meta = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta")
            made: torch.Tensor = FakeTensor(mode, meta, torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            known[id(tensor)] = (tensor, made)
        return known[id(tensor)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001 - modules let nobody else replace them
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _counts(model: nn.Module, layers: nn.ModuleList, depth: int, period: int) -> tuple[int, int]:
    """Parameters and trained parameters of the whole depth: each unit beyond those built is like the last but one."""
    total = Counter(trained_counts(model))
    if depth != len(layers):
        more = (depth - len(layers)) // period
        for layer in layers[-2 * period : -period]:
            for name, count in trained_counts(layer).items():
                total[name] += more * count
    return total["own"], total["trained"]


def trained_counts(module: nn.Module) -> dict[str, int]:
    """Numbers in a module's parameters: the model's ``own`` (unpacked, without adapters) and those ``trained``."""
    share = trained_share(module)
    packed = sum(
        child.in_features * child.out_features - child.weight.numel()
        for child in module.modules()
        if isinstance(child, FourBitLinear)
    )
    added = sum(parameter.numel() for name, parameter in module.named_parameters() if "lora_" in name)
    return {"own": share.total + packed - added, "trained": share.trained}
