"""The full training state on disk, so that a run continues bitwise where it stood.

A checkpoint is a folder ``step-000200/``: tensors in safetensors, everything else in JSON, no pickle. It is built
under a temporary name; every file is on disk before ``manifest.json``, with the size and the SHA-256 of each other
file, is written; one rename publishes it. What has no manifest of this run that verifies is never loaded.

    owner.json              run id; written first, so that an unfinished folder is known as ours
    weights.safetensors     the weights that train, by parameter name
    optimizer.safetensors   optimizer tensors, named <parameter index>.<name>
    random.safetensors      generator states
    state.json              step, counters, loss scale, optimizer numbers, lengths of the log files
    manifest.json           format, run id, step, sizes, checksums
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainkit.errors import CheckpointError
from trainkit.run_folder import Written, fsync_folder, write_new_file
from trainkit.training.random_state import RandomState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{6,})")
STAGING_FOLDER = re.compile(r"\.step-\d{6,}\.[0-9a-f]{8}\.partial")
OWNER, MANIFEST, STATE = "owner.json", "manifest.json", "state.json"
WEIGHTS, OPTIMIZER, RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
RETIRED = "retired.json"  # what the manifest is called while a checkpoint is being deleted
LISTED = (STATE, RANDOM, OPTIMIZER, WEIGHTS, OWNER)
"""The files that a manifest lists, in the order in which they are deleted."""
PIECE_BYTES = 2**24  # between two pieces a writer may be told to stop

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SavingAbandoned(Exception):  # noqa: N818 - it was asked for
    """Whoever saves was told to stop; nothing of the unfinished checkpoint is left."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on, apart from what the recipe and the data already fix.

    ``weights``: parameter name → tensor. ``optimizer``: its ``state_dict()``. ``scaler``: fp16 loss scaling, or None.
    ``counters``: plain numbers of the run. ``log_bytes``: length of each log file at this step.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    random: RandomState
    counters: Mapping[str, Any]
    log_bytes: Mapping[str, int]

    def tensor_bytes(self) -> int:
        """Bytes of the weights and of the optimizer's tensors: all but a few thousand of what a checkpoint takes."""
        tensors, _ = _flatten_optimizer(self.optimizer)
        return sum(tensor.nbytes for tensor in (*self.weights.values(), *tensors.values()))

    def on_host(self) -> TrainingState:
        """A copy in host memory, which the next step does not change."""
        entries = {
            index: {name: _copied(value) for name, value in entry.items()}
            for index, entry in self.optimizer["state"].items()
        }
        weights = {name: _copied(weight) for name, weight in self.weights.items()}
        return replace(self, weights=weights, optimizer={**self.optimizer, "state": entries})


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint.

    >>> step_name(200)
    'step-000200'
    """
    return f"step-{step:06d}"


def write_checkpoint(
    root: Path, run_id: str, state: TrainingState, should_stop: Callable[[], bool] = lambda: False
) -> Path:
    """Write and publish the checkpoint of ``state.step`` under ``root``, an existing folder; returns its own.

    Where this run has a whole checkpoint of the step already, that one stays; what else has its name is put aside.
    Raises OSError as the file system does, and SavingAbandoned; earlier checkpoints are untouched and nothing
    half-written stays then.
    """
    final = root / step_name(state.step)
    if problems_of(final, run_id) is None:
        return final
    staging = root / f".{final.name}.{secrets.token_hex(4)}.partial"
    staging.mkdir()
    try:
        _write_files(staging, run_id, state, should_stop)
        set_aside(final)
        staging.rename(final)
    except BaseException:
        delete_files(staging)
        raise
    fsync_folder(root)
    return final


def set_aside(folder: Path) -> Path | None:
    """Give whatever has the name ``folder`` another one, so that it is not taken for a checkpoint; returns that name.

    A number behind the name says which of several it is. None where there is nothing.
    """
    if not folder.exists() and not folder.is_symlink():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aside-{number}")).exists() or aside.is_symlink():
        number += 1
    folder.rename(aside)
    return aside


def delete_files(folder: Path) -> bool:
    """Delete the files of a checkpoint, and the folder if it is then empty; whether it is gone.

    Files that trainkit does not write there are not touched. Killed in the middle, it leaves no checkpoint that looks
    whole, but one that :func:`is_half_deleted`.
    """
    with suppress(FileNotFoundError):
        (folder / MANIFEST).rename(folder / RETIRED)
    for name in (*LISTED, RETIRED):
        (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def is_half_deleted(folder: Path, run_id: str) -> bool:
    """Whether :func:`delete_files` was killed in this folder, or left it empty."""
    if not any(folder.iterdir()):
        return True
    try:
        return bool(json.loads((folder / RETIRED).read_bytes())["run_id"] == run_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_files(folder: Path, run_id: str, state: TrainingState, should_stop: Callable[[], bool]) -> None:
    optimizer_tensors, optimizer_numbers = _flatten_optimizer(state.optimizer)
    numbers = {
        "step": state.step,
        "counters": state.counters,
        "log_bytes": state.log_bytes,
        "optimizer": optimizer_numbers,
        "scaler": state.scaler,
        "random": state.random.numbers,
    }
    contents: dict[str, Iterable[bytes | memoryview]] = {
        OWNER: [_json_bytes({"run_id": run_id, "step": state.step})],
        WEIGHTS: _safetensors(state.weights, should_stop),
        OPTIMIZER: _safetensors(optimizer_tensors, should_stop),
        RANDOM: _safetensors(state.random.tensors, should_stop),
        STATE: [_json_bytes(numbers)],
    }
    files = {name: _listed(write_new_file(folder / name, pieces)) for name, pieces in contents.items()}
    fsync_folder(folder)
    manifest = {"format": FORMAT, "run_id": run_id, "step": state.step, "files": files}
    write_new_file(folder / MANIFEST, [_json_bytes(manifest)])
    fsync_folder(folder)


def _listed(written: Written) -> dict[str, Any]:
    return {"bytes": written.size_bytes, "sha256": written.sha256}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _safetensors(tensors: Mapping[str, torch.Tensor], should_stop: Callable[[], bool]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece; tensors may lie on any device.

    Format: 8 bytes with the header's length, the header as JSON padded to 8, the tensors, wide types first so that each
    lies at a multiple of its width (github.com/huggingface/safetensors, "Format").
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE_BYTES):
            if should_stop():
                raise SavingAbandoned
            yield data[start : start + PIECE_BYTES]


def _flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's ``state_dict()`` into named tensors and JSON."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entry in state_dict["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"state": numbers, "param_groups": state_dict["param_groups"]}


def _unflatten_optimizer(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in numbers["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": numbers["param_groups"]}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problems_of(folder: Path, run_id: str, *, checksums: bool = True) -> str | None:
    """Why ``folder`` must not be loaded, in a few words that name the file; None when it is whole and of this run.

    Without ``checksums`` no more is read than the manifest and the sizes of the files.
    """
    if folder.is_symlink():
        return "is a link"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {manifest['format']}, this trainkit reads {FORMAT}"
        if manifest["run_id"] != run_id:
            return "of another run"
        if step_name(manifest["step"]) != folder.name:
            return f"{MANIFEST}: of step {manifest['step']}"
        if missing := sorted(set(LISTED) - set(files)):
            return f"{MANIFEST} does not list {', '.join(missing)}"
        if odd := sorted(set(files) - set(LISTED)):
            return f"{MANIFEST} lists {odd[0]!r}, which is no file of a checkpoint"
        for name, expected in files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is {'a link' if path.is_symlink() else 'missing'}"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if checksums and _sha256(path) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.filename or MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_checkpoint(root: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of this run that verifies, and one sentence for each newer one that was skipped."""
    skipped: list[str] = []
    for folder in sorted(step_folders(root), key=step_of, reverse=True):
        problem = problems_of(folder, run_id)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder.name} skipped: {problem}")
    return None, skipped


def step_folders(root: Path) -> list[Path]:
    """Everything under ``root`` that has the name of a checkpoint, in no order."""
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and STEP_FOLDER.fullmatch(path.name)]


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def load_checkpoint(folder: Path) -> TrainingState:
    """Read a checkpoint that :func:`problems_of` found whole. Raises CheckpointError when a file changed since."""
    try:
        numbers = json.loads((folder / STATE).read_bytes())
        return TrainingState(
            step=numbers["step"],
            weights=load_file(folder / WEIGHTS),
            optimizer=_unflatten_optimizer(_owned(load_file(folder / OPTIMIZER)), numbers["optimizer"]),
            scaler=numbers["scaler"],
            random=RandomState(load_file(folder / RANDOM), numbers["random"]),
            counters=numbers["counters"],
            log_bytes=numbers["log_bytes"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error}; move it away to continue from an earlier one"
        ) from error


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies: what is loaded is a view into the file, and an optimizer takes tensors as they are."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def owner_of(folder: Path) -> str | None:
    """The run id that marks a folder, finished or not, as a checkpoint of ours; None where there is none."""
    if folder.is_symlink():
        return None
    try:
        owner = json.loads((folder / OWNER).read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(owner)
