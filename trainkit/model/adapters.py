"""LoRA through peft: every name of the recipe is checked against the model before peft sees it.

peft passes over a name that matches nothing as long as another one matches, and takes ``modules_to_save: [norm]`` for
everything that ends in these letters. Here a name is a module's full name or its dotted ending; it matches, or it is
refused.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from trainkit.errors import UsageError
from trainkit.model.checking import in_one_line, some_of
from trainkit.model.loading import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from trainkit.recipe.schema import Adapter

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class TargetCount:
    """What one kind of module adds to the trained parameters: ``q_proj`` in 5 layers, rank 8."""

    name: str
    modules: int
    ranks: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class TrainedShare:
    """How many parameters are trained, of how many; a copy that peft keeps beside a trained module counts once."""

    trained: int
    total: int
    targets: tuple[TargetCount, ...]

    def sentence(self) -> str:
        """Both numbers and the share."""
        percent = 100 * self.trained / self.total
        digits = 1 if percent >= 1 else 3
        return f"{self.trained:,} of {self.total:,} parameters trained ({percent:.{digits}f} %)"


def check_adapter(model: PreTrainedModel, adapter: Adapter | None) -> None:
    """Raise UsageError for the names and ranks that :func:`attach_adapter` would refuse.

    No weight is looked at: ``model`` may be empty (:func:`trainkit.model.checking.empty_model`).
    """
    if adapter is not None:
        _lora_config(model, adapter)


def attach_adapter(
    model: PreTrainedModel, adapter: Adapter | None, seed: int
) -> tuple[PeftModel | PreTrainedModel, tuple[str, ...]]:
    """The model with fp32 adapter weights on a frozen base, and what is to be said of it.

    Without adapter all parameters are trained. New weights depend on ``seed`` alone, and no random state is moved.
    Raises UsageError when a name of the recipe matches no module, a rank exceeds its module, or nothing is trained.
    """
    if adapter is None:
        model.requires_grad_(requires_grad=True)
        return model, (f"full fine-tuning: {trained_share(model).sentence()}",)
    with quiet_libraries():
        from peft import get_peft_model

    config, targets = _lora_config(model, adapter)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet_libraries():
        torch.manual_seed(seed)
        try:
            adapted: PeftModel = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise UsageError(f"adapter: peft refuses it: {in_one_line(error)}") from error
    if others := sorted(_adapted_names(adapted) ^ set(targets)):
        names = ", ".join(attention_targets(model))
        way_out = f"set adapter.target_modules: [{names}]" if names else "train another model, or every weight"
        raise UsageError(
            f"adapter.target_modules: peft has a rule of its own for {type(model).__name__} and does not adapt what is "
            f"asked ({others[0]}); {way_out}"
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft leaves copies of 16-bit modules_to_save in 16 bit
    share = trained_share(adapted)
    if share.trained == 0:
        raise UsageError("adapter: nothing is trained: 0 parameters")
    method = "QLoRA" if adapter.type == "qlora" else "DoRA" if adapter.use_dora else "LoRA"
    return adapted, (f"{method}: {share.sentence()}", _targets_sentence(share))


def trained_share(model: nn.Module) -> TrainedShare:
    """The parameters of ``model`` that are trained, by kind of module."""
    trained = total = 0
    modules: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    ranks: dict[str, set[int]] = {}
    owners: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        size = _numbers(parameter)
        total += size
        if not parameter.requires_grad:
            continue
        trained += size
        owner = (
            re.split(r"\.(?:lora_|modules_to_save\.)", name)[0]
            if ".lora_" in name or ".modules_to_save." in name
            else ""
        )
        if not owner:
            continue
        kind = owner.rsplit(".", 1)[-1]
        parameters[kind] += size
        owners.setdefault(kind, set()).add(owner)
        if ".lora_A." in name or ".lora_embedding_A." in name:
            ranks.setdefault(kind, set()).add(parameter.shape[0])
    for kind, names in owners.items():
        modules[kind] = len(names)
    return TrainedShare(
        trained,
        total,
        tuple(TargetCount(k, modules[k], tuple(sorted(ranks.get(k, ()))), parameters[k]) for k in sorted(parameters)),
    )


def trained_tensor_names(model: PeftModel) -> frozenset[str]:
    """Names, in the base model's state dict, of the tensors that merging this adapter may change."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    names: set[str] = set()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            names.add(f"{name}.weight")
        elif isinstance(module, ModulesToSaveWrapper):
            names.update(f"{name}.{key}" for key, _ in module.original_module.named_parameters())
    return frozenset(names)


