"""The result of a run as files that plain transformers and peft read, and the proof that they do.

Shape legend: R rows, T tokens in a row, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainkit.errors import DivergedError, ModelError
from trainkit.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE
from trainkit.model.adapters import trained_share
from trainkit.model.checking import code_of_model, in_one_line
from trainkit.model.loading import keep_packed_as_stored, quantisation, quiet_libraries, stored_dtype
from trainkit.model.model_card import CardFacts, model_card
from trainkit.model.result_folder import new_folder
from trainkit.model.trusted_code import code_options, is_of_trusted_code

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trainkit.model.locating import ModelLocation
    from trainkit.model.trusted_code import Trust

WEIGHT_FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"})
VERIFIED_TOKENS = 256  # enough context for every layer to matter, few enough for the logits of a large vocabulary
FP32_TOLERANCE = 1e-5  # relative: the same sums in another order, as a GPU or 16 bit may have them


@dataclass(frozen=True)
class Difference:
    """How far two logit tensors lie apart: largest |a-b|, and that relative to the largest |a|."""

    largest: float
    relative: float


def save_result(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    location: ModelLocation,
    recipe_yaml: str,
    ledger_lines: Sequence[str],
    metrics: Mapping[str, Any],
    chat_template: str | None = None,
) -> tuple[str, ...]:
    """Write ``folder`` whole or not at all: weights in safetensors, tokenizer with its template, model card.

    An adapter is saved alone, in fp32; a full model in the dtype of the checkpoint it started from. Returns sentences.
    Raises DivergedError for a weight that is not finite, UsageError if ``folder`` is not ours, MachineError when
    the disk does not take it.
    """
    is_adapter = _is_adapter(model)
    sentences = [trained_share(model).sentence()]
    with new_folder(folder, replace=True, size_bytes=_result_bytes(model, location)) as staging, quiet_libraries():
        if is_adapter:
            write_adapter(model, staging, location)
            sentences.append(f"adapter in fp32; the base model is read from {location.reference}")
        else:
            dtype = write_model(model, staging, stored_dtype(location), location)
            sentences.append(f"full model in {_short(dtype)}, the dtype of the checkpoint it started from")
            if dtype != torch.float32:
                sentences.append(f"trained in float32 and rounded to {_short(dtype)} when saved")
        write_tokenizer(tokenizer, staging, chat_template)
        facts = CardFacts(
            base_model=location.public_name,
            base_revision=location.revision if location.hub_id else None,
            model_code=code_of_model(location),
            tokenizer_code=location.code if is_of_trusted_code(tokenizer) else None,
            method=f"{_method(model)} adapter" if is_adapter else "full fine-tune",
            is_adapter=is_adapter,
            has_chat_template=bool(chat_template or tokenizer.chat_template),
            recipe_yaml=recipe_yaml,
            ledger_lines=ledger_lines,
            metrics=metrics,
            sentences=[sentence for sentence in sentences if str(location.folder) not in sentence],
        )
        (staging / "README.md").write_text(model_card(facts), encoding="utf-8")
    return tuple(sentences)


def _result_bytes(model: PeftModel | PreTrainedModel, location: ModelLocation) -> int:
    """About what the result takes: an adapter in fp32 or all weights in their dtype, and files as the base has them."""
    if _is_adapter(model):
        weights: int = 4 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    else:
        weights = weights_bytes(model, stored_dtype(location))
    beside = [path for path in location.folder.iterdir() if path.suffix not in WEIGHT_FILES and path.is_file()]
    return weights + sum(path.stat().st_size for path in beside)


def weights_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What all weights take in ``dtype``, tied ones once."""
    return int(dtype.itemsize * sum(weight.numel() for weight in model.parameters()))


