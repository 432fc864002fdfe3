"""What can be known to be wrong with a model folder before a weight is read.

Layout of a safetensors file: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, data
(https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from trainkit.errors import ModelError
from trainkit.model.trusted_code import COMMIT, FLAG, REFERENCE, code_options, how_to_trust, known_causal, needs_code
from trainkit.run_folder import leads_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from trainkit.model.locating import ModelLocation
    from trainkit.model.trusted_code import Trust
    from trainkit.recipe.schema import Packing

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
DIGESTS = "SHA256SUMS"  # in the format of sha256sum(1)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, as its header says."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def check_model(location: ModelLocation, packing: Packing) -> PretrainedConfig:
    """The configuration of a model whose files are whole; no weight is loaded.

    Looked at: configuration, every weight file's header and size, recorded SHA-256 digests (``SHA256SUMS`` in the
    folder, or the names the hub's cache gives its files), and ``packing.sequence_length`` against the positions that
    the model has. Raises ModelError.
    """
    config = _check_config(location)
    _check_files(location)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and packing.sequence_length > positions:
        raise ModelError(
            f"packing.sequence_length: {packing.sequence_length:,} is beyond the {positions:,} positions of "
            f"{location.name} (max_position_embeddings); set it to {positions} or less"
        )
    return config


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise ModelError when the tokenizer can give an id that the embedding has no row for."""
    rows = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ModelError(
            f"tokenizer: token {token!r} has id {largest:,}, but the model's embedding has {rows:,} rows; "
            "take the tokenizer that belongs to this model"
        )


def stored_dtype(location: ModelLocation) -> torch.dtype:
    """The dtype that most bytes of the weight files have."""
    import torch

    dtype: torch.dtype = getattr(torch, FLOATING[_main_dtype(stored_tensors(location))])
    return dtype


def stored_tensors(location: ModelLocation) -> dict[str, StoredTensor]:
    """What the weight files hold, from their headers. Raises ModelError when a file is missing or not whole."""
    return _check_files(location, digests=False)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, shards in name order. ModelError where there are none."""
    index = folder / INDEX_FILE
    if index.is_file():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    unsafe = sorted(file.name for pattern in UNSAFE_WEIGHTS for file in folder.glob(pattern))
    if unsafe:
        raise ModelError(
            f"{folder}: holds {unsafe[0]} but no {SINGLE_FILE}; only safetensors weights are read (other formats can "
            "run code or lose precision): save it as safetensors with transformers' save_pretrained"
        )
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        raise ModelError(
            f"{folder}: holds {some_of(shards)} but neither {SINGLE_FILE} nor {INDEX_FILE}; copy the index too"
        )
    raise ModelError(f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose size is checked against its header. Raises ModelError naming it."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(LFS_POINTER):
            raise ModelError(
                f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )
        if len(start) < 8:
            raise ModelError(f"{path}: cut off: {actual} bytes; copy or download it again")
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(actual - 8, 1 << 30):
            raise ModelError(f"{path}: cut off or no safetensors file: its header needs {length:,} of {actual:,} bytes")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored_tensor(facts) for name, facts in header.items()}
            data_bytes = max((facts["data_offsets"][1] for facts in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: its safetensors header is damaged; copy or download it again") from error
    expected = 8 + length + data_bytes
    if expected != actual:
        raise ModelError(
            f"{path}: expected {expected:,} bytes, there are {actual:,}; the file is "
            f"{'cut off' if actual < expected else 'damaged'}: copy or download it again"
        )
    return tensors


def recorded_digests(folder: Path) -> dict[Path, str]:
    """The SHA-256 that is known of files in ``folder``: from SHA256SUMS, and from the hub's content-named cache."""
    digests: dict[Path, str] = {}
    for path in folder.glob("*.safetensors"):
        blob = path.resolve().name
        if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
            digests[path] = blob
    for name, digest in recorded_names(folder).items():
        if (folder / name).is_file():
            digests[folder / name] = digest
    return digests


def recorded_names(folder: Path) -> dict[str, str]:
    """The files that SHA256SUMS lists, be they there or not, with their SHA-256; none where it is not there."""
    if not (folder / DIGESTS).is_file():
        return {}
    lines = (folder / DIGESTS).read_text(encoding="utf-8").splitlines()
    matches = (re.fullmatch(r"([0-9a-f]{64}) [ *]([^/]+)", line) for line in lines)
    return {match[2]: match[1] for match in matches if match}


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_code(folder: Path, trust: Trust) -> None:
    """Raise ModelError unless the code that the snapshot ``folder`` names is its own, is there and is unchanged.

    ``auto_map`` can name a module of another repository, and a file anywhere on this machine. The hub's cache calls the
    content of a file by the id that git gives it.
    """
    for file in sorted(folder.rglob("*.py")):
        if leads_out(file, folder):
            raise ModelError(f"{file}: is a link out of the hub's cache, and is not followed; remove this snapshot")
        blob = file.resolve().name
        if COMMIT.fullmatch(blob) and _git_id(file) != blob:
            raise ModelError(f"{file}: changed after it was fetched; remove {file.resolve()} to fetch it again")
    for path in (folder / CONFIG_FILE, folder / TOKENIZER_CONFIG_FILE):
        if not path.is_file():
            continue
        for reference in _references(path):
            parts = REFERENCE.fullmatch(reference)
            if parts is None:
                raise ModelError(f"{path}: auto_map: {reference[:60]!r} is no module.Class of the repository")
            if parts["repository"] not in {None, trust.repository}:
                raise ModelError(
                    f"{path}: auto_map names code of another repository ({parts['repository'][:60]}), which is never "
                    f"run: {FLAG} trusts {trust.repository} alone"
                )
            if not (folder / f"{parts['module']}.py").is_file():
                raise ModelError(
                    f"{path}: auto_map names {parts['module']}.py, which is not there; run the same command once with "
                    "the hub in reach (without HF_HUB_OFFLINE)"
                )


