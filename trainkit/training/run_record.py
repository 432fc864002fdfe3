"""Whose run a folder holds, and whether this command may continue it.

``run.json`` is written when a run begins. It carries the run's id, what must stay the same for a resume to mean
anything (data, base model, micro-batch), and whether the run is finished. A lock keeps a second process out; the kernel
lets go of it when the process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trainkit.errors import CheckpointError, MachineError, RecipeErrors, UsageError
from trainkit.recipe.reader import read_recipe, recipe_as_yaml
from trainkit.run_folder import (
    DISK_FULL,
    RunFolder,
    fsync_folder,
    leads_out,
    write_atomically,
    write_json,
    write_new_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainkit.recipe.schema import Recipe

FORMAT = 1
TRIED_BYTES = 2**12
MOST_LETTERS = 60  # of why a recipe cannot be read
# What may differ between a run and its continuation. Where it lies, what is looked at, what is kept:
FREE_TO_CHANGE = ("output_dir", "evaluation", "checkpoints", "tracking")
# What is done when something goes wrong:
POLICY = ("training.not_finite", "training.loss_spike")
# How long it goes on:
LENGTH = ("training.steps", "training.epochs")
# How a step is fitted into memory, which changes no number but for rounding:
FITTING = ("training.micro_batch_size", "model.activation_checkpointing")


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json. ``data_key`` and ``base_model`` are fingerprints of the packed data and the base.

    ``trusted_code`` is repository and commit of the code that came with the model; empty where none is run.
    """

    run_id: str
    data_key: str
    base_model: str
    micro_batch_size: int
    finished: bool = False
    trusted_code: str = ""
    format: int = FORMAT


def check_output(output_dir: str) -> RunFolder:
    """The run folder for ``output_dir``, after making sure that it can be one. Leaves nothing behind.

    Whether its place takes files is tried with a small one, because permissions do not tell of a quota, a disk that is
    full or has become read-only, or a server that maps root to nobody. Raises MachineError when it is a file, has a
    folder where a file is written, or cannot be written, UsageError when it holds files that trainkit did not make.
    """
    try:
        root = Path(output_dir).expanduser().resolve()  # without `..`: a folder that has no name cannot be put aside
    except (OSError, RuntimeError) as error:
        reason = "there is no such home folder" if output_dir.startswith("~") else "it is a link to itself"
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            reason = str(error.strerror)
        named = shortened(output_dir)
        raise MachineError(f"output_dir: {named} cannot be used: {reason}; name a new folder") from error
    folder = RunFolder(root)
    try:
        there = next(path for path in (root, *root.parents) if path.exists())
        if not there.is_dir():
            which = "is a file" if there == root else f"cannot be made: {there} is a file"
            raise MachineError(f"output_dir: {output_dir} {which}; name a new folder")
        taken = root.is_dir() and not all(_is_of_a_beginning(path, folder) for path in root.iterdir())
    except OSError as error:
        raise MachineError(
            f"output_dir: {shortened(output_dir)} cannot be used: {error.strerror}; name a new folder"
        ) from error
    for entry in (folder.checkpoints, folder.final, folder.metrics, folder.samples):
        if leads_out(entry, folder.root):
            raise CheckpointError(f"{entry}: is a link to somewhere else; put its target here, or name a new folder")
    if taken and not (folder.marker.is_file() and is_ours(folder.marker)):
        raise UsageError(f"output_dir: {output_dir} is not empty and no run of trainkit's; name a new folder")
    for entry in (*folder.whole_files(), folder.metrics, folder.samples):
        if entry.is_dir():
            raise MachineError(f"{entry}: is a folder where a run writes a file; move it away, or name a new folder")
    try:
        _try_to_write(there, folder)
    except OSError as error:
        mend = "free some space, or name a new folder" if error.errno in DISK_FULL else "name a new folder"
        raise MachineError(
            f"output_dir: {shortened(output_dir)} cannot be written: {error.strerror} (tried in {there}); {mend}"
        ) from error
    return folder


