"""The full training state on disk, so that a run continues bitwise where it stood.

A checkpoint is a folder ``step-000200/``: tensors in safetensors, everything else in JSON, no pickle. It is built
under a temporary name; every file is on disk before ``manifest.json``, with the size and the SHA-256 of each other
file, is written; one rename publishes it. What has no manifest of this run that verifies is never loaded.

    owner.json              run id; written first, so that an unfinished folder is known as ours
    weights.safetensors     the weights that train, by parameter name
    optimizer.safetensors   optimizer tensors, named <parameter index>.<name>; a name in a mapping <mapping>.<name>
    random.safetensors      generator states, named <rank>.<name>
    state.json              step, counters, loss scale, optimizer numbers, lengths of the log files
    manifest.json           format, run id, step, sizes, checksums, and a checksum of all that

Where weights are shared out over N processes, each writes its rows (of the first dimension) into files of its own,
``weights-00001-of-00002.safetensors``; which rows they are stands in their metadata. It then leaves a list of them,
``part-00002.json``; the first process waits for those lists, writes the one manifest and publishes. Whoever reads takes
the rows that it needs from whichever files hold them, so that the number of processes may be another.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from trainkit.errors import CheckpointError
from trainkit.run_folder import Written, fsync_folder, write_new_file
from trainkit.training.random_state import RandomState, side_by_side, taken_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

FORMAT = 2
STEP_FOLDER = re.compile(r"step-(\d{6,})")
STAGING_FOLDER = re.compile(r"\.step-(\d{6,})\.[0-9a-f]{8}\.partial")
OWNER, MANIFEST, STATE, RANDOM = "owner.json", "manifest.json", "state.json", "random.safetensors"
RETIRED = "retired.json"  # what the manifest is called while a checkpoint is being deleted
TENSORS = re.compile(r"(weights|optimizer)(?:-(\d{5})-of-(\d{5}))?\.safetensors")
PART = re.compile(r"part-\d{5}\.json")
FILES = (STATE, RANDOM, "optimizer.safetensors", "weights.safetensors", OWNER)
"""What a manifest lists where one process saves."""
PART_SECONDS, POLL_SECONDS = 600, 0.05  # how long a process is waited for, and how often it is looked for
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
class Share:
    """What a process holds of a state whose tensors are shared out over ``processes``.

    ``weight_rows`` and ``optimizer_rows``: name of a tensor that is cut → its first row here, the rows of the whole.
    What is not cut is written by the first process.
    """

    rank: int = 0
    processes: int = 1
    weight_rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    optimizer_rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on, apart from what the recipe and the data already fix.

    ``weights``: parameter name → tensor. ``optimizer``: its ``state_dict()``. ``scaler``: fp16 loss scaling, or None.
    ``random``: of every process, by rank. ``counters``: plain numbers of the run. ``log_bytes``: length of each log
    file at this step. ``share``: which part of the tensors these are.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    random: tuple[RandomState, ...]
    counters: Mapping[str, Any]
    log_bytes: Mapping[str, int]
    share: Share = Share()

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


@dataclass(frozen=True)
class SavedState:
    """A :class:`TrainingState` as it lies in a checkpoint; tensors are read when they are asked for."""

    step: int
    weights: TensorFiles
    optimizer: TensorFiles
    optimizer_numbers: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    random: tuple[RandomState, ...]
    counters: Mapping[str, Any]
    log_bytes: Mapping[str, int]

    def optimizer_state(self, read: Callable[[str], torch.Tensor] | None = None) -> dict[str, Any]:
        """The optimizer's ``state_dict()``, each tensor as ``read`` gives it for its name; whole where that is None."""
        read = read or self.optimizer.__getitem__
        numbers = self.optimizer_numbers
        state: dict[int, dict[str, Any]] = {}
        plain = {f"{index}.{name}": value for index, entry in numbers["state"].items() for name, value in entry.items()}
        for key, value in (plain | {key: read(key) for key in self.optimizer}).items():
            index, *outer, name = key.split(".")
            entry = state.setdefault(int(index), {})
            for part in outer:
                entry = entry.setdefault(part, {})
            entry[name] = value
        return {"state": state, "param_groups": numbers["param_groups"]}


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of one kind in a checkpoint, by name, whole or by rows, from however many files.

    Raises SafetensorError and OSError as those are read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # name → first row and open file of each piece
        self._rows: dict[str, int] = {}  # of a tensor that is cut
        for path in sorted(paths):
            file: Any = safe_open(path, framework="pt")
            cut = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                first, rows = cut.get(name, (0, None))
                self._pieces.setdefault(name, []).append((first, file))
                if rows is not None:
                    self._rows[name] = rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def rows(self, name: str) -> int | None:
        """The first dimension of a whole tensor; None where it has none."""
        if name in self._rows:
            return self._rows[name]
        shape = self._pieces[name][0][1].get_slice(name).get_shape()
        return int(shape[0]) if shape else None

    def read(self, name: str, first: int = 0, behind: int | None = None) -> torch.Tensor:
        """Rows ``first`` to ``behind`` (all of them: None) of a tensor, as a copy of its own.

        Raises ValueError when the files do not hold all of them.
        """
        pieces = sorted(self._pieces[name], key=lambda piece: piece[0])
        if name not in self._rows and behind is None:
            whole: torch.Tensor = pieces[0][1].get_tensor(name)
            return whole.clone()
        found, next_row = [], first
        for start, file in pieces:
            stored = file.get_slice(name)
            end = start + stored.get_shape()[0]
            last = end if behind is None else min(end, behind)
            if start <= next_row < last:
                found.append(stored[next_row - start : last - start])
                next_row = last
        expected = self._rows[name] if behind is None else behind
        if next_row < expected:
            raise ValueError(f"rows {next_row} to {expected} of {name} are in no file")
        none: torch.Tensor = pieces[0][1].get_slice(name)[0:0]
        return torch.cat(found) if found else none


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint.

    >>> step_name(200)
    'step-000200'
    """
    return f"step-{step:06d}"


def staging_name(root: Path, run_id: str, step: int) -> str | None:
    """What the folder is called in which the checkpoint of ``step`` is made; None where this run has a whole one."""
    if problems_of(root / step_name(step), run_id) is None:
        return None
    return f".{step_name(step)}.{secrets.token_hex(4)}.partial"


def write_checkpoint(
    root: Path,
    run_id: str,
    state: TrainingState,
    should_stop: Callable[[], bool] = lambda: False,
    staging: str | None = None,
) -> Path:
    """Write and publish the checkpoint of ``state.step`` under ``root``, an existing folder; returns its own.

    ``staging`` is its name until then, the same in all processes. Where this run has a whole checkpoint of the step
    already, that one stays; what else has its name is put aside. With several processes that hold shares, each calls
    this; the first one returns when all is committed, the others when their share is written.
    Raises OSError as the file system does, and SavingAbandoned; earlier checkpoints are untouched and nothing
    half-written stays then.
    """
    final = root / step_name(state.step)
    staging = staging or staging_name(root, run_id, state.step)
    if staging is None:
        return final
    folder, share = root / staging, state.share
    if share.rank:
        _wait_for(folder, should_stop)
        files = _write_files(folder, _tensor_files(state, should_stop))
        fsync_folder(folder)  # not later: once the list is there, the first process gives the folder its final name
        _write_files(folder, {f"part-{share.rank + 1:05d}.json": [_json_bytes(files)]})
        return final
    if problems_of(final, run_id) is None:  # published by a try that failed after its rename
        fsync_folder(root)
        return final
    folder.mkdir()
    try:
        _write_files(folder, {OWNER: [_owner_bytes(run_id, state.step)]})
        files = _write_files(folder, _tensor_files(state, should_stop) | _common_files(state))
        for other in range(1, share.processes):
            part = folder / f"part-{other + 1:05d}.json"
            _wait_for(part, should_stop)
            files |= json.loads(part.read_bytes())
            part.unlink()
        files[OWNER] = _listed(Written((folder / OWNER).stat().st_size, _sha256(folder / OWNER)))
        fsync_folder(folder)
        manifest = {"format": FORMAT, "run_id": run_id, "step": state.step, "files": files}
        _write_files(folder, {MANIFEST: [_json_bytes(manifest | {"sha256": _sha256_of(manifest)})]})
        fsync_folder(folder)
        set_aside(final)
        folder.rename(final)
    except BaseException:
        delete_files(folder)
        raise
    fsync_folder(root)
    return final


def _wait_for(path: Path, should_stop: Callable[[], bool]) -> None:
    """Return when another process has made ``path``, and made it whole. Raises OSError when it takes too long."""
    deadline = time.monotonic() + PART_SECONDS
    while not _is_whole(path):
        if should_stop():
            raise SavingAbandoned
        if time.monotonic() > deadline:
            late = f"another process did not save its share in {PART_SECONDS} s; do all machines see this folder?"
            raise OSError(errno.ETIMEDOUT, late)
        time.sleep(POLL_SECONDS)


def _is_whole(path: Path) -> bool:
    if path.is_dir():
        return True
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


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
    names = [path.name for path in folder.iterdir() if TENSORS.fullmatch(path.name) or PART.fullmatch(path.name)]
    for name in (STATE, RANDOM, *names, OWNER, RETIRED):
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


def is_barely_begun(folder: Path, run_id: str) -> bool:
    """Whether this staging folder holds no more than a part of the file that would say that it is ours."""
    name = STAGING_FOLDER.fullmatch(folder.name)
    if name is None or any(path.name != OWNER or path.is_symlink() or not path.is_file() for path in folder.iterdir()):
        return False
    owner = folder / OWNER
    return not owner.exists() or _owner_bytes(run_id, int(name[1])).startswith(owner.read_bytes())


def _write_files(folder: Path, contents: Mapping[str, Iterable[bytes | memoryview]]) -> dict[str, Any]:
    """Write new files; returns what a manifest says of them."""
    return {name: _listed(write_new_file(folder / name, pieces)) for name, pieces in contents.items()}


def _tensor_files(state: TrainingState, should_stop: Callable[[], bool]) -> dict[str, Iterable[bytes | memoryview]]:
    """The files of this process's tensors; what is not cut is the first one's."""
    optimizer, _ = _flatten_optimizer(state.optimizer)
    share = state.share
    suffix = f"-{share.rank + 1:05d}-of-{share.processes:05d}" if share.processes > 1 else ""
    kinds = {"weights": (state.weights, share.weight_rows), "optimizer": (optimizer, share.optimizer_rows)}
    return {
        f"{kind}{suffix}.safetensors": _safetensors(
            {name: tensor for name, tensor in tensors.items() if name in rows or share.rank == 0}, rows, should_stop
        )
        for kind, (tensors, rows) in kinds.items()
    }


def _common_files(state: TrainingState) -> dict[str, Iterable[bytes | memoryview]]:
    _, optimizer_numbers = _flatten_optimizer(state.optimizer)
    random_tensors, random_numbers = side_by_side(state.random)
    numbers = {
        "step": state.step,
        "counters": state.counters,
        "log_bytes": state.log_bytes,
        "optimizer": optimizer_numbers,
        "scaler": state.scaler,
        "random": random_numbers,
    }
    return {RANDOM: _safetensors(random_tensors, {}, lambda: False), STATE: [_json_bytes(numbers)]}


def _owner_bytes(run_id: str, step: int) -> bytes:
    return _json_bytes({"run_id": run_id, "step": step})


def _listed(written: Written) -> dict[str, Any]:
    return {"bytes": written.size_bytes, "sha256": written.sha256}


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    """Of everything in a manifest but this sum itself."""
    return hashlib.sha256(json.dumps({**manifest, "sha256": None}, sort_keys=True).encode()).hexdigest()


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _safetensors(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, tuple[int, int]], should_stop: Callable[[], bool]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece; tensors may lie on any device. ``rows`` as in :class:`Share`.

    Format: 8 bytes with the header's length, the header as JSON padded to 8, the tensors, wide types first so that each
    lies at a multiple of its width (github.com/huggingface/safetensors, "Format").
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"rows": json.dumps(dict(rows))}} if rows else {}
    end = 0
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
        for name, value in leaves(entry):
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"state": numbers, "param_groups": state_dict["param_groups"]}


def leaves(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What an optimizer keeps for a parameter, by dotted name: bitsandbytes keeps tensors in a mapping of their own."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
        if manifest["sha256"] != _sha256_of(manifest):
            return f"{MANIFEST} does not match its checksum"
        if manifest["run_id"] != run_id:
            return "of another run"
        if step_name(manifest["step"]) != folder.name:
            return f"{MANIFEST}: of step {manifest['step']}"
        if missing := _not_listed(files):
            return f"{MANIFEST} does not list {', '.join(missing)}"
        if odd := sorted(name for name in files if name not in {OWNER, STATE, RANDOM} and not TENSORS.fullmatch(name)):
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


def _not_listed(files: Iterable[str]) -> list[str]:
    """What a checkpoint needs besides ``files``: of each kind of tensors one file, or all of N."""
    files = set(files)
    missing = {OWNER, STATE, RANDOM} - files
    for kind in ("weights", "optimizer"):
        of = {int(match[3] or 1) for name in files if (match := TENSORS.fullmatch(name)) and match[1] == kind}
        count = max(of, default=1)
        numbered = {f"{kind}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
        missing |= (numbered if count > 1 else {f"{kind}.safetensors"}) - files
    return sorted(missing)


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


def load_checkpoint(folder: Path) -> SavedState:
    """Open a checkpoint that :func:`problems_of` found whole. Raises CheckpointError when a file changed since."""
    try:
        numbers = json.loads((folder / STATE).read_bytes())
        kinds: dict[str, list[Path]] = {"weights": [], "optimizer": []}
        for name in json.loads((folder / MANIFEST).read_bytes())["files"]:
            if match := TENSORS.fullmatch(name):
                kinds[match[1]].append(folder / name)
        return SavedState(
            step=numbers["step"],
            weights=TensorFiles(kinds["weights"]),
            optimizer=TensorFiles(kinds["optimizer"]),
            optimizer_numbers=numbers["optimizer"],
            scaler=numbers["scaler"],
            random=taken_apart(load_file(folder / RANDOM), numbers["random"]),
            counters=numbers["counters"],
            log_bytes=numbers["log_bytes"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error}; move it away to continue from an earlier one"
        ) from error


def owner_of(folder: Path) -> str | None:
    """The run id that marks a folder, finished or not, as a checkpoint of ours; None where there is none."""
    if folder.is_symlink():
        return None
    try:
        owner = json.loads((folder / OWNER).read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(owner)
