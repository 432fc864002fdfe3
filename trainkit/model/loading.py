"""A model and its tokenizer, loaded so that every weight is known to come from the files.

The rooms around it: ``locating`` finds the folder, ``checking`` reads what can be read without weights.
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from trainkit.errors import MachineError, ModelError
from trainkit.model.checking import (
    TOKENIZER_CONFIG_FILE,
    check_model,
    check_vocabulary,
    code_of_model,
    in_one_line,
    read_json,
    some_of,
    stored_dtype,
    stored_tensors,
    weight_files,
)
from trainkit.model.locating import ModelLocation, locate_model
from trainkit.model.trusted_code import code_options, how_to_trust, is_of_trusted_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trainkit.recipe.schema import Adapter, Recipe

__all__ = [
    "LoadedModel",
    "ModelLocation",
    "check_extras",
    "check_model",
    "check_vocabulary",
    "code_of_tokenizer",
    "keep_packed_as_stored",
    "load_model",
    "load_tokenizer",
    "locate_model",
    "quantisation",
    "quiet_libraries",
    "stored_dtype",
    "tokenizer_sentences",
]

TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG_FILE, "special_tokens_map.json")
# What a tokenizer of a model's own code may not change: texts are encoded by its engine, which knows nothing of it.
ENCODING_METHODS = (
    "__call__",
    "encode",
    "_encode_plus",
    "decode",
    "_decode",
    "apply_chat_template",
    "backend_tokenizer",
)
SPARE_TOKEN = re.compile(
    r"pad|reserved|unused|extra_|finetune_right", re.IGNORECASE
)  # how model makers name tokens without a use


LARGEST_MOVE_OF_NF4 = 0.2


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, and what is to be said of how it was loaded."""

    model: PreTrainedModel
    sentences: tuple[str, ...]