def verify_result(
    folder: Path,
    model: PeftModel | PreTrainedModel,
    ids_T: NDArray[Any] | Sequence[int],
    code: Trust | None = None,
) -> tuple[str, ...]:
    """Load ``folder`` anew with plain transformers and peft and compare with ``model``: weights bitwise, then logits.

    The logits are those of the tokens ``ids_T``, with plain attention on both sides, in the dtype that the base is held
    in. In fp32 on a CPU they must be the same bits, elsewhere within :data:`FP32_TOLERANCE`. What rounding a full model
    to its checkpoint's dtype moves is measured apart, and said. ``code`` is what the model needs of its own. Raises
    ModelError when the two are not the same.
    """
    is_adapter = _is_adapter(model)
    device = next(model.parameters()).device
    ids_RT = torch.tensor([[int(token) for token in ids_T[:VERIFIED_TOKENS]]], device=device)
    base = model.get_base_model() if is_adapter else model
    held = _frozen_dtype(base) if is_adapter else torch.float32
    expected = logits_of(model, ids_RT, held)
    anew = _load_as_held(folder, model, held, device, code)
    _check_tensors(folder, model, anew)
    rounding = ""
    if not is_adapter and (saved := _saved_dtype(folder)) != torch.float32:
        moved = difference_of(expected, logits_of(anew, ids_RT, held))
        rounding = f"; rounding to {_short(saved)} moved them by {moved.relative:.1e} of the largest"
        anew.load_state_dict(model.state_dict())
    difference = difference_of(expected, logits_of(anew, ids_RT, held))
    tolerance = 0.0 if device.type == "cpu" and held == torch.float32 else FP32_TOLERANCE
    if not difference.relative <= tolerance:
        raise ModelError(
            f"{folder}: loaded anew it answers differently: logits differ by {difference.relative:.1e} of the largest, "
            f"tolerance {tolerance:.0e}; do not use it, and report this"
        )
    library = "peft" if is_adapter else "transformers"
    far = (
        f"differ by at most {difference.largest:.1e} ({difference.relative:.1e} of the largest, {tolerance:.0e} may be)"
    )
    same = "the same logits" if difference.largest == 0 else f"logits {far}"
    return (f"loaded anew by plain {library}: same weights, {same}{rounding}",)


def verify_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, trust: Trust | None = None
) -> None:
    """Load the tokenizer of ``folder`` anew and compare with what was used: vocabulary, special tokens, template.

    Code is run, of which the folder then has a copy, only where the tokenizer that was used is of such. Raises
    ModelError when it cannot be loaded or is not the same.
    """
    from transformers import AutoTokenizer

    code = trust if is_of_trusted_code(tokenizer) else None
    try:
        with quiet_libraries():
            anew = AutoTokenizer.from_pretrained(str(folder), **code_options(code))
    except Exception as error:  # a damaged file fails in as many ways as tokenizers have parsers
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {in_one_line(error)}") from error
    wanted = {
        "vocabulary": (tokenizer.get_vocab(), anew.get_vocab()),
        "special tokens": (tokenizer.special_tokens_map, anew.special_tokens_map),
        "chat template": (chat_template or tokenizer.chat_template, anew.chat_template),
    }
    for what, (used, there) in wanted.items():
        if used != there:
            raise ModelError(f"{folder}: the tokenizer's {what} is not what was used; do not use it, and report this")


def write_adapter(model: PeftModel, folder: Path, location: ModelLocation) -> None:
    """Adapter weights and configuration, which names the base so that it is found from any working folder."""
    from safetensors.torch import save_file

    state = adapter_state(model)
    check_finite(state)
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = location.reference
    config.revision = location.revision if location.hub_id else None
    config.inference_mode = True
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(names := getattr(config, field), set | list):
            setattr(config, field, sorted(names))  # peft keeps sets: the file would differ from run to run
    config.save_pretrained(str(folder))


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained tensors under the names of peft's file format, on the CPU; no base weight is among them."""
    with quiet_libraries():
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # clone: tied tensors share memory, which safetensors refuses
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def write_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype, location: ModelLocation) -> torch.dtype:
    """All weights, rounded to ``dtype``, with the base's configuration. Returns the dtype that was written.

    fp32 is written instead where rounding would overflow to infinity (fp16 ends at 65,504).
    """
    from transformers import GenerationConfig

    state = model.state_dict()
    check_finite(state)
    rounded = _rounded(state, dtype)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in rounded.values()):
        dtype, rounded = torch.float32, _rounded(state, torch.float32)
    generation, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )  # many shipped ones refuse to be saved
    try:
        model.save_pretrained(str(folder), state_dict=rounded)
    finally:
        model.generation_config = generation
    (folder / "generation_config.json").unlink(missing_ok=True)
    if (location.folder / "generation_config.json").is_file():
        shutil.copyfile(location.folder / "generation_config.json", folder / "generation_config.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = json.loads((location.folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": _short(dtype), "use_cache": source.get("use_cache", True)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return dtype


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None) -> None:
    """The tokenizer as it was used, with ``chat_template`` in place of its own when one is given."""
    saved = copy.deepcopy(tokenizer)
    if chat_template is not None:
        saved.chat_template = chat_template
    saved.save_pretrained(str(folder))


