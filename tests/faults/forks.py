"""The tests' side of the fork server, and what makes two runs the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

REPOSITORY = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("fork_server.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": str(REPOSITORY),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong at file operation number ``at`` (from 1; 0: never) of those that match.

    ``path`` and ``operation`` are regular expressions. In this order: it waits until ``wait_for`` is there, the process
    gets ``signal``, its disk is filled by ``ballast`` until ``free_bytes`` are left, the operation fails with
    ``errno``; ``lasting``: so does every later one.
    """

    at: int
    path: str = "."
    operation: str = ".*"
    wait_for: str | None = None
    signal: int = 0
    ballast: str | None = None
    free_bytes: int = 0
    errno: int = 0
    lasting: bool = False


NONE = Fault(at=0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command line of trainkit, or a function ``module:name`` of the tests, to be run in a fork."""

    arguments: Sequence[Any]
    said: str
    cwd: str
    environment: Mapping[str, str]
    call: str | None = None
    fault: Fault = NONE
    record: str | None = None
    signals: Sequence[tuple[float, int]] = ()
    limit_seconds: float = 120.0
    wait_for_tracer: bool = False
    modules: str | None = None
    continue_pid: int | None = None


@dataclass(frozen=True)
class Outcome:
    """``code`` is the exit code, negative for a signal, None for a process that is stopped and not ended."""

    code: int | None
    said: str
    seconds: float
    pid: int
    said_file: Path

    @property
    def continued_after(self) -> int | None:
        """The step that it says it goes on from."""
        found = re.search(r"continues after step (\d+)", self.said)
        return int(found[1]) if found else None


@dataclass
class Forks:
    """A fork server and its folder. A context manager."""

    folder: Path
    number: int = 0
    server: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Self:
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
            cwd=REPOSITORY,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()

    def run(self, arguments: Sequence[Any], *, cache: Path | None = None, **job: Any) -> Outcome:
        """Run a job to its end, or until it is stopped."""
        self.number += 1
        said = self.folder / f"said-{self.number}.txt"
        environment = {"TRAINKIT_CACHE": str(cache or self.folder / "cache")}
        return self._answer(
            Job(arguments=arguments, said=str(said), cwd=str(self.folder), environment=environment, **job)
        )

    def call(self, function: Callable[..., int], *arguments: Any, **job: Any) -> Outcome:
        """Run a function of a test module in a fork."""
        return self.run(arguments, call=f"{function.__module__}:{function.__name__}", **job)

    def rest_of(self, outcome: Outcome) -> Outcome:
        """Wait for a process that was stopped and has been sent a signal since."""
        return self._answer(
            Job(
                arguments=(),
                said=str(outcome.said_file),
                cwd=str(self.folder),
                environment={},
                continue_pid=outcome.pid,
            )
        )

    def _answer(self, job: Job) -> Outcome:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asdict(job)) + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the fork server has ended"}
        assert "error" not in answer, answer["error"]
        said = Path(job.said)
        text = said.read_text(errors="replace")
        if answer["code"] is not None:
            said.unlink()
        return Outcome(answer["code"], text, answer["seconds"], answer["pid"], said)


@dataclass(frozen=True)
class Story:
    """A recipe that was run to its end without interruption, and what came of it."""

    forks: Forks
    recipe: Mapping[str, Any]
    expected: Mapping[str, Any]
    seconds: float

    def command(self, folder: Path, changes: Mapping[str, Any] | None = None) -> list[str]:
        """The command line that runs it in ``folder``; ``changes`` replace whole sections."""
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({**self.recipe, **(changes or {}), "output_dir": str(folder)}))
        return ["fine-tune", str(path)]

    def differences(self, folder: Path, *, stopped: bool = False) -> list[str]:
        """What of the finished run in ``folder`` is not as it should be, bit by bit.

        Where it was ``stopped``, checkpoints before the last are those of other steps, and the last may be older than
        its evaluation.
        """
        found = contents(folder)
        if stopped:
            last = max(name for name in self.expected["names"] if re.fullmatch(r"checkpoints/step-\d+", name))
            return differences(without_older(self.expected, last), without_older(found, last))
        return differences(self.expected, found)


def tell(forks: Forks, folder: Path, recipe: Mapping[str, Any]) -> Story:
    """Run ``recipe`` in ``folder`` to its end."""
    story = Story(forks, recipe, {}, 0.0)
    outcome = forks.run(story.command(folder))
    assert outcome.code == 0, outcome.said
    return Story(forks, recipe, contents(folder), outcome.seconds)


def contents(folder: Path) -> dict[str, Any]:
    """All that a finished run left that does not depend on the clock or the process: by name, for comparing."""
    found: dict[str, Any] = {
        "names": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "run.lock"),
        "metrics.jsonl": [without_clock(json.loads(line)) for line in lines_of(folder / "metrics.jsonl")],
        "samples.jsonl": lines_of(folder / "samples.jsonl"),
        "finished": json.loads((folder / "run.json").read_bytes())["finished"],
    }
    for path in sorted(folder.glob("checkpoints/*/*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = digest(path)
        elif path.name == "state.json":
            found[name] = json.loads(path.read_bytes()) | {"log_bytes": None}  # lines hold times of several lengths
    for path in sorted(folder.glob("final/*")):
        if path.is_file() and path.name not in {"SHA256SUMS", "README.md"}:
            found[f"final/{path.name}"] = digest(path)
    return found


def without_older(found: Mapping[str, Any], last: str) -> dict[str, Any]:
    """Contents without those of other checkpoints than ``last``; what else is in their folder stays."""

    def is_older(name: str) -> bool:
        return name.startswith("checkpoints/step-") and not (name + "/").startswith(last + "/")

    kept = {name: value for name, value in found.items() if not is_older(name)}
    # A run that is stopped in its last evaluation has a whole last checkpoint from before it, which stays.
    state = kept[f"{last}/state.json"]
    counters = {name: value for name, value in state["counters"].items() if not name.startswith(("eval", "best"))}
    kept[f"{last}/state.json"] = {**state, "counters": counters}
    return kept | {"names": [name for name in found["names"] if not is_older(name)]}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line for each thing that differs."""
    return [
        f"{key}: {str(found.get(key))[:300]} instead of {str(expected.get(key))[:300]}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def without_clock(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if "second" not in key and "memory" not in key}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def published(folder: Path) -> list[int]:
    """The steps whose checkpoints have their name and their manifest, in order."""
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*[0-9]/manifest.json")
    )


def logged_steps(folder: Path) -> int:
    """How many steps are recorded."""
    return sum('"loss"' in line for line in lines_of(folder / "metrics.jsonl"))