def _try_to_write(there: Path, folder: RunFolder) -> None:
    """Write a small file, rename and delete it. Raises OSError as the file system does."""
    # Names as those of our own temporary files: another process that looks into the folder does not take them for
    # somebody else's, and what a kill leaves of them goes when a run begins here.
    first, second = (there / f".{folder.marker.name}.{secrets.token_hex(4)}" for _ in range(2))
    try:
        write_new_file(first, [bytes(TRIED_BYTES)])
        first.rename(second)
        fsync_folder(there)
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)


def shortened(path: str, most: int = 80) -> str:
    """The end of a long path, which tells more than its beginning."""
    return path if len(path) <= most else f"...{path[-most:]}"


def is_ours(marker: Path) -> bool:
    """Whether a run.json can be trainkit's: damaged, or a mapping with a run id; not that of another program."""
    try:
        content = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return True
    return not isinstance(content, dict) or "run_id" in content


def _is_of_a_beginning(path: Path, folder: RunFolder) -> bool:
    """Whether this is what a process leaves that is killed before it has written the mark of its run."""
    return path.name == folder.lock.name or path.name.startswith(f".{folder.marker.name}.")


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Create the folder if need be and hold its lock; a folder that nothing was put into is removed again.

    Raises UsageError when another process holds the lock, MachineError when the folder cannot be written.
    """
    made = [path for path in (folder.root, *folder.root.parents) if not path.exists()]
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"output_dir: {folder.root} cannot be made: {error.strerror}; name a new folder") from error
    try:
        # Not through a link: it could make a file anywhere.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(folder.lock, flags, 0o666), "a")
    except OSError as error:
        raise MachineError(f"output_dir: {folder.lock} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _in_use(folder) from error
        if not _is_file_at(file, folder.lock):
            raise _in_use(folder)  # another process has just removed or renamed the folder
        try:
            yield
        finally:
            _remove_if_unused(folder, file, made)


def _in_use(folder: RunFolder) -> UsageError:
    return UsageError(
        f"output_dir: another trainkit process is running in {folder.root}; wait for it, or name a new folder"
    )


def _is_file_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_unused(folder: RunFolder, lock: IO[str], made: list[Path]) -> None:
    """Take away the lock, and the folders that were made for it, where a refusal left nothing else in them."""
    if not made or not _is_file_at(lock, folder.lock) or list(folder.root.iterdir()) != [folder.lock]:
        return
    folder.lock.unlink()
    with suppress(OSError):  # another process has put something there
        for path in made:
            path.rmdir()


def read_record(folder: RunFolder) -> RunRecord | None:
    """The record of the run in ``folder``, or None when there is none. Raises CheckpointError when it is damaged."""
    if not folder.marker.exists():
        return None
    try:
        content = json.loads(folder.marker.read_bytes())
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{folder.marker}: format {content['format']}, this trainkit reads {FORMAT}; use the trainkit that "
                "wrote it, or --fresh, which begins anew"
            )
        record = RunRecord(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.marker}: damaged ({type(error).__name__}); --fresh begins anew") from error
    wrong = [field.name for field in fields(record) if type(getattr(record, field.name)).__name__ != field.type]
    if wrong:
        raise CheckpointError(f"{folder.marker}: damaged ({wrong[0]}); --fresh begins anew")
    return record


def read_own_recipe(folder: RunFolder) -> Recipe:
    """The recipe of the run in ``folder``. Raises CheckpointError when it is missing or damaged."""
    if not folder.recipe.is_file():
        raise CheckpointError(f"{folder.recipe}: missing; restore it, or --fresh begins anew")
    try:
        return read_recipe(str(folder.recipe)).recipe
    except RecipeErrors as error:
        reason = error.lines[0].removeprefix(f"{folder.recipe}:")[:MOST_LETTERS]
        raise CheckpointError(f"{folder.recipe}: damaged ({reason}); restore it, or --fresh begins anew") from error


def has_begun(folder: RunFolder) -> bool:
    """Whether the run in ``folder`` has something to lose: a checkpoint, a logged number, or a result."""
    logged = folder.metrics.is_file() and folder.metrics.stat().st_size > 0
    saved = folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())
    return logged or saved or folder.final.exists()


def begin_run(
    folder: RunFolder, recipe: Recipe, *, data_key: str, base_model: str, micro_batch_size: int, trusted_code: str = ""
) -> RunRecord:
    """Write the recipe and the record of a new run.

    The recipe names this very folder, so that from elsewhere too it continues this run and begins no other.
    """
    record = RunRecord(
        run_id=secrets.token_hex(8),
        data_key=data_key,
        base_model=base_model,
        micro_batch_size=micro_batch_size,
        trusted_code=trusted_code,
    )
    write_record(folder, record)  # first: a folder that holds anything else without it is not known as ours
    folder.remove_leftovers()
    _write_recipe(folder, recipe)
    fsync_folder(folder.root.parent)
    return record


def _write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    write_atomically(folder.recipe, recipe_as_yaml(replace(recipe, output_dir=str(folder.root))))


def write_record(folder: RunFolder, record: RunRecord) -> None:
    """Replace run.json."""
    write_json(folder.marker, asdict(record))


def finish_run(folder: RunFolder, record: RunRecord) -> RunRecord:
    """Note that the planned steps are done and the result is verified."""
    finished = replace(record, finished=True)
    write_record(folder, finished)
    return finished


def check_continuation(
    folder: RunFolder, record: RunRecord, recipe: Recipe, *, data_key: str, base_model: str, trusted_code: str = ""
) -> list[str]:
    """What the recipe changes for the rest of the run in ``folder``, as ``key: before → after``.

    Raises CheckpointError, naming what differs, when it is not that run.
    """
    before = read_own_recipe(folder)
    changed = recipe_differences(before, recipe)
    differing = [line for key, line in changed.items() if key not in POLICY + LENGTH + FITTING]
    if record.trusted_code != trusted_code:
        differing.append(f"--trust-remote-code: {record.trusted_code or 'not given'} → {trusted_code or 'not given'}")
    if not differing and record.data_key != data_key:
        differing = ["the data, the tokenizer or the chat template (their content, not the recipe)"]
    if not differing and record.base_model != base_model:
        differing = ["the base model (its files, not the recipe)"]
    if differing:
        and_flag = "" if record.trusted_code == trusted_code else " and flag"
        raise CheckpointError(
            f"{folder.root}: holds a run that differs in {'; '.join(differing)}. Give the same recipe{and_flag} "
            "to continue it, --fresh to put it aside, or another output_dir"
        )
    return list(changed.values())


def recipe_differences(before: Recipe, after: Recipe) -> dict[str, str]:
    """The keys that differ and are not free to change on a resume, each with ``key: before → after``."""
    old, new = flattened(asdict(before)), flattened(asdict(after))
    return {
        key: f"{key}: {shown(old.get(key))} → {shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in FREE_TO_CHANGE
    }


def shown(value: Any) -> str:
    """A value as it stands in a recipe.

    >>> shown(None), shown(True), shown(2e-4)
    ('null', 'true', '0.0002')
    """
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def continue_run(folder: RunFolder, record: RunRecord, recipe: Recipe, *, micro_batch_size: int) -> RunRecord:
    """Note what the rest of the run does by another recipe; it is not finished then.

    Killed between the two, the next call finds the same differences again.
    """
    folder.remove_leftovers()
    continued = replace(record, micro_batch_size=micro_batch_size, finished=False)
    write_record(folder, continued)
    _write_recipe(folder, recipe)
    return continued


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and sequences as one level of dotted keys.

    >>> flattened({"a": {"b": 1}, "c": [2, {"d": 3}]})
    {'a.b': 1, 'c.0': 2, 'c.1.d': 3}
    """
    if isinstance(value, dict):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in items:
        flat |= flattened(entry, f"{prefix}.{key}" if prefix else key)
    return flat


def put_aside(folder: RunFolder) -> Path:
    """Rename an existing run folder to ``NAME.1``, ``NAME.2`` ...: nothing is overwritten. Returns where it went.

    Raises MachineError where it cannot be renamed: it is where a disk is mounted, or the folder above is not ours.
    """
    number = 1
    while (aside := folder.root.with_name(f"{folder.root.name}.{number}")).exists():
        number += 1
    try:
        folder.root.rename(aside)
    except OSError as error:
        raise MachineError(
            f"output_dir: {folder.root} cannot be put aside: {error.strerror}; name a new folder"
        ) from error
    return aside