def load_plainly(
    folder: Path, dtype: torch.dtype, device: torch.device, *, four_bit: bool = False, code: Trust | None = None
) -> PeftModel | PreTrainedModel:
    """A result as somebody without trainkit loads it; with the ``code`` that its model needs.

    Raises ModelError when it cannot be loaded, or when its base is not what the code belongs to.
    """
    with quiet_libraries():
        from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "use_safetensors": True}
    if four_bit:
        options["quantization_config"] = quantisation(dtype)
    if four_bit or device.type != "cpu":
        options["device_map"] = {"": device}
    with quiet_libraries():
        try:
            if not (folder / ADAPTER_CONFIG).is_file():
                return AutoModelForCausalLM.from_pretrained(str(folder), **code_options(code), **options)
            config = PeftConfig.from_pretrained(str(folder))
            name, revision = config.base_model_name_or_path, config.revision
            if code is not None and (name, revision) != (code.repository, code.commit):
                raise ModelError(f"{folder}: its base is {name} at {revision}, and the code trusted is that of {code}")
            base = AutoModelForCausalLM.from_pretrained(name, revision=revision, **code_options(code), **options)
            keep_packed_as_stored(base)
            return PeftModel.from_pretrained(base, str(folder))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{folder}: cannot be loaded: {in_one_line(error)}") from error


def logits_of(model: PeftModel | PreTrainedModel, ids_RT: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Logits (R, T, V) in fp32 on the CPU: plain attention, no dropout, autocast to ``compute`` when it is 16 bit."""
    half = compute in {torch.float16, torch.bfloat16}
    autocast = torch.autocast(ids_RT.device.type, dtype=compute) if half else nullcontext()
    with _plain_attention(model), torch.no_grad(), autocast:
        logits_RTV: torch.Tensor = model(input_ids=ids_RT, use_cache=False).logits
    return logits_RTV.float().cpu()


def difference_of(expected: torch.Tensor, actual: torch.Tensor) -> Difference:
    """See :class:`Difference`; NaN anywhere makes both NaN, which no tolerance admits."""
    largest = float((expected - actual).abs().max())
    return Difference(largest, largest / max(float(expected.abs().max()), torch.finfo(torch.float32).tiny))


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Raise DivergedError for the first tensor that holds a NaN or an infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DivergedError(
                f"`{name}` is not finite, so nothing was saved; train anew with a lower training.learning_rate"
            )


@contextmanager
def _plain_attention(model: PeftModel | PreTrainedModel) -> Iterator[None]:
    """Eager attention of transformers in evaluation mode: what every loader of the result has."""
    base = model.get_base_model() if _is_adapter(model) else model
    before = base.config._attn_implementation  # noqa: SLF001 - transformers offers no public reader
    was_training = model.training
    with quiet_libraries():
        base.set_attn_implementation("eager")
        model.eval()
    try:
        yield
    finally:
        with quiet_libraries():
            base.set_attn_implementation(before)
        model.train(was_training)


def _load_as_held(
    folder: Path,
    model: PeftModel | PreTrainedModel,
    held: torch.dtype,
    device: torch.device,
    code: Trust | None,
) -> PeftModel | PreTrainedModel:
    """The result loaded plainly, each weight in the dtype it has in ``model``.

    On a 16-bit base peft would round the trained copies of modules_to_save, so these come through fp32.
    """
    base = model.get_base_model() if _is_adapter(model) else model
    four_bit = bool(getattr(base, "is_loaded_in_4bit", False))
    through_fp32 = _is_adapter(model) and bool(model.peft_config["default"].modules_to_save)
    anew = load_plainly(folder, torch.float32 if through_fp32 else held, device, four_bit=four_bit, code=code)
    if through_fp32 and held != torch.float32:
        for name, parameter in anew.named_parameters():
            if parameter.is_floating_point() and ".modules_to_save." not in name and ".lora_" not in name:
                parameter.data = parameter.data.to(held)
    return anew


def _check_tensors(folder: Path, model: PeftModel | PreTrainedModel, anew: PeftModel | PreTrainedModel) -> None:
    if _is_adapter(model):
        mine, theirs = adapter_state(model), adapter_state(anew)
    else:
        saved = _saved_dtype(folder)
        mine = _rounded(model.state_dict(), saved)
        theirs = {name: tensor.cpu() for name, tensor in anew.state_dict().items()}
    if mine.keys() != theirs.keys():
        raise ModelError(f"{folder}: holds other tensors than the model: {min(mine.keys() ^ theirs.keys())}")
    for name, tensor in theirs.items():
        if not torch.equal(tensor, mine[name].to(tensor.dtype)):
            raise ModelError(f"{folder}: `{name}` is not what the model holds; do not use it, and report this")


def _rounded(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state on the CPU in ``dtype``; tensors that were one stay one, so that they are written once."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    rounded = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        rounded[name] = done[key]
    return rounded


def _saved_dtype(folder: Path) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"])
    return dtype


def _frozen_dtype(base: PreTrainedModel) -> torch.dtype:
    """The dtype of the base's own weights; bytes in which 4-bit numbers are packed do not count."""
    frozen = (p.dtype for p in base.parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, torch.float32)


def _is_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _method(model: PeftModel) -> str:
    if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        return "QLoRA"
    return "DoRA" if model.peft_config["default"].use_dora else "LoRA"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
