"""What a run ran on: versions, devices, seed, the commit of its data. Never an environment variable, never a secret."""

from __future__ import annotations

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


def describe_environment(
    device: torch.device, *, seed: int, processes: int, data_files: Iterable[Path]
) -> dict[str, Any]:
    """The content of environment.json."""
    devices = []
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "trainkit": trainkit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": device.type,
        "devices": devices,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": processes,
        "seed": seed,
        "data_commits": {str(file): commit for file in data_files if (commit := git_commit(file)) is not None},
    }


def git_commit(file: Path) -> str | None:
    """The commit checked out where ``file`` lies, with ``-dirty`` when the file differs; None outside of git."""
    git = ["git", "-C", str(file.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=5, check=False
        )
        if tracked.returncode != 0:
            return None
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", file.name], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
