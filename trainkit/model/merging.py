"""An adapter folded into its base model, in fp32 on the CPU, and the proof that nothing else changed."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainkit.errors import ModelError, UsageError
from trainkit.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, read_adapter_config
from trainkit.model.adapters import trained_tensor_names
from trainkit.model.checking import (
    DIGESTS,
    check_model,
    code_of_model,
    in_one_line,
    read_json,
    recorded_digests,
    recorded_names,
    sha256,
    stored_dtype,
)
from trainkit.model.export import (
    FP32_TOLERANCE,
    Difference,
    check_finite,
    difference_of,
    load_plainly,
    logits_of,
    weights_bytes,
    write_model,
)
from trainkit.model.loading import load_model, quiet_libraries
from trainkit.model.locating import (
    SHIPPED_MODELS,
    SHIPPED_NAMES,
    ModelLocation,
    check_entries,
    locate_model,
    looks_like_path,
)
from trainkit.model.model_card import merged_card
from trainkit.model.result_folder import check_free, new_folder
from trainkit.model.trusted_code import FLAG, needless, read_trust
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Model, Packing
from trainkit.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from trainkit.model.trusted_code import Trust
    from trainkit.recipe.schema import Recipe

CPU = torch.device("cpu")
PROBE_ROWS, PROBE_TOKENS = 2, 64
# Relative to the largest logit. x·W + x·A·B and x·(W + A·B) are the same sums in another order; the layers amplify the
# difference to 1e-6, to 6e-5 for OLoRA's large factors. An adapter or a scale left out shows as more than 1e-2.
MERGE_TOLERANCE = 1e-4
ROUNDING_TOLERANCE = 2e-2


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Differences are between logits, relative to the largest logit.

    ``merge`` compares the merged weights with the adapter on its base, both in fp32; ``rounding`` the merged weights
    before and after they were rounded to ``dtype`` (zero for fp32).
    """

    output: Path
    base_model: str
    changed_tensors: tuple[str, ...]
    tensors: int
    merge: Difference
    rounding: Difference
    dtype: str
    four_bit_base: bool

    def sentences(self) -> tuple[str, ...]:
        """For people."""
        merged = (
            f"adapter merged into {self.base_model} in float32: logits differ by {self.merge.relative:.1e} of the "
            f"largest (tolerance {MERGE_TOLERANCE:.0e})"
        )
        changed = f"{len(self.changed_tensors)} of {self.tensors} tensors changed, exactly those with an adapter"
        lines = [merged, f"{changed}; all are finite"]
        if self.dtype != "float32":
            lines.append(
                f"rounded to {self.dtype}, the dtype of the base: logits differ by {self.rounding.relative:.1e} of the "
                f"largest (tolerance {ROUNDING_TOLERANCE:.0e})"
            )
        if self.four_bit_base:
            lines.append(
                "trained on a 4-bit base, merged into the unquantised one: answers differ from those in training by "
                "the error of the quantisation"
            )
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "output": str(self.output),
            "base_model": self.base_model,
            "tensors": self.tensors,
            "changed_tensors": list(self.changed_tensors),
            "logits_difference": self.merge.largest,
            "logits_difference_relative": self.merge.relative,
            "tolerance_relative": MERGE_TOLERANCE,
            "dtype": self.dtype,
            "rounding_difference_relative": self.rounding.relative,
        }


