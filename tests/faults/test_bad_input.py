"""What bad input gets, through the real command line: the right exit code, one line that helps, nothing touched."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.bad_input.command_cases import OPTION_CASES
from tests.faults.bad_input.data_cases import DATA_CASES, EXAMPLE_CASES, FILE_CASES, JSON_CASES
from tests.faults.bad_input.machine_cases import MACHINE_CASES, MORE_MACHINE_CASES, NEEDS_CUDA
from tests.faults.bad_input.model_cases import MODEL_CASES, MORE_MODEL_CASES
from tests.faults.bad_input.recipe_cases import RECIPE_CASES, VALUE_CASES
from tests.faults.bad_input.room import GOOD_LINES, Case, Room, Said, check_refused, content_of, error_lines, named
from tests.faults.bad_input.yaml_cases import YAML_CASES
from trainkit.cli import run

CASES = [
    *YAML_CASES,
    *RECIPE_CASES,
    *VALUE_CASES,
    *OPTION_CASES,
    *DATA_CASES,
    *JSON_CASES,
    *FILE_CASES,
    *EXAMPLE_CASES,
    *MODEL_CASES,
    *MORE_MODEL_CASES,
    *MACHINE_CASES,
    *MORE_MACHINE_CASES,
]
LATE = [case for case in CASES if case.in_weights]
EARLY = [case for case in CASES if not case.in_weights]
FEWEST_CASES = 400
LEAST_SHARE_EARLY = 0.95


def test_nearly_all_is_found_before_a_weight_is_loaded() -> None:
    """Which it is, each case is held to on its own."""
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= FEWEST_CASES
    share = len(EARLY) / len(CASES)
    print(f"{len(CASES)} cases of bad input, {len(EARLY)} found before a weight is loaded: {share:.1%}")
    assert share >= LEAST_SHARE_EARLY


@pytest.mark.parametrize("case", named(EARLY))
def test_refused_before_a_weight_is_read(case: Case, room: Room, capfd: Said) -> None:
    check_refused(case, room, capfd)


@pytest.mark.parametrize("case", named(LATE))
def test_refused_once_the_weights_are_read(case: Case, room: Room, capfd: Said) -> None:
    check_refused(case, room, capfd)


IN_A_PROCESS = ["a key twice", "broken JSON at line 10,001", "truncated shard", "output_dir below a file", "NaN weight"]


@pytest.mark.parametrize("case", named([case for case in CASES if case.name in IN_A_PROCESS]))
def test_the_program_says_the_same(case: Case, room: Room) -> None:
    case.break_it(room)
    room.write_recipe()
    before = content_of(room.folder)
    done = subprocess.run(
        [sys.executable, "-m", "trainkit", *case.command],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (case.code, 1), done.stderr
    assert re.search(case.says, lines[0].replace(f"{room.folder}/", "")), lines
    assert "Traceback" not in done.stderr
    assert content_of(room.folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can do what is refused elsewhere")
@pytest.mark.parametrize("case", named(NEEDS_CUDA))
def test_refused_where_there_is_no_gpu(case: Case, room: Room, capfd: Said) -> None:
    check_refused(case, room, capfd)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_on_a_cpu_are_done_and_said(precision: str, room: Room, capfd: Said) -> None:
    room.set("precision", precision)
    assert room.fine_tune() == 0
    assert re.search(rf"{precision} \(as the recipe says.*compute {precision}", capfd.readouterr().out)


# Runs that exist


@pytest.fixture
def finished(room: Room, cache: Path, capfd: Said) -> Room:
    """A run that is over. It ran once; each test has a copy."""
    kept, folder = cache.with_name("finished-run"), room.folder / "run"
    if not kept.exists():
        assert room.fine_tune() == 0, capfd.readouterr().err
        folder.rename(kept)
    shutil.copytree(kept, folder)
    return room


def test_the_good_input_is_good(finished: Room) -> None:
    assert (finished.folder / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("training.seed", 43, r"differs in training\.seed: 42 → 43"),
        ("training.learning_rate", 0.5, r"differs in training\.learning_rate: .* → 0\.5"),
    ],
)
def test_another_recipe_does_not_continue_a_run(finished: Room, capfd: Said, key: str, value: Any, says: str) -> None:
    check_refused(
        Case(key, lambda room: room.set(key, value), 6, rf"run: holds a run that {says}.*--fresh"), finished, capfd
    )


def test_a_run_cannot_be_continued_to_an_earlier_end(finished: Room, capfd: Said) -> None:
    says = r"run: 2 steps are done already, the recipe now ends after 1; ask for 2 or more, or give another output_dir"
    check_refused(Case("steps", lambda room: room.set("training.steps", 1), 6, says), finished, capfd)


def test_other_data_does_not_continue_a_run(finished: Room, capfd: Said) -> None:
    case = Case(
        "data", lambda room: room.write_lines(*GOOD_LINES[:-1]), 6, r"run: holds a run that differs in the data"
    )
    check_refused(case, finished, capfd)


def test_another_base_model_does_not_continue_a_run(finished: Room, capfd: Said) -> None:
    def change(room: Room) -> None:
        room.edit_json("config.json", rms_norm_eps=1e-3)

    check_refused(Case("base", change, 6, r"run: holds a run that differs in the base model"), finished, capfd)


def test_a_damaged_record_does_not_continue_a_run(finished: Room, capfd: Said) -> None:
    def damage(room: Room) -> None:
        (room.folder / "run" / "run.json").write_text("{")

    check_refused(Case("record", damage, 6, r"run/run\.json: damaged .*--fresh"), finished, capfd)


def test_a_second_process_is_kept_out(room: Room, capfd: Said) -> None:
    (room.folder / "run").mkdir()
    with (room.folder / "run" / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        case = Case("lock", lambda _: None, 2, r"output_dir: another trainkit process is running in run; wait for it")
        check_refused(case, room, capfd)


def test_a_refusal_after_fresh_leaves_the_earlier_run_in_place(finished: Room, capfd: Said) -> None:
    finished.set("adapter.target_modules", ["nowhere"])
    before = content_of(finished.folder / "run")
    assert finished.fine_tune("--fresh") == 2
    assert len(error_lines(capfd, finished.folder)) == 1
    assert content_of(finished.folder / "run") == before
    assert not (finished.folder / "run.1").exists()


# Training that leaves the numbers


@pytest.mark.parametrize(("steps", "held_out"), [(1, 0.3), (4, 0.3), (4, None), (1, None)])
def test_an_absurd_learning_rate_is_exit_7_and_leaves_no_result(
    room: Room, capfd: Said, steps: int, held_out: float | None
) -> None:
    room.set("training.learning_rate", 1e30)
    room.set("training.steps", steps)
    room.set("checkpoints.every_steps", 1)
    room.set("data.eval", held_out)
    assert room.fine_tune() == 7
    (line,) = error_lines(capfd, room.folder)
    assert re.match(r"(after )?step \d: the .*loss is nan.* lower training\.learning_rate", line, re.IGNORECASE), line
    assert len(line) <= 250, line
    assert not (room.folder / "run" / "final").exists()
    saved = [*(room.folder / "run").rglob("*.safetensors")]
    assert all(bool(torch.isfinite(one).all()) for path in saved for one in load_file(path).values())


# Looking at data


def test_inspect_data_needs_no_weights(room: Room, capfd: Said) -> None:
    room.weights.unlink()
    assert run(["inspect-data", room.write_recipe().name]) == 0, capfd.readouterr().err


@pytest.mark.parametrize(
    "case", named([case for case in DATA_CASES if case.name not in {"prompts fill their rows", "a document too long"}])
)
def test_inspect_data_finds_what_is_wrong_with_the_data(case: Case, room: Room, capfd: Said) -> None:
    case.break_it(room)
    code = run(["inspect-data", room.write_recipe().name, "--examples", "1"])
    lines = error_lines(capfd, room.folder)
    if case.name == "half of the answers empty":
        assert code == 0  # it counts what it drops, and shows the count
        return
    assert (code, len(lines) == 1) == (3, True), lines
    assert re.search(case.says, lines[0]), lines
