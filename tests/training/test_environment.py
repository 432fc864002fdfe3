from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from trainkit.training.environment import describe_environment, git_commit


def test_names_versions_and_carries_no_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    content = describe_environment(torch.device("cpu"), seed=7, processes=1, data_files=[])
    assert content["packages"]["torch"] == torch.__version__
    assert content["seed"] == 7
    assert "planted" not in json.dumps(content)


def test_the_commit_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("{}")
    assert git_commit(file) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "data"]):
        subprocess.run([*git, *command], check=True)
    commit = git_commit(file)
    assert commit is not None
    assert len(commit) == 40
    file.write_text("{} ")
    assert git_commit(file) == f"{commit}-dirty"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(b'large').hexdigest()}\nsize 5\n"
    file.write_text(pointer)
    subprocess.run([*git, "commit", "-qam", "as Git LFS keeps it"], check=True)
    file.write_text("large")
    assert (
        git_commit(file)
        == subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    )
    file.write_text("Large")
    assert str(git_commit(file)).endswith("-dirty")
    (tmp_path / "other.jsonl").write_text("")
    assert git_commit(tmp_path / "other.jsonl") is None