def merge_adapter(run: Path, output: Path | None = None, trust: Trust | None = None) -> MergeReport:
    """Merge the adapter of the run folder ``run`` into its base model and write a plain model to ``output``.

    ``trust`` is in the code that the base model needs. Raises UsageError when there is nothing to merge, the run is
    not finished, ``output`` exists, recipe.yaml is damaged or the trust has no use, ModelError when base or adapter are
    damaged or when a check fails: nothing is written then.
    """
    folder = RunFolder(run)
    output = run / "merged" if output is None else output
    _check_run(folder)
    check_free(output, replace=False)
    location = _base_of(folder, trust)
    check_model(location, Packing(sequence_length=8))
    if trust is not None and code_of_model(location) is None:
        raise needless(trust)
    base = load_model(location, None, torch.float32, CPU).model
    before = _digests(base.state_dict())
    ids_RT = _probe(base)

    adapted = _attach(base, folder.final)
    allowed = _with_tied(base.state_dict(), trained_tensor_names(adapted))
    expected = logits_of(adapted, ids_RT, torch.float32)
    untrained = _with_tied(base.state_dict(), _tensors_without_update(adapted))
    merged = _merge(adapted, folder.final)
    state = merged.state_dict()
    check_finite(state)
    after = _digests(state)
    changed = {name for name, digest in after.items() if before.get(name) != digest}
    _check_changed(folder.final, changed, allowed, untrained, before.keys() ^ after.keys())
    unrounded = logits_of(merged, ids_RT, torch.float32)
    merge = _within(MERGE_TOLERANCE, expected, unrounded, "merged weights")

    dtype = stored_dtype(location)
    for tensor in state.values():  # not model.to: that would round the rotary frequencies too
        tensor.copy_(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    rounding = _within(ROUNDING_TOLERANCE, unrounded, logits_of(merged, ids_RT, torch.float32), f"rounding to {dtype}")
    report = MergeReport(
        output=output,
        base_model=location.public_name,
        changed_tensors=tuple(sorted(changed)),
        tensors=len(state),
        merge=merge,
        rounding=rounding,
        dtype=str(dtype).removeprefix("torch."),
        four_bit_base=_trained_in_four_bit(folder),
    )
    _write(merged, folder.final, location, dtype, report, ids_RT)
    return report


def _check_run(folder: RunFolder) -> None:
    if not folder.root.is_dir():
        raise UsageError(f"{folder.root}: no such run folder; give the output_dir of a run")
    if not folder.final.is_dir():
        raise UsageError(f"{folder.root}: has no final/: the run is not finished; run trainkit fine-tune to its end")
    check_entries(folder.final)
    _check_finished(folder)
    if not (folder.final / ADAPTER_CONFIG).is_file():
        if (folder.final / ADAPTER_FILE).exists() or ADAPTER_CONFIG in recorded_names(folder.final):
            raise ModelError(f"{folder.final / ADAPTER_CONFIG}: missing; restore it")
        raise UsageError(f"{folder.final}: is a full model, there is no adapter to merge: use it as it is")
    for path, recorded in recorded_digests(folder.final).items():
        if sha256(path) != recorded and path.name in {ADAPTER_FILE, ADAPTER_CONFIG}:
            raise ModelError(f"{path}: changed after it was written (SHA-256); restore it")


def _check_finished(folder: RunFolder) -> None:
    """Raise UsageError where the run has gone on since its result was written, and that is not of its last step."""
    if not folder.marker.is_file():
        return  # somebody took the result alone
    record = read_json(folder.marker, missing="missing")
    if record.get("finished") is not True:
        trusted = record.get("trusted_code")
        flag = (FLAG, str(trusted)) if trusted else ()
        command = shlex.join(["trainkit", "fine-tune", str(folder.recipe), *flag])
        raise UsageError(f"{folder.root}: the run is not finished, and final/ may be older; to finish it: {command}")


def _base_of(folder: RunFolder, trust: Trust | None) -> ModelLocation:
    from pathlib import Path

    config = read_adapter_config(folder.final)
    name, revision = config["base_model_name_or_path"], config.get("revision")
    path = Path(name)
    if (
        path.is_absolute()
        and not path.is_dir()
        and path.name in SHIPPED_NAMES
        and path.parent.name == SHIPPED_MODELS.name
    ):
        return locate_model(Model(name=path.name), trust)  # the package moved since; the model in it is the same
    recipe = _recipe_of(folder)
    if not path.is_dir() and not looks_like_path(name) and (recipe is None or name != recipe.model.name):
        raise ModelError(
            f"{folder.final / ADAPTER_CONFIG}: its base model {name} is no folder here, and the run's recipe.yaml does "
            "not name it; restore them"
        )
    return locate_model(Model(name=name, revision=revision), trust)


def _code_of_tokenizer(final: Path) -> Trust | None:
    """Whose code lies beside the tokenizer of a result, as the run's record says; None where none does."""
    record = RunFolder(final.parent).marker
    if not any(final.glob("*.py")) or not record.is_file():
        return None
    return read_trust(read_json(record, missing="missing").get("trusted_code") or None)


def _attach(base: PreTrainedModel, final: Path) -> PeftModel:
    with quiet_libraries():
        from peft import PeftModel

        try:
            return PeftModel.from_pretrained(base, str(final)).eval()
        except Exception as error:  # safetensors, peft and torch each raise their own
            raise ModelError(f"{final}: the adapter cannot be loaded: {in_one_line(error)}") from error


def _merge(adapted: PeftModel, final: Path) -> PreTrainedModel:
    with quiet_libraries():
        try:
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"{final}: cannot be merged: {in_one_line(error)}") from error
    return merged


