"""Which checkpoints stay. Nothing is deleted but files that trainkit wrote, in folders marked with this run's id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.training.checkpoint import (
    STAGING_FOLDER,
    delete_files,
    is_barely_begun,
    is_half_deleted,
    owner_of,
    problems_of,
    step_folders,
    step_name,
    step_of,
)

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Retention:
    """The newest ``keep_last`` checkpoints stay, and that of ``best_step`` with them."""

    keep_last: int
    best_step: int | None = None


def retire_checkpoints(root: Path, run_id: str, retention: Retention, newest_step: int) -> list[Path]:
    """Delete what need not stay behind the checkpoint of ``newest_step``, which has just been committed.

    That one always stays, and so does whatever stands at a later step. Only whole checkpoints count as kept; a damaged
    one is not deleted either. What an interrupted save or an interrupted deletion left goes too. Returns what went.
    """
    retired = [folder for folder in retirable(root, run_id, retention, newest_step) if owner_of(folder) == run_id]
    return [folder for folder in [*retired, *_unfinished(root, run_id, newest_step)] if delete_files(folder)]


def retirable(root: Path, run_id: str, retention: Retention, newest_step: int) -> list[Path]:
    """Whole checkpoints of this run that are not among those to keep, the oldest first."""
    whole = [
        folder
        for folder in step_folders(root)
        if step_of(folder) <= newest_step and problems_of(folder, run_id, checksums=False) is None
    ]
    older = sorted(whole, key=step_of)[: -max(retention.keep_last, 1)]
    return [folder for folder in older if folder.name != _best_name(retention)]


def delete_oldest(root: Path, run_id: str, retention: Retention, newest_step: int) -> Path | None:
    """Make room: delete the oldest checkpoint that is neither the newest nor the best; None where there is none."""
    for folder in retirable(root, run_id, Retention(1, retention.best_step), newest_step):
        if owner_of(folder) == run_id and delete_files(folder):
            return folder
    return None


def _best_name(retention: Retention) -> str | None:
    return None if retention.best_step is None else step_name(retention.best_step)


def _unfinished(root: Path, run_id: str, newest_step: int) -> list[Path]:
    """Folders of this run that a kill left in the middle of a save, or of a deletion."""
    if not root.is_dir():
        return []
    staging = [path for path in root.iterdir() if STAGING_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    staging = [folder for folder in staging if owner_of(folder) == run_id or is_barely_begun(folder, run_id)]
    older = [folder for folder in step_folders(root) if step_of(folder) < newest_step]
    return [*staging, *(folder for folder in older if is_half_deleted(folder, run_id))]
