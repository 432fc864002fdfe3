"""What the tests of faults share: a room to break things in, a fork server, a run to compare with, and the figures."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.bad_input.room import GOOD_LINES, Room
from tests.faults.forks import Forks, Story, tell

if TYPE_CHECKING:
    from collections.abc import Iterator

TALLY = "faults"


@dataclass
class Tally:
    """Counts what was tried for a goal; what failed is kept and fails the test at its end."""

    goal: str = ""
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, name: str, problems: list[str]) -> None:
        """One more was tried."""
        self.tried += 1
        if problems:
            self.failures.append(f"{name}: {'; '.join(problems)}")

    def note(self, *, at_least: int = 1) -> None:
        """End here: fails where anything did, or where fewer than ``at_least`` were tried."""
        assert not self.failures, f"{len(self.failures)} of {self.tried} failed:\n" + "\n".join(self.failures)
        assert self.tried >= at_least


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property: Any) -> Iterator[Tally]:
    """A tally of the goal that the test's marker ``goal`` names."""
    marker = request.node.get_closest_marker("goal")
    found = Tally(marker.args[0])
    yield found
    record_property(TALLY, [found.goal, found.tried, found.tried - len(found.failures)])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "goal(what): of docs/reliability.md that a test counts for")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many faults were tried and passed, goal by goal."""
    tried: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == TALLY and report.when == "teardown":
                    tried[value[0]] += value[1]
                    passed[value[0]] += value[2]
    if tried:
        terminalreporter.section("faults")
        for goal in sorted(tried):
            terminalreporter.line(f"{goal:<72} {passed[goal]:>6,} of {tried[goal]:,}")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Any]) -> Iterator[Forks]:
    """A fork server that has loaded all that a run loads."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        folder = forks.folder / "first"
        story = Story(forks, small, {}, 0.0)
        outcome = forks.run(story.command(folder), modules=str(forks.folder / "modules.txt"))
        assert outcome.code == 0, outcome.said
        yield forks


@pytest.fixture(scope="session")
def small(tiny_model_folder: Path, conversations_file: Path) -> dict[str, Any]:
    """What makes resuming hard, in half a second: dropout, packing, accumulation, evaluations, two epochs and a bit."""
    return {
        "model": {"name": str(tiny_model_folder)},
        "precision": "fp32",
        "adapter": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(conversations_file), "eval": 0.1},
        "packing": {"sequence_length": 128, "overlap": 8},
        "training": {"steps": 12, "tokens_per_step": 512, "micro_batch_size": 3, "learning_rate": 1e-2},
        "evaluation": {"every_steps": 4, "samples": 1, "max_new_tokens": 2},
        "checkpoints": {"every_steps": 2, "keep_last": 2, "keep_best": True},
    }


@pytest.fixture(scope="session")
def story(forks: Forks, small: dict[str, Any]) -> Story:
    """The small run, not interrupted."""
    return tell(forks, forks.folder / "uninterrupted", small)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data of all cases: most of them have the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def room(
    tmp_path: Path, tiny_model_folder: Path, small_recipe: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Room:
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRAINKIT_CACHE", str(cache))
    shutil.copytree(tiny_model_folder, folder / "model")
    small_recipe["model"]["name"] = "model"
    small_recipe["data"] = {"train": "train.jsonl", "eval": 0.3}
    small_recipe["output_dir"] = "run"
    small_recipe["training"] |= {"steps": 2, "tokens_per_step": 512}
    small_recipe["evaluation"] = {"every_steps": 1, "samples": 0}
    made = Room(folder, small_recipe, monkeypatch)
    made.write_lines(*GOOD_LINES)
    return made
