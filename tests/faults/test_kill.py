"""kill -9, at random and at every file operation: the same command goes on to the same bits."""

from __future__ import annotations

import random
import re
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.forks import Fault, Forks, Outcome, Story, published, tell
from tests.faults.saves import RUN, saves
from trainkit.training.checkpoint import newest_checkpoint, step_name

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.conftest import Tally


def problems_after(story: Story, folder: Path, killed: Outcome, cache: Path) -> list[str]:
    """What is wrong with a run that was killed, after the same command has ended it."""
    saved = published(folder)
    again = story.forks.run(story.command(folder), cache=cache)
    if again.code != 0:
        return [f"exit code {again.code} after {killed.code}: {again.said[-600:]}"]
    if "already finished" not in again.said and again.continued_after != (saved[-1] if saved else None):
        return [f"continued after step {again.continued_after} with checkpoints of {saved}"]
    leftovers = [path.name for path in cache.rglob(".*")] if cache.exists() else []
    return story.differences(folder) + [f"left behind: {name}" for name in leftovers if "building" not in name]


@pytest.mark.goal("A1 kill -9 at a random moment")
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 8))])
def test_killed_at_random_it_ends_in_the_same_bits(story: Story, tmp_path: Path, block: int, tally: Tally) -> None:
    """From a cold cache: data is packed, the run trained, saved, evaluated and exported when the kill comes."""
    draw = random.Random(block)
    for number in range(25):
        folder, cache = tmp_path / f"run-{number}", tmp_path / f"cache-{number}"
        moment = draw.uniform(0, story.seconds * 1.2)
        killed = story.forks.run(story.command(folder), cache=cache, signals=[(moment, signal.SIGKILL)])
        tally.count(f"block {block}, {moment:.3f} s", problems_after(story, folder, killed, cache))
        shutil.rmtree(folder)
    tally.note(at_least=25)


# What stands for the random part of a temporary name, as a pattern.
TEMPORARY = (
    (re.compile(r"\\\.step\\-(\d{6,})\\\.[0-9a-f]{8}\\\.partial"), r"\\.step\\-\1\\.[0-9a-f]{8}\\.partial"),
    (re.compile(r"\\\.building\\-[a-z0-9_]{8}"), r"\\.building\\-[a-z0-9_]{8}"),
    (re.compile(r"\\\.([a-z]+(?:\\\.[a-z]+)?)\\\.[a-z0-9_]{8}(?=/|$)"), r"\\.\1\\.[a-z0-9_]{8}"),
)


def points_of(story: Story, tmp_path: Path) -> list[Fault]:
    """A kill at every file operation of a run from a cold cache; of equal ones in a row, the first and the last."""
    folder, cache, record = tmp_path / "recorded", tmp_path / "cache", tmp_path / "points.txt"
    outside = Fault(at=0, path=rf"^({re.escape(str(folder))}|{re.escape(str(cache))})")
    outcome = story.forks.run(story.command(folder), cache=cache, record=str(record), fault=outside)
    assert outcome.code == 0, outcome.said
    seen: dict[tuple[str, str], int] = {}
    faults: dict[tuple[str, str, int], Fault] = {}
    before: tuple[str, str] | None = None
    for line in record.read_text().splitlines():
        operation, _, path = line.partition(" ")
        pattern = re.escape(path.removeprefix(str(tmp_path)))
        for random_part, general in TEMPORARY:
            pattern = random_part.sub(general, pattern)
        point = operation, pattern
        seen[point] = at = seen.get(point, 0) + 1
        if point == before and (at - 1) > 1:
            del faults[*point, at - 1]
        faults[*point, at] = Fault(at=at, path=pattern + "$", operation=operation, signal=signal.SIGKILL)
        before = point
    shutil.rmtree(folder)
    shutil.rmtree(cache)
    return list(faults.values())


@pytest.mark.goal("A1 kill -9 at a file operation of packing, training, saving, retention, export")
@pytest.mark.parametrize("block", ["some", *(pytest.param(block, marks=pytest.mark.long) for block in range(4))])
def test_killed_at_any_file_operation_it_ends_in_the_same_bits(
    story: Story, tmp_path: Path, block: str | int, tally: Tally
) -> None:
    points = points_of(story, tmp_path)
    for number, fault in enumerate(points[5::16] if block == "some" else points[int(block) :: 4]):
        folder, cache = tmp_path / "recorded", tmp_path / "cache"
        killed = story.forks.run(story.command(folder), cache=cache, fault=fault)
        name = f"{number}: {fault.operation} {fault.at} {fault.path}"
        problems = [] if killed.code == -signal.SIGKILL else [f"not killed: {killed.said[-300:]}"]
        tally.count(name, problems + problems_after(story, folder, killed, cache))
        shutil.rmtree(folder)
        shutil.rmtree(cache)
    tally.note(at_least=20)


@pytest.fixture(scope="session")
def long_story(forks: Forks, small: dict[str, Any]) -> Story:
    """A run with room for many kills."""
    training = {**small["training"], "steps": 200}
    changes = {"training": training, "checkpoints": {"every_steps": 3, "keep_last": 2, "keep_best": False}}
    return tell(forks, forks.folder / "long", {**small, **changes})


@pytest.mark.goal("A3 chains of 20 kills in one run")
@pytest.mark.parametrize("chain", [0, *(pytest.param(chain, marks=pytest.mark.long) for chain in range(1, 10))])
def test_killed_twenty_times_it_ends_in_the_same_bits(
    long_story: Story, tmp_path: Path, chain: int, tally: Tally
) -> None:
    draw, folder = random.Random(chain), tmp_path / "run"
    command = long_story.command(folder)
    for _ in range(20):
        fault = Fault(at=draw.randint(2, 14), path=r"metrics\.jsonl$", operation="write", signal=signal.SIGKILL)
        killed = long_story.forks.run(command, fault=fault)
        assert killed.code == -signal.SIGKILL, killed.said
    assert len(published(folder)) == 2
    tally.count(f"chain {chain}", problems_after(long_story, folder, killed, long_story.forks.folder / "cache"))
    tally.note()


@pytest.mark.goal("A8 kill -9 inside retention: the newest stays, the next save tidies up")
@pytest.mark.parametrize("keep_last", [1, 2])
def test_killed_inside_retention(forks: Forks, tmp_path: Path, keep_last: int, tally: Tally) -> None:
    root = tmp_path / "checkpoints"
    deletions = Fault(at=0, path=re.escape(str(root)) + "/step", operation="rename|remove|rmdir")
    record = tmp_path / "points.txt"
    assert forks.call(saves, str(root), 1, 8, keep_last, 10, fault=deletions, record=str(record)).code == 0
    for at in range(1, len(record.read_text().splitlines()) + 1):
        shutil.rmtree(root)
        fault = replace(deletions, at=at, signal=signal.SIGKILL)
        killed = forks.call(saves, str(root), 1, 8, keep_last, 10, fault=fault)
        problems = [] if killed.code == -signal.SIGKILL else ["not killed"]
        steps = published(tmp_path)
        newest, skipped = newest_checkpoint(root, RUN)
        if not newest or newest.name != step_name(steps[-1]) or len(steps) < keep_last:
            problems.append(f"left {steps}, newest {newest}, {skipped}")
        forks.call(saves, str(root), 9, 9, keep_last, 10)
        if len(list(root.iterdir())) != keep_last:
            problems.append(f"afterwards {sorted(path.name for path in root.iterdir())}")
        tally.count(f"operation {at}", problems)
    tally.note(at_least=48)