def _lora_config(model: PreTrainedModel, adapter: Adapter) -> tuple[LoraConfig, dict[str, nn.Module]]:
    """The configuration for peft, and the modules that will get an adapter."""
    with quiet_libraries():
        from peft import LoraConfig

    modules = {name: module for name, module in model.named_modules() if name}
    saved = _resolve("adapter.modules_to_save", adapter.modules_to_save, modules)
    targets = _targets(model, adapter, modules, saved)
    _check_tied(model, targets, saved)
    options: dict[str, Any] = {}
    if adapter.layers_to_transform is not None:
        options["layers_to_transform"] = list(adapter.layers_to_transform)
    if saved and _is_tied(model) and _touches_embedding(model, saved):
        options["ensure_weight_tying"] = True  # input embedding and output head stay one matrix
    by_layer = adapter.target_modules == "all-linear" and adapter.layers_to_transform is not None
    endings = sorted({_ending(name) for name in targets}) if by_layer else adapter.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=endings if isinstance(endings, str) else list(endings),
        exclude_modules=list(adapter.exclude_modules) or None,
        modules_to_save=list(saved) or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=adapter.init_lora_weights,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        **options,
    )
    _check_ranks(adapter, targets)
    return config, targets


def _targets(
    model: PreTrainedModel, adapter: Adapter, modules: Mapping[str, nn.Module], saved: Sequence[str]
) -> dict[str, nn.Module]:
    """The modules that get an adapter: named or linear, not excluded, not trained in full, in the chosen layers."""
    fitting = {name: module for name, module in modules.items() if _takes_adapter(module)}
    if adapter.target_modules == "all-linear":
        head = model.get_output_embeddings()
        chosen = {n: m for n, m in fitting.items() if m is not head and not isinstance(m, nn.Embedding)}
    else:
        names = _resolve("adapter.target_modules", adapter.target_modules, fitting)
        chosen = {name: fitting[name] for name in names}
    chosen = {n: m for n, m in chosen.items() if not any(n == s or n.startswith(f"{s}.") for s in saved)}
    excluded = set(_resolve("adapter.exclude_modules", adapter.exclude_modules, chosen))
    chosen = {name: module for name, module in chosen.items() if name not in excluded}
    if adapter.layers_to_transform is not None:
        there = {index for name in chosen if (index := _layer_index(name)) is not None}
        if absent := sorted(set(adapter.layers_to_transform) - there):
            raise UsageError(
                f"adapter.layers_to_transform: no layer {', '.join(map(str, absent))} among the targets; "
                f"the model's layers are {min(there, default=0)} to {max(there, default=0)}"
            )
        chosen = {n: m for n, m in chosen.items() if _layer_index(n) in adapter.layers_to_transform}
    if not chosen and not saved:
        raise UsageError("adapter: exclude_modules leaves no module to adapt, so nothing would be trained")
    return chosen


def attention_targets(model: nn.Module) -> list[str]:
    """Endings of the linear layers within attention, in their order; experts and routers are not among them."""
    linear = (
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in f".{name}"
    )
    owners = (name.removesuffix(".base_layer") for name in linear)
    return list(dict.fromkeys(_ending(name) for name in owners if _ending(name.rpartition(".")[0]).endswith("attn")))


