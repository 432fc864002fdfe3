"""trainkit and TRL train alike: scripts/compare_trl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def compare(data: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own: TRL changes and warns about things that are everybody's."""
    return subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "compare_trl", "--data", data, *arguments],
        env={**os.environ, "TRAINKIT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_the_loss_curves_of_trainkit_and_trl_agree(
    tiny_model_folder: Path, conversations_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    many = tmp_path / "many.jsonl"
    many.write_text(conversations_file.read_text() * 4)
    done = compare(many, tmp_path / "cache", "--model", str(tiny_model_folder), "--steps", "6", "--length", "128")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n    6  ") == 4, "four curves of six steps"
    assert done.stdout.rstrip().endswith("agree")


@pytest.mark.long
def test_what_trainkit_refuses_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "few.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    done = compare(data, tmp_path / "cache")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "take at most 0 steps, or more data" in done.stderr