def _check_changed(final: Path, changed: set[str], allowed: set[str], untrained: set[str], odd_names: set[str]) -> None:
    """Exactly the tensors with an adapter may have changed, and all whose adapter holds an update must have."""
    if odd_names:
        raise ModelError(f"{final}: merging renamed tensors ({min(odd_names)}); nothing was written, report this")
    if stray := changed - allowed:
        raise ModelError(
            f"{final}: merging changed {min(stray)}, which has no adapter; nothing was written, report this"
        )
    if still := allowed - untrained - changed:
        raise ModelError(f"{final}: merging left {min(still)} as it was, despite its adapter; nothing was written")


def _tensors_without_update(adapted: PeftModel) -> frozenset[str]:
    """Base tensors whose adapter adds nothing (its second factor is zero), or whose trained copy equals them."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    names = set()
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            factors = [*module.lora_B.values(), *module.lora_embedding_B.values()]
            weights = [getattr(factor, "weight", factor) for factor in factors]
            if not any(bool(weight.count_nonzero()) for weight in weights):
                names.add(f"{name}.weight")
        elif isinstance(module, ModulesToSaveWrapper):
            trained = dict(module.modules_to_save["default"].named_parameters())
            for key, original in module.original_module.named_parameters():
                if torch.equal(trained[key], original):
                    names.add(f"{name}.{key}")
    return frozenset(names)


def _with_tied(state: Mapping[str, torch.Tensor], names: frozenset[str]) -> set[str]:
    """``names`` and those that share memory with them: a tied output head changes with its embedding."""
    # peft wraps modules, so a name in the wrapped state carries its wrapper's parts
    plain = {name.replace(".base_layer.", ".").replace(".original_module.", "."): t for name, t in state.items()}
    pointers = {plain[name].data_ptr() for name in names if name in plain}
    return set(names) | {
        name for name, tensor in plain.items() if tensor.data_ptr() in pointers and "lora_" not in name
    }


def _digests(state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """A digest of each tensor's bytes: a copy of a large model would not fit beside it."""
    return {
        name: hashlib.blake2b(tensor.detach().contiguous().view(torch.uint8).numpy().data, digest_size=16).digest()
        for name, tensor in state.items()
        if tensor.ndim
    }


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Random token ids (R, T), always the same."""
    config = model.config.get_text_config()
    tokens = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    return torch.randint(config.vocab_size, (PROBE_ROWS, tokens), generator=torch.Generator().manual_seed(0))


def _within(tolerance: float, expected: torch.Tensor, actual: torch.Tensor, what: str) -> Difference:
    difference = difference_of(expected, actual)
    if not difference.relative <= tolerance:
        raise ModelError(
            f"export --merge: {what}: logits differ by {difference.relative:.1e} of the largest, tolerance "
            f"{tolerance:.0e}; nothing was written, keep using the adapter"
        )
    return difference


def _trained_in_four_bit(folder: RunFolder) -> bool:
    recipe = _recipe_of(folder)
    return recipe is not None and recipe.adapter is not None and recipe.adapter.type == "qlora"


def _recipe_of(folder: RunFolder) -> Recipe | None:
    return read_recipe(str(folder.recipe)).recipe if folder.recipe.is_file() else None


def _write(
    merged: PreTrainedModel,
    final: Path,
    location: ModelLocation,
    dtype: torch.dtype,
    report: MergeReport,
    ids_RT: torch.Tensor,
) -> None:
    """Write the model with the tokenizer and the card of the adapter, load it anew, and only then give it its name."""
    expected = logits_of(merged, ids_RT, torch.float32)
    own = {ADAPTER_CONFIG, ADAPTER_FILE, DIGESTS, "README.md"}
    copied = [path for path in sorted(final.iterdir()) if path.is_file() and path.name not in own]
    size_bytes = weights_bytes(merged, dtype) + sum(path.stat().st_size for path in copied)
    with new_folder(report.output, replace=False, size_bytes=size_bytes) as staging:
        with quiet_libraries():
            write_model(merged, staging, dtype, location)
        # The model's own configuration and code stay: they are loaded below, and what lies beside an adapter may be
        # somebody else's.
        written = {path.name for path in staging.iterdir()}
        for path in copied:
            if path.name not in written:
                shutil.copyfile(path, staging / path.name)
        readme = final / "README.md"
        card = readme.read_text(encoding="utf-8") if readme.is_file() else f"# Merged from {final}\n"
        chat = (final / "chat_template.jinja").is_file()
        code = code_of_model(location)
        (staging / "README.md").write_text(
            merged_card(
                card,
                report.base_model,
                report.sentences(),
                chat=chat,
                model_code=code,
                tokenizer_code=_code_of_tokenizer(final),
            ),
            encoding="utf-8",
        )
        anew = load_plainly(staging, torch.float32, CPU, code=code)
        _within(FP32_TOLERANCE, expected, logits_of(anew, ids_RT, torch.float32), "the written model")