def _git_id(path: Path) -> str:
    """The id that git gives to the content of a file (git-hash-object(1))."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``, which names an architecture. Raises ModelError; loads no other library."""
    path = folder / CONFIG_FILE
    values = read_json(path, missing=f"no {CONFIG_FILE}; is this a model folder?")
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{path}: no `model_type`, so nothing says which architecture this is")
    named = values.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ModelError(f'{path}: `architectures` must be a list of class names, as ["LlamaForCausalLM"]')
    if not isinstance(values.get("auto_map") or {}, dict):
        raise ModelError(f"{path}: `auto_map` must be an object that names classes of the model's own code")
    _check_implementations(path, values)
    return values


def _check_implementations(path: Path, values: Mapping[str, Any]) -> None:
    """Raise ModelError for ``attn_implementation: owner/name`` and its like: transformers would fetch and run it."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_implementations(path, value)
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{path}: `{name}` names code of a repository ({value[:60]}), which is never run; take the key out"
            )


def code_of_model(location: ModelLocation) -> Trust | None:
    """The trusted code, where the model itself needs it; the tokenizer may where this is None."""
    return location.code if location.code is not None and needs_code(read_config(location.folder)) else None


def check_architecture(path: Path, values: Mapping[str, Any], location: ModelLocation | None = None) -> None:
    """Raise ModelError unless the content of a config.json describes a model that transformers can make and we train.

    It must be a causal language model and not quantised already; of transformers' own code, or of code that came with
    ``location`` and is trusted. Without a location code is never run.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = values["model_type"]
    if needs_code(values):
        if location is None or location.code is None:
            way_out = "which an estimate never runs" if location is None else how_to_trust(location)
            what = f"model_type `{model_type}`" if model_type not in CONFIG_MAPPING_NAMES else "its architecture"
            raise ModelError(f"{path}: {what} needs Python code of the model's own, {way_out}")
        if "AutoModelForCausalLM" not in values["auto_map"] or values.get("is_encoder_decoder"):
            raise ModelError(f"{path}: the code in auto_map is of no causal language model (AutoModelForCausalLM)")
    elif model_type not in CONFIG_MAPPING_NAMES:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING_NAMES), n=1, cutoff=0.75)
        hint = f"did you mean `{close[0]}`?" if close else "a newer transformers may know it; model code is never run"
        raise ModelError(f"{path}: transformers {__version__} does not know model_type `{model_type}`; {hint}")
    else:
        _check_causal(path, values)
    if values.get("quantization_config"):
        raise ModelError(
            f"{path}: the weights are quantised already; give the unquantised model (adapter.type: qlora quantises it)"
        )


def _check_config(location: ModelLocation) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = location.folder / CONFIG_FILE
    values = read_config(location.folder)
    check_architecture(path, values, location)
    code = code_of_model(location)
    for key in SIZES:
        if isinstance(size := values.get(key), int) and size < 1:
            raise ModelError(f"{path}: `{key}` is {size}, and no model is that small; restore the file")
    if (location.folder / GENERATION_CONFIG_FILE).is_file():
        read_json(location.folder / GENERATION_CONFIG_FILE, missing="missing")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(location.folder), **code_options(code))
    except Exception as error:
        if code is not None:
            raise _unusable(code, path, error) from error
        if not isinstance(error, OSError | ValueError | TypeError | KeyError | AttributeError | StrictDataclassError):
            raise
        raise ModelError(f"{path}: {reason_of(error, values)}; restore the file") from error
    if code is not None:  # what names this repository by its hub id is in the folder too
        named = config.auto_map.items()
        config.auto_map = {
            name: reference.rpartition("--")[2] if isinstance(reference, str) else reference
            for name, reference in named
        }
    return config


def _unusable(code: Trust, path: Path, error: BaseException) -> ModelError:
    """For trusted code that cannot be imported, or makes no model of its configuration."""
    return ModelError(f"{path}: the code of {code} cannot be used: {in_one_line(error, 160)}")


