"""The full training state on disk, so that a run continues bitwise where it stood.

A checkpoint is a folder ``step-000200/``: tensors in safetensors, everything else in JSON, no pickle. It is built
under a temporary name; ``manifest.json``, with the size and the SHA-256 of every other file, is written last;
everything is fsynced; one rename publishes it. What has no manifest of this run that verifies is never loaded.

    owner.json              run id; written first, so that an unfinished folder is known as ours
    weights.safetensors     the weights that train, by parameter name
    optimizer.safetensors   optimizer tensors, named <parameter index>.<name>
    random.safetensors      generator states
    state.json              step, counters, loss scale, optimizer numbers, lengths of the log files
    manifest.json           format, run id, step, sizes, checksums
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainkit.errors import CheckpointError, MachineError
from trainkit.run_folder import fsync_folder, permissions_for_new_file, write_json
from trainkit.training.random_state import RandomState

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{6,})")
STAGING_FOLDER = re.compile(r"\.step-\d{6,}\.[0-9a-f]{8}\.partial")


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


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint.

    >>> step_name(200)
    'step-000200'
    """
    return f"step-{step:06d}"


def save_checkpoint(root: Path, run_id: str, state: TrainingState) -> Path:
    """Write and publish the checkpoint of ``state.step`` under ``root``; returns its folder.

    Raises MachineError when the disk is full or cannot be written; earlier checkpoints are untouched and nothing
    half-written stays then.
    """
    final = root / step_name(state.step)
    staging = root / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        staging.mkdir(parents=True)
        _write_files(staging, run_id, state)
        if final.exists():
            if not problems_of(final, run_id):
                shutil.rmtree(staging)
                return final
            final.rename(final.with_name(f"{final.name}.damaged-{secrets.token_hex(4)}"))
        staging.rename(final)
        fsync_folder(root)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said when it writes
        shutil.rmtree(staging, ignore_errors=True)
        needed = sum(_tensor_bytes(state).values())
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else getattr(error, "strerror", None) or str(error).splitlines()[0][:160]
        raise MachineError(
            f"{final}: the checkpoint ({needed / 2**20:.1f} MiB) could not be saved: {what}; earlier checkpoints are "
            "intact: make room, then give the same command again"
        ) from error
    return final


def _tensor_bytes(state: TrainingState) -> dict[str, int]:
    weights = sum(tensor.nbytes for tensor in state.weights.values())
    optimizer = sum(
        value.nbytes
        for entry in state.optimizer["state"].values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    return {"weights": weights, "optimizer": optimizer}


def _write_files(folder: Path, run_id: str, state: TrainingState) -> None:
    write_json(folder / "owner.json", {"run_id": run_id, "step": state.step})
    tensors, numbers = _flatten_optimizer(state.optimizer)
    _save_tensors(folder / "weights.safetensors", state.weights)
    _save_tensors(folder / "optimizer.safetensors", tensors)
    _save_tensors(folder / "random.safetensors", state.random.tensors)
    write_json(
        folder / "state.json",
        {
            "step": state.step,
            "counters": state.counters,
            "log_bytes": state.log_bytes,
            "optimizer": numbers,
            "scaler": state.scaler,
            "random": state.random.numbers,
        },
    )
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"format": FORMAT, "run_id": run_id, "step": state.step, "files": files})


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(permissions_for_new_file())  # safetensors makes files that only their owner may read
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def problems_of(folder: Path, run_id: str) -> str | None:
    """Why ``folder`` must not be loaded, in a few words that name the file; None when it is whole and of this run."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"manifest.json: format {manifest['format']}, this trainkit reads {FORMAT}"
        if manifest["run_id"] != run_id:
            return "of another run"
        if step_name(manifest["step"]) != folder.name:
            return f"manifest.json: of step {manifest['step']}"
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    missing = {"weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"} - set(files)
    return f"manifest.json does not list {', '.join(sorted(missing))}" if missing else None


def newest_checkpoint(root: Path, run_id: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of this run that verifies, and one sentence for each newer one that was skipped."""
    skipped: list[str] = []
    for folder in sorted(_step_folders(root), key=_step_of, reverse=True):
        problem = problems_of(folder, run_id)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder.name} skipped: {problem}")
    return None, skipped


def _step_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and STEP_FOLDER.fullmatch(path.name)]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def load_checkpoint(folder: Path) -> TrainingState:
    """Read a checkpoint that :func:`problems_of` found whole. Raises CheckpointError when a file changed since."""
    try:
        numbers = json.loads((folder / "state.json").read_bytes())
        return TrainingState(
            step=numbers["step"],
            weights=load_file(folder / "weights.safetensors"),
            optimizer=_unflatten_optimizer(load_file(folder / "optimizer.safetensors"), numbers["optimizer"]),
            scaler=numbers["scaler"],
            random=RandomState(load_file(folder / "random.safetensors"), numbers["random"]),
            counters=numbers["counters"],
            log_bytes=numbers["log_bytes"],
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error}; delete it to continue from an earlier one"
        ) from error


def retire_checkpoints(root: Path, run_id: str, *, keep_last: int, best_step: int | None) -> list[Path]:
    """Delete what need not stay: our own checkpoints older than the newest ``keep_last``, except the best one.

    Only folders whose ``owner.json`` carries ``run_id`` are touched, unfinished ones among them. Returns what went.
    """
    ours = [folder for folder in _step_folders(root) if _owner(folder) == run_id]
    ours.sort(key=_step_of)
    retired = [folder for folder in ours[:-keep_last] if _step_of(folder) != best_step]
    if root.is_dir():
        retired += [path for path in root.iterdir() if STAGING_FOLDER.fullmatch(path.name) and _owner(path) == run_id]
    for folder in retired:
        shutil.rmtree(folder)
    return retired


def _owner(folder: Path) -> str | None:
    try:
        owner = json.loads((folder / "owner.json").read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(owner)