def _resolve(key: str, entries: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Full names of the modules that ``entries`` (full names or dotted endings) name; each must name one."""
    found: dict[str, None] = {}
    for entry in entries:
        matching = [name for name in modules if name == entry or name.endswith(f".{entry}")]
        if not matching:
            endings = sorted({_ending(name) for name in modules if not _ending(name).isdigit()})
            close = difflib.get_close_matches(entry, endings, n=1)
            hint = f"did you mean `{close[0]}`? " if close else ""
            raise UsageError(f"{key}: `{entry}` matches no module; {hint}there are: {some_of(endings, 8)}")
        found.update(dict.fromkeys(matching))
    return tuple(found)


def _check_ranks(adapter: Adapter, targets: Mapping[str, nn.Module]) -> None:
    _pattern_values("adapter.alpha_pattern", adapter.alpha_pattern, targets, adapter.alpha)
    ranks = _pattern_values("adapter.rank_pattern", adapter.rank_pattern, targets, adapter.r)
    for name, module in targets.items():
        smaller = min(_matrix_shape(module))
        if ranks[name] > smaller:
            rows, columns = _matrix_shape(module)
            raise UsageError(
                f"adapter.r: {ranks[name]} is more than {smaller}, the full rank of {name} ({rows} × {columns}); set "
                f"r: {smaller} or less, or train fully"
            )


def _pattern_values(
    key: str, patterns: Mapping[str, Number], targets: Iterable[str], default: Number
) -> dict[str, Number]:
    """The value of each target: of the first pattern that matches its name as peft matches, or the default."""
    compiled = {}
    for pattern in patterns:
        try:
            compiled[pattern] = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise UsageError(f"{key}: `{pattern}` is no regular expression: {error}") from error
    values: dict[str, Number] = {}
    used = set()
    for name in targets:
        first = next((text for text, expression in compiled.items() if expression.match(name)), None)
        values[name] = default if first is None else patterns[first]
        used.add(first)
    if unused := [pattern for pattern in patterns if pattern not in used]:
        endings = ", ".join(sorted({_ending(name) for name in values}))
        raise UsageError(f"{key}: `{unused[0]}` matches no module with an adapter; there are: {endings}")
    return values


def _check_tied(model: PreTrainedModel, targets: Mapping[str, nn.Module], saved: Sequence[str]) -> None:
    """Refuse what would pull a tied input embedding and output head apart: the base format cannot hold both."""
    if not _is_tied(model):
        return
    if _touches_embedding(model, tuple(targets)):
        raise UsageError(
            "adapter.target_modules: input embedding and output head of this model are one matrix, and a low-rank "
            "update of one cannot be merged; train it in full: modules_to_save: [embed_tokens]"
        )
    if _touches_embedding(model, saved):
        from peft import LoraConfig
        from peft.utils.constants import EMBEDDING_LAYER_NAMES

        known = all(_ending(name) in EMBEDDING_LAYER_NAMES for name in _embedding_names(model))
        if not known or not hasattr(LoraConfig, "ensure_weight_tying"):
            raise UsageError(
                "adapter.modules_to_save: input embedding and output head of this model are one matrix, and this peft "
                "cannot keep them one; leave them out, or train fully"
            )


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _embedding_names(model: PreTrainedModel) -> set[str]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name for name, module in model.named_modules() if any(module is end for end in ends)}


def _touches_embedding(model: PreTrainedModel, names: Sequence[str]) -> bool:
    return not _embedding_names(model).isdisjoint(names)


def _adapted_names(model: PeftModel) -> set[str]:
    from peft.tuners.lora import LoraLayer

    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


def _takes_adapter(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Output and input width; a 4-bit weight is packed, so the module's own fields are asked first."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return rows, columns


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; bitsandbytes packs two 4-bit numbers into a byte."""
    if type(parameter).__name__ == "Params4bit" and not parameter.is_floating_point():
        return 2 * parameter.numel() * parameter.element_size()
    return parameter.numel()


def _ending(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _layer_index(name: str) -> int | None:
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)  # as peft finds it
    return int(match[1]) if match else None


def _targets_sentence(share: TrainedShare) -> str:
    parts = []
    for target in share.targets:
        rank = f", r {'/'.join(map(str, target.ranks))}" if target.ranks else ", in full"
        parts.append(f"{target.name} × {target.modules}{rank}: {target.parameters:,}")
    return "per target: " + "; ".join(parts)
