"""Whatever is done to a file of a checkpoint: it is found, the file is named, the earlier checkpoint is taken."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING

import pytest

from trainkit.training.checkpoint import FILES, MANIFEST, newest_checkpoint, step_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.faults.conftest import Tally
    from tests.faults.forks import Story

EVERY_FILE = (*FILES, MANIFEST)


def mutations(content: bytes, draw: random.Random, flips: int) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file: None where it is deleted."""
    yield "deleted", None
    for eighth in range(8):
        yield f"cut to {eighth}/8", content[: len(content) * eighth // 8]
    yield "zeroed", bytes(len(content))
    for bit in draw.sample(range(8 * len(content)), flips):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(changed)


@pytest.mark.goal("A4 a file of a checkpoint deleted, cut, zeroed, a bit of it flipped")
@pytest.mark.parametrize("flips", [6, pytest.param(157, marks=pytest.mark.long)])
def test_damage_is_found_and_named(story: Story, tmp_path: Path, flips: int, tally: Tally) -> None:
    run = story.forks.folder / "uninterrupted"
    run_id = json.loads((run / "run.json").read_bytes())["run_id"]
    root = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", root)
    older, newest = sorted(root.iterdir())[-2:]
    assert newest.name == step_name(12)
    assert newest_checkpoint(root, run_id) == (newest, [])
    draw = random.Random(flips)
    for name in EVERY_FILE:
        path = newest / name
        content = path.read_bytes()
        for how, changed in mutations(content, draw, flips):
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
            found, said = newest_checkpoint(root, run_id)
            problems = [] if found == older else [f"taken: {found}"]
            if len(said) != 1 or not said[0].startswith(f"{newest.name} skipped: {name}"):
                problems.append(f"said: {said}")
            tally.count(f"{name} {how}", problems)
        path.write_bytes(content)
    assert newest_checkpoint(root, run_id) == (newest, [])
    tally.note(at_least=len(EVERY_FILE) * (flips + 10))
