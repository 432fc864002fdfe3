"""Runs in several processes, through the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONFIGS = REPOSITORY / "configs"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
ODD_LETTER, ODD_LINE = "Z", 12  # one example of the training data has a letter that no other has
ENDS_WITHIN_SECONDS = 240  # on cores that others use as well
LAUNCH = {
    "two-ddp": {"distributed_type": "MULTI_CPU", "num_processes": 2},
    "four-ddp": {"distributed_type": "MULTI_CPU", "num_processes": 4},
    "two-fsdp2": {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}},
    "four-fsdp2": {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 2}},
}


@dataclass(frozen=True)
class Ended:
    """A command that came to its end: its exit code and what it printed; the folder of its run."""

    code: int
    output: str
    errors: str
    folder: Path

    @property
    def said(self) -> str:
        return self.output + self.errors

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what a clock or the machine's memory put there."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not is_measured(key)} for line in lines]

    def error_lines(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


def is_measured(key: str) -> bool:
    return "second" in key or "memory" in key


def largest_difference(left: Ended, right: Ended) -> float:
    """Of all numbers in the two metrics.jsonl, relative; what stands beside each must be the same."""
    ours, theirs = left.lines(), right.lines()
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        for key, value in one.items():
            if isinstance(value, float):
                largest = max(largest, abs(value - other[key]) / max(abs(other[key]), 1e-12))
            else:
                assert value == other[key], key
    return largest


@dataclass(frozen=True)
class Workbench:
    """Writes recipes under ``root`` and runs them."""

    root: Path
    base: Mapping[str, Any]

    def recipe(self, name: str, changes: Mapping[str, Any] | None = None) -> Path:
        """The base recipe with changes, section by section; None takes a section out."""
        recipe = {section: dict(value) if isinstance(value, dict) else value for section, value in self.base.items()}
        for section, change in (changes or {}).items():
            if isinstance(change, dict) and isinstance(recipe.get(section), dict):
                recipe[section] |= change
            else:
                recipe[section] = change
        recipe = {section: value for section, value in recipe.items() if value is not None}
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "output_dir": str(self.root / name)}))
        return path

    def launch_file(self, kind: str) -> Path:
        """One of configs/ where it says the same, else one that is written here."""
        shipped = {"two-ddp": "cpu-ddp.yaml", "two-fsdp2": "cpu-fsdp2.yaml"}
        if kind in shipped:
            return CONFIGS / shipped[kind]
        path = self.root / f"{kind}.yaml"
        path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "use_cpu": True, **LAUNCH[kind]}))
        return path

    def start(
        self,
        recipe: Path,
        kind: str | None = None,
        *options: str,
        program: tuple[str, ...] = (sys.executable, "-m", "trainkit"),
        environment: Mapping[str, str] | None = None,
    ) -> Started:
        """Start the command; ``kind`` names a launch file, None is one process."""
        launch = ["--launch", str(self.launch_file(kind))] if kind else []
        process = subprocess.Popen(
            [*program, "fine-tune", str(recipe), *launch, *options],
            cwd=self.root,
            env={**os.environ, **ENVIRONMENT, "TRAINKIT_CACHE": str(self.root / "cache"), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return Started(process, recipe.with_suffix(""))

    def run(
        self, recipe: Path, kind: str | None = None, *options: str, environment: Mapping[str, str] | None = None
    ) -> Ended:
        """Run the command to its end, whatever that is."""
        return self.start(recipe, kind, *options, environment=environment).end()


@dataclass(frozen=True)
class Started:
    """A command under way."""

    process: subprocess.Popen[str]
    folder: Path

    def end(self, seconds: float = ENDS_WITHIN_SECONDS) -> Ended:
        """Wait for it."""
        try:
            output, errors = self.process.communicate(timeout=seconds)
        finally:
            self.kill()
        return Ended(self.process.returncode, output, errors, self.folder)

    def kill(self) -> None:
        """Leave nothing behind, the processes of the launcher included."""
        if self.process.poll() is not None:
            return
        for process in self.workers():
            process.kill()
        self.process.kill()

    def workers(self) -> list[psutil.Process]:
        """The processes that the launcher started, by rank."""
        try:
            children = psutil.Process(self.process.pid).children()
            ranked = [(int(child.environ()["RANK"]), child) for child in children if "RANK" in child.environ()]
        except psutil.Error:
            return []
        return [child for _, child in sorted(ranked, key=lambda pair: pair[0])]

    def wait_for(self, reached: Callable[[], bool], seconds: float = ENDS_WITHIN_SECONDS) -> None:
        """Return when something is so, or the command is at its end."""
        deadline = time.monotonic() + seconds
        while not reached() and self.process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Return when a step stands in metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        self.wait_for(lambda: file.exists() and f'"step": {step}, "epoch"' in file.read_text())

    def send(self, number: signal.Signals) -> None:
        """A signal to the command's own process."""
        self.process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """SIGINT to the whole process group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)


def write_conversations(path: Path, number: int, seed: int) -> Path:
    """Conversations of one to three turns and very different lengths."""
    draw = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "what", "is", "it", "then"]
    with path.open("w") as file:
        for index in range(number):
            messages: list[dict[str, str]] = []
            for _ in range(draw.randint(1, 3)):
                question = " ".join(draw.choices(words, k=draw.randint(1, 8)))
                answer = " ".join(draw.choices(words, k=draw.randint(1, 12)))
                answer += f" {ODD_LETTER}" * (index + 1 == ODD_LINE and not messages)
                messages += [
                    {"role": "user", "content": f"{index}: {question}?"},
                    {"role": "assistant", "content": answer},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_fault(folder: Path, module: str, body: str) -> dict[str, str]:
    """Make every process of a run change a module of trainkit when it is imported; returns the environment for that.

    ``body`` is Python that sees the ``module`` and its process's ``rank``.
    """
    folder.mkdir()
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (folder / "sitecustomize.py").write_text(_FAULT.format(module=module, body=lines))
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}


_FAULT = """\
import importlib.machinery, os, signal, sys


def change(module, rank):
{body}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "{module}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module, int(os.environ.get("RANK", "0")))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""