def check_extras(recipe: Recipe) -> None:
    """Raise MachineError when the recipe needs an optional package that is not installed; before anything is read."""
    from importlib.util import find_spec

    needs = [
        name
        for name, wanted in (
            ("adapter.type: qlora", recipe.adapter is not None and recipe.adapter.type == "qlora"),
            ("training.optimizer: adamw_8bit", recipe.training.optimizer == "adamw_8bit"),
        )
        if wanted
    ]
    if needs and find_spec("bitsandbytes") is None:
        raise MachineError(f"{needs[0]}: needs bitsandbytes, which is not installed; pip install 'trainkit[qlora]'")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers, peft and what peft imports from writing to the terminal; what matters of it we check and say.

    An import of peft belongs inside: it imports bitsandbytes, which warns of faster kernels that could be downloaded.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    four_bit = getLogger("bitsandbytes")
    four_bit_level = four_bit.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    four_bit.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        four_bit.setLevel(four_bit_level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(location: ModelLocation) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with offsets, and with a pad token.

    Where ``tokenizer.json`` and the class named in ``tokenizer_config.json`` cut text differently, the file is taken:
    it is what the model was trained with. Raises ModelError where there is none that gives offsets.
    """
    from transformers import PreTrainedTokenizerFast

    folder = location.folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")):
        raise ModelError(f"{folder}: no tokenizer: copy tokenizer.json and tokenizer_config.json of the model here")
    try:
        with quiet_libraries():
            tokenizer = _declared(location)
            if _differs_from_file(tokenizer, location):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        for name in TOKENIZER_FILES:  # what is no JSON is named with its line
            if (folder / name).is_file():
                read_json(folder / name, missing="missing")
        if _asks_for_code(error):
            raise ModelError(
                f"{folder}: its tokenizer needs Python code of the model's own, {how_to_trust(location)}"
            ) from error
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded: {in_one_line(error, 80)}; copy tokenizer.json and "
            "tokenizer_config.json of the model anew"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: {type(tokenizer).__name__} gives no offsets; add a tokenizer.json "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one for most models)"
        )
    if is_of_trusted_code(tokenizer):
        _check_encodes_by_engine(location, tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = _pad_token(tokenizer, location)
    return tokenizer


def tokenizer_sentences(location: ModelLocation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What was chosen in :func:`load_tokenizer`: the pad token, and the file instead of the class."""
    pad, pad_id = tokenizer.pad_token, tokenizer.pad_token_id
    own = tokenizer.init_kwargs.get("pad_token")
    why = (
        "the tokenizer's own"
        if own is not None and str(own) == pad
        else "chosen: the tokenizer has none apart from eos"
    )
    if pad == tokenizer.eos_token:
        why = "eos: there is no spare token; padding is masked, so its end is still learned only where a text ends"
    sentences = [f"pad token {pad} (id {pad_id}), {why}; never trained, seen by no document"]
    declared = _tokenizer_config(location).get("tokenizer_class")
    if type(tokenizer).__name__ != declared and _differs_from_file(_declared(location), location):
        sentences.append(f"tokenizer.json is taken as it stands: {declared} would cut text differently")
    return tuple(sentences)


def code_of_tokenizer(location: ModelLocation, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a command that loads no more than the tokenizer says of the trusted code; None where none is trusted."""
    if location.code is None:
        return None
    if is_of_trusted_code(tokenizer):
        return f"code: the tokenizer runs Python code of {location.code.repository}, commit {location.code.commit}"
    return f"code: none of {location.code.repository} was run, its tokenizer needs none"


def load_model(
    location: ModelLocation,
    adapter: Adapter | None,
    frozen_dtype: torch.dtype,
    device: torch.device,
    attention_implementation: str | None = None,
    activation_checkpointing: bool = False,
) -> LoadedModel:
    """The model of ``location`` on ``device``, ready to be trained.

    Without adapter every parameter is fp32, as master weights must be; with one the base has ``frozen_dtype``, or 4 bit
    (NF4) for qlora. Raises ModelError when a weight does not come from the files, has another shape or is not finite.
    """
    from transformers import AutoModelForCausalLM

    four_bit = adapter is not None and adapter.type == "qlora"
    dtype = torch.float32 if adapter is None else frozen_dtype
    options: dict[str, Any] = {"dtype": dtype}
    if attention_implementation is not None:
        options["attn_implementation"] = attention_implementation
    if four_bit:
        check_stored_weights_finite(location)
        options["quantization_config"] = quantisation(dtype)
    if four_bit or device.type != "cpu":
        options["device_map"] = {"": device}  # straight to the device: no second copy in host memory
    with quiet_libraries():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(location.folder),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the mismatch is ours to name
                local_files_only=True,
                use_safetensors=True,
                **code_options(code_of_model(location)),
                **options,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise MachineError(
                    f"{location.name}: the weights do not fit on {device}; take a smaller model, or adapter.type: qlora"
                ) from error
            raise ModelError(f"{location.folder}: cannot be loaded: {in_one_line(error)}") from error
    _check_every_weight(location, loading)
    if four_bit:
        keep_packed_as_stored(model)
        _check_kernels_of_4_bit(model, device)
    else:
        _check_finite(location, model, dtype)
    model.config.use_cache = False
    model.name_or_path = location.reference  # what peft writes into adapter_config.json
    if activation_checkpointing:
        enable_activation_checkpointing(model)
    stored = str(stored_dtype(location)).removeprefix("torch.")
    count = len(stored_tensors(location)) - len(loading["unexpected_keys"])
    held = "4 bit (NF4, double quantisation)" if four_bit else str(dtype).removeprefix("torch.")
    sentences = [f"{location.name}: {count:,} tensors, all finite, stored as {stored}, held as {held}"]
    if loading["unexpected_keys"]:
        names = sorted(loading["unexpected_keys"])
        sentences.append(f"{location.name}: {len(names)} tensors of the files have no place in the model: {names[0]} …")
    return LoadedModel(model, tuple(sentences))


def quantisation(compute_dtype: torch.dtype) -> Any:
    """NF4 with double quantisation, as in the QLoRA paper (arXiv 2305.14314, sections 3 and 4)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_packed_as_stored(model: torch.nn.Module) -> None:
    """Leave 4-bit weights in the form they were made in.

    On processors with AVX512-BF16, bitsandbytes (0.50) packs the weights of a layer anew when it first computes without
    gradients, in place: a layer that is evaluated and trained in turns would find them in one form and then the other,
    and one with fewer than 64 inputs fails.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_kernels_of_4_bit(model: torch.nn.Module, device: torch.device) -> None:
    """Raise MachineError where 4-bit weights do not come back as what they were made from, up to the rounding of NF4.

    On some processors bitsandbytes (0.50) decodes rows whose length is no multiple of its block of 64 wrongly. NF4's
    steps are at most 0.31 of a block's largest number wide, so that rounding moves none by more than half of that.
    """
    from bitsandbytes import functional, nn

    widths = {module.in_features for module in model.modules() if isinstance(module, nn.Linear4bit)}
    generator = torch.Generator().manual_seed(0)
    for width in sorted(widths):
        made = torch.randn(64, width, generator=generator).to(device)
        packed, state = functional.quantize_4bit(made, quant_type="nf4", compress_statistics=True)
        moved = float((functional.dequantize_4bit(packed, state) - made).abs().max() / made.abs().max())
        if moved > LARGEST_MOVE_OF_NF4:
            raise MachineError(
                f"adapter.type: qlora: bitsandbytes decodes 4-bit weights of layers with {width} inputs wrongly on "
                f"this {'processor' if device.type == 'cpu' else 'GPU'} (numbers move by {moved:.0%}); use lora"
            )


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; non-reentrant, so that it works below frozen embeddings too."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def check_stored_weights_finite(location: ModelLocation) -> None:
    """Read every weight once and raise ModelError for the first tensor with a NaN or an infinity."""
    from safetensors import safe_open

    for path in weight_files(location.folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if bad := _not_finite(tensor):
                    raise ModelError(f"{path}: `{name}` has {bad:,} values that are not finite; restore the model")


def _check_every_weight(location: ModelLocation, loading: dict[str, Any]) -> None:
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{location.folder}: {len(missing)} weights are in none of the files: {some_of(missing, 1)}; "
            "they would start random: restore the files or their index"
        )
    if loading["mismatched_keys"]:
        name, stored, wanted = min(loading["mismatched_keys"])
        raise ModelError(
            f"{location.folder}: `{name}` has shape {tuple(stored)} in the files, config.json asks for {tuple(wanted)}"
        )
    if loading["error_msgs"]:
        raise ModelError(f"{location.folder}: {in_one_line(ValueError(loading['error_msgs'][0]))}; restore the files")


def _check_finite(location: ModelLocation, model: PreTrainedModel, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if bad := _not_finite(parameter):
            check_stored_weights_finite(location)  # raises when the file itself is the cause
            raise ModelError(
                f"{location.folder}: `{name}` has {bad:,} values beyond the range of "
                f"{str(dtype).removeprefix('torch.')}; set precision: bf16 or fp32"
            )


def _not_finite(tensor: torch.Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    # Extremes are finite exactly when every value is, and cost no second tensor; most tensors end here.
    if tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.detach().aminmax()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _tokenizer_config(location: ModelLocation) -> dict[str, Any]:
    path = location.folder / TOKENIZER_CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values if isinstance(values, dict) else {}


def _declared(location: ModelLocation) -> PreTrainedTokenizerBase:
    """The tokenizer as its folder says, by code of its own only where transformers has none and it is trusted."""
    from transformers import AutoTokenizer

    folder = str(location.folder)
    with quiet_libraries():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            if location.code is None or not _asks_for_code(error):
                raise
            tokenizer = AutoTokenizer.from_pretrained(folder, **code_options(location.code))
    return tokenizer


def _asks_for_code(error: BaseException) -> bool:
    """Whether transformers refuses because it may not run code; it has no class of its own for that."""
    return "custom code" in str(error)


def _check_encodes_by_engine(location: ModelLocation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError where the tokenizer's own code encodes or renders otherwise than its engine and template do."""
    from transformers import PreTrainedTokenizerFast

    for name in ENCODING_METHODS:
        if getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None):
            raise ModelError(
                f"{location.folder}: the code of its tokenizer has a `{name}` of its own, so that what is trained "
                "cannot be shown to be right; give a model whose tokenizer is all in its tokenizer.json"
            )


def _differs_from_file(tokenizer: PreTrainedTokenizerBase, location: ModelLocation) -> bool:
    """Whether the class rebuilt what cuts the text, instead of taking tokenizer.json as it stands."""
    path = location.folder / "tokenizer.json"
    if not tokenizer.is_fast or not path.is_file():
        return False
    from tokenizers import Tokenizer

    file = json.loads(Tokenizer.from_file(str(path)).to_str())
    built = json.loads(tokenizer.backend_tokenizer.to_str())
    return any(file[part] != built[part] for part in ("normalizer", "pre_tokenizer", "model", "decoder"))


def _pad_token(tokenizer: PreTrainedTokenizerBase, location: ModelLocation) -> str:
    """A token that no text contains: a spare special token, else unk; eos only where there is nothing else."""
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    spare = [token for token in special if SPARE_TOKEN.search(token) and token not in used]
    choice = next(iter(spare), None) or tokenizer.unk_token or tokenizer.eos_token
    if choice is None:
        raise ModelError(
            f"{location.folder}: the tokenizer has no pad, unk or eos token; name one in tokenizer_config.json"
        )
    return str(choice)