def empty_model(location: ModelLocation, config: PretrainedConfig) -> PreTrainedModel:
    """The model that ``config`` describes, with shapes and without a weight. Raises ModelError where there is none."""
    import torch
    from transformers import AutoModelForCausalLM

    code = code_of_model(location)
    by_trust = code_options(code)
    by_trust.pop("code_revision", None)  # it would reach the model's own constructor; the folder is that commit anyway
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), **by_trust)
    except Exception as error:  # whatever a model's own code says of sizes that do not go together
        if code is not None:
            raise _unusable(code, location.folder / CONFIG_FILE, error) from error
        raise ModelError(
            f"{location.folder / CONFIG_FILE}: it describes no model: {reason_of(error, config.to_dict())}; "
            "restore the file"
        ) from error
    return model


def _check_causal(path: Path, values: Mapping[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = values.get("architectures") or []
    wrong_class = bool(named) and not known_causal(named)
    no_class = values["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if wrong_class or no_class or values.get("is_encoder_decoder"):
        what = named[0] if named else values["model_type"]
        raise ModelError(f"{path}: {what} is not a causal language model (a decoder that predicts the next token)")


def _check_files(location: ModelLocation, *, digests: bool = True) -> dict[str, StoredTensor]:
    folder = location.folder
    files = weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(files)} weight files are missing: {some_of(missing)}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        if (folder / INDEX_FILE).is_file():
            listed = {name for name, shard in _weight_map(folder / INDEX_FILE).items() if shard == file.name}
            if absent := sorted(listed - header.keys()):
                raise ModelError(f"{file}: {INDEX_FILE} says it holds {some_of(absent)}, and it does not")
        tensors.update(header)
    if not tensors:
        raise ModelError(f"{folder}: the weight files hold no tensor")
    if (main := _main_dtype(tensors)) not in FLOATING:
        raise ModelError(f"{folder}: the weights are stored as {main}; give a model in fp32, fp16 or bf16")
    if digests:
        _check_digests(folder, files)
    return tensors


def _check_digests(folder: Path, files: Sequence[Path]) -> None:
    recorded = recorded_digests(folder)
    known = [file for file in files if file in recorded]
    with ThreadPoolExecutor() as pool:
        for file, actual in zip(known, pool.map(sha256, known), strict=True):
            if actual != recorded[file]:
                raise ModelError(
                    f"{file}: SHA-256 is {actual[:12]}…, recorded is {recorded[file][:12]}…: the file changed after it "
                    "was written; copy or download it again"
                )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, missing="missing").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no `weight_map`; copy or download it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: `{shard}` is not the name of a safetensors file in this folder")
    return weight_map


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """The object in a JSON file of a model folder; ``missing`` says what it means that there is none. ModelError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {in_one_line(error)}; restore the file") from error
    if text.encode().startswith(LFS_POINTER):
        raise ModelError(f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    try:
        values = json.loads(text)
    except RecursionError:
        raise ModelError(f"{path}: nested too deeply to be what it should be; restore the file") from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise ModelError(f"{path}:{line}: not valid JSON ({getattr(error, 'msg', error)}); restore the file") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must be a JSON object; restore the file")
    return values


def _references(path: Path) -> Iterator[str]:
    """Every ``module.Class`` that a configuration's ``auto_map`` names; a tokenizer's are pairs, or a bare list."""
    auto_map = read_json(path, missing="missing").get("auto_map") or {}
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in chain.from_iterable(value if isinstance(value, list) else [value] for value in values):
        if value is not None:
            yield str(value)


def _stored_tensor(facts: Mapping[str, Any]) -> StoredTensor:
    start, end = facts["data_offsets"]
    shape = tuple(int(length) for length in facts["shape"])
    dtype = str(facts["dtype"])
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise ValueError(dtype)
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}.get(dtype)
    if bits is not None and math.prod(shape) * bits != (end - start) * 8:
        raise ValueError(dtype)
    return StoredTensor(dtype, shape, end - start)


def _main_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    size_bytes: dict[str, int] = {}
    for tensor in tensors.values():
        size_bytes[tensor.dtype] = size_bytes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(size_bytes, key=lambda dtype: size_bytes[dtype])


def some_of(names: Sequence[str], limit: int = 2) -> str:
    """The names in one line, or the first ``limit`` of them and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def reason_of(error: Exception, values: Mapping[str, Any]) -> str:
    """Why transformers makes nothing of a config.json with these ``values``, in one line.

    >>> reason_of(KeyError("gelu_"), {"hidden_act": "gelu_"})
    "`hidden_act` is 'gelu_', which transformers does not know"
    """
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, KeyError) and error.args:
        for key in _keys_with(values, error.args[0]):
            return f"`{key}` is {str(error)[:60]}, which transformers does not know"
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return in_one_line(cause or error)


def _keys_with(values: Mapping[str, Any], wanted: object) -> Iterator[str]:
    """The keys of a configuration, and of the objects in it, that have this value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys_with(value, wanted)
        elif isinstance(value, str) and value == wanted:
            yield key


def in_one_line(error: BaseException, limit: int = 120) -> str:
    r"""What another library says over one line or many, cut to ``limit`` characters; its type where it says too little.

    >>> in_one_line(ValueError("Validation error:\n    must be even"))
    'Validation error: must be even'
    >>> in_one_line(KeyError("gelu_"))
    "KeyError: 'gelu_'"
    """
    text = " ".join(str(error).split()).rstrip(".")
    if " " not in text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
