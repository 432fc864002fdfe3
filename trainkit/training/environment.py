"""What a run ran on: versions, devices, seed, the commit of its data. Never an environment variable, never a secret."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from typing import TYPE_CHECKING, Any

import torch

import trainkit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "safetensors", "numpy")
LARGEST_LFS_POINTER_BYTES = 1024
"""The format's own limit: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""


def describe_environment(
    device: torch.device, *, seed: int, processes: int, data_files: Iterable[Path], trusted_code: str = ""
) -> dict[str, Any]:
    """The content of environment.json. ``trusted_code``: whose code came with the model and is run."""
    devices = []
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "trainkit": trainkit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # torch itself says which build it is, where its package does not.
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "device": device.type,
        "devices": devices,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": processes,
        "seed": seed,
        "trusted_code": trusted_code or None,
        "data_commits": {str(file): commit for file in data_files if (commit := git_commit(file)) is not None},
    }


def git_commit(file: Path) -> str | None:
    """The commit checked out where ``file`` lies, with ``-dirty`` when the file differs from what it holds.

    None outside of git, and for a file that the commit does not hold. A repository's own settings can name programs,
    for filters, hooks, a watcher of files or a connection; a data folder is somebody else's, so only such commands are
    given as run none: they look up objects, and hash bytes as they are. Of the filters only Git LFS is understood.
    """
    commit = _git(file.parent, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    kept = _git(file.parent, "rev-parse", "--verify", "--quiet", f"HEAD:./{file.name}")
    there = _git(file.parent, "hash-object", "--no-filters", "--", file.name)
    if commit is None or kept is None or there is None:
        return None
    return commit if there == kept or _is_large_file(file, kept) else f"{commit}-dirty"


def _is_large_file(file: Path, kept: str) -> bool:
    """Whether the object ``kept`` is the Git LFS pointer of ``file``, which holds the SHA-256 of its content."""
    size = _git(file.parent, "cat-file", "-s", kept)
    if size is None or int(size) > LARGEST_LFS_POINTER_BYTES:
        return False
    pointer = _git(file.parent, "cat-file", "blob", kept) or ""
    with file.open("rb") as content:
        return f"oid sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}" in pointer.splitlines()


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in ``folder``; None where it fails or is not there. It may connect to nothing."""
    settings = {"GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=os.environ | settings
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
