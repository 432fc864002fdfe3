"""A signal at any moment: the exit code says so, no step is lost, and the same command goes on to the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.forks import Fault, Outcome, Story, contents, differences, lines_of, logged_steps, published

if TYPE_CHECKING:
    from tests.faults.conftest import Tally

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS = 30.0


def problems_of(story: Story, folder: Path, ended: Outcome, number: signal.Signals) -> list[str]:
    """What is wrong with a run that got a signal, and with its continuation."""
    saved = published(folder)
    finished = (folder / "run.json").exists() and json.loads((folder / "run.json").read_bytes())["finished"]
    problems = []
    allowed = {130 if number == signal.SIGINT else 75}
    if finished:
        allowed |= {0, -number}  # it came when everything was done
    elif not folder.exists():
        allowed |= {-number}  # or before anything was begun
    if ended.code not in allowed:
        problems.append(f"exit code {ended.code}: {ended.said[-300:]}")
    if logged_steps(folder) != (saved[-1] if saved else 0):
        problems.append(f"{logged_steps(folder)} steps were done, {saved} are saved")
    return problems + problems_afterwards(story, folder, saved)


def problems_afterwards(story: Story, folder: Path, saved: list[int]) -> list[str]:
    again = story.forks.run(story.command(folder))
    if again.code != 0:
        return [f"afterwards exit code {again.code}: {again.said[-300:]}"]
    if "already finished" not in again.said and again.continued_after != (saved[-1] if saved else None):
        return [f"continued after {again.continued_after}, saved were {saved}"]
    return story.differences(folder, stopped=True)


@pytest.mark.goal("A7 SIGTERM, SIGUSR1, SIGINT at a random moment: exit 75 or 130, no step lost")
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 9))])
def test_a_signal_at_a_random_moment(story: Story, tmp_path: Path, block: int, tally: Tally) -> None:
    draw = random.Random(block)
    for index in range(12):
        folder, number = tmp_path / f"run-{index}", SIGNALS[index % 3]
        moment = draw.uniform(0.05, 1.1) * story.seconds
        ended = story.forks.run(story.command(folder), signals=[(moment, number)])
        problems = [] if ended.seconds - moment < SECONDS else [f"took {ended.seconds - moment:.0f} s to stop"]
        tally.count(f"{number.name} at {moment:.3f} s", problems + problems_of(story, folder, ended, number))
        shutil.rmtree(folder, ignore_errors=True)
    tally.note(at_least=12)


PLACES = {
    "training": ("write", r"metrics\.jsonl$", 7),
    "evaluation": ("write", r"samples\.jsonl$", 2),
    "the beginning of a save": ("fsync", r"/run/metrics\.jsonl$", 3),
    "a save": ("open", r"\.step-000006.*/weights\.safetensors$", 1),
    "the publishing of a save": ("rename", r"\.step-000006", 1),
    "retention": ("remove", r"step-.*/weights\.safetensors$", 1),
    "the last save": ("open", r"\.step-000012.*/weights\.safetensors$", 1),
    "export": ("open", r"/\.final\..*/README\.md$", 1),
    "the last word": ("rename", r"/\.summary\.json", 1),
}


@pytest.mark.goal("A7 signals in training, evaluation, each phase of a save, export")
@pytest.mark.parametrize(
    ("where", "number"),
    [
        pytest.param(where, number, marks=[] if (index + turn) % 3 == 0 else pytest.mark.long)
        for index, where in enumerate(PLACES)
        for turn, number in enumerate(SIGNALS)
    ],
)
def test_a_signal_in_each_phase(story: Story, tmp_path: Path, where: str, number: signal.Signals, tally: Tally) -> None:
    operation, path, at = PLACES[where]
    folder = tmp_path / "run"
    fault = Fault(at=at, operation=operation, path=path, signal=number)
    ended = story.forks.run(story.command(folder), fault=fault)
    tally.count(f"{number.name} in {where}", problems_of(story, folder, ended, number))
    tally.note()


@pytest.mark.parametrize("steps", [12, 17])
def test_the_last_evaluation_is_made_up_for(story: Story, tmp_path: Path, steps: int) -> None:
    """Stopped in it, the last checkpoint knows nothing of it; what goes on from there, longer or not, must not miss it.

    The last step of the shorter run has no evaluation by its number.
    """
    every_five = {"evaluation": {"every_steps": 5, "samples": 1, "exact_match": 2, "max_new_tokens": 2}}
    longer = {**every_five, "training": {**story.recipe["training"], "steps": steps}}
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    assert story.forks.run(story.command(calm, every_five)).code == 0

    # Evaluations before the first step and after the fifth and tenth, and twelve steps: the line of the last step.
    fault = Fault(at=15, operation="write", path=r"metrics\.jsonl$", signal=signal.SIGTERM)
    ended = story.forks.run(story.command(stopped, every_five), fault=fault)
    assert ended.code == 75
    assert "SIGTERM after step 12 of 12" in ended.said
    assert '"step": 12' in lines_of(stopped / "metrics.jsonl")[-1]
    assert "eval_loss" not in lines_of(stopped / "metrics.jsonl")[-1]

    for folder in (calm, stopped):
        again = story.forks.run(story.command(folder, longer))
        assert again.code == 0, again.said
    found, expected = without_older_states(stopped), without_older_states(calm)
    assert not differences(expected, found)
    assert any("exact_match" in line and line["step"] == 12 for line in found["metrics.jsonl"])
    one, other = (json.loads((folder / "summary.json").read_bytes()) for folder in (calm, stopped))
    measured = {"checkpoints", *(key for key in one if "memory" in key or "second" in key)}
    assert {k: v for k, v in one.items() if k not in measured | {"output_dir", "final"}} == {
        k: v for k, v in other.items() if k not in measured | {"output_dir", "final"}
    }


def without_older_states(folder: Path) -> dict[str, Any]:
    """Contents; of the checkpoint that was saved before the evaluation of its step, its state is left out."""
    found = contents(folder)
    found.pop("checkpoints/step-000012/state.json", None)
    return found


@pytest.mark.goal("A7 a second SIGINT: stops at once, the last good checkpoint stays good")
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 5))])
def test_a_second_ctrl_c(story: Story, tmp_path: Path, block: int, tally: Tally) -> None:
    draw = random.Random(block)
    for index in range(8):
        folder = tmp_path / f"run-{index}"
        moment = draw.uniform(0.2, 1.0) * story.seconds
        twice = [(moment, signal.SIGINT), (moment + draw.uniform(0, 0.03), signal.SIGINT)]
        ended = story.forks.run(story.command(folder), signals=twice)
        problems = [] if ended.code in {130, 0, -signal.SIGINT} else [f"exit code {ended.code}: {ended.said[-300:]}"]
        problems += problems_afterwards(story, folder, published(folder))
        tally.count(f"at {moment:.3f} s", problems)
    tally.note(at_least=8)


def heeds(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.goal("A7 the same signals while the program is loaded or packs: exit 75 or 130, one line")
@pytest.mark.parametrize("moments", [6, pytest.param(30, marks=pytest.mark.long)])
def test_a_signal_in_the_first_seconds(tmp_path: Path, tiny_model_folder: Path, moments: int, tally: Tally) -> None:
    draw = random.Random(moments)
    words = " ".join(["the quick brown fox jumps over the lazy dog"] * 20)
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": words}) + "\n") * 20_000)
    packing = ["pack-data", "--data", "train.jsonl", "--tokenizer", str(tiny_model_folder), "--force"]
    environment = os.environ | {"TRAINKIT_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    for index in range(moments):
        number, arguments = SIGNALS[index % 3], [["fine-tune", "quickstart"], packing][index // 3 % 2]
        moment = draw.random() ** 2 * 4
        with subprocess.Popen(
            [sys.executable, "-m", "trainkit", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as started:
            while not heeds(started.pid, signal.SIGQUIT):  # the last of them; until then it is Python that starts
                time.sleep(0.001)
            time.sleep(moment)
            started.send_signal(number)
            _, said = started.communicate(timeout=60)
        wanted = 130 if number is signal.SIGINT else 75
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        problems = [] if started.returncode == wanted else [f"exit code {started.returncode}: {said[-300:]}"]
        if len(errors) != 1 or "Traceback" in said:
            problems.append(f"said {said[-300:]}")
        if left := [path for path in tmp_path.rglob("*") if path.name.startswith(".building")]:
            problems.append(f"left {left}")
        tally.count(f"{number.name} to {arguments[0]} at {moment:.3f} s", problems)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    tally.note(at_least=moments)
