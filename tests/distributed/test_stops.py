"""Processes that are killed, stopped or fail: all end soon, one line says why, and the same command goes on."""

from __future__ import annotations

import random
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.distributed.workbench import (
    ODD_LETTER,
    ODD_LINE,
    Ended,
    Started,
    Workbench,
    largest_difference,
    write_fault,
)

if TYPE_CHECKING:
    from pathlib import Path

    import psutil
    from transformers import PreTrainedTokenizerBase

ALMOST = 1e-6
SOON_SECONDS = 30.0
NAMED_WITHIN_SECONDS = 120.0

FAILS_IN_ONE = """
ordinary = module.rows_of_step

def rows_of_step(plan, seed, step):
    if step == 5 and rank == 1:
        {statement}
    return ordinary(plan, seed, step)

module.rows_of_step = rows_of_step
"""
SLOW_STEP = """
import time
ordinary = module.rows_of_step

def rows_of_step(plan, seed, step):
    if step == 12:
        time.sleep(60)
    return ordinary(plan, seed, step)

module.rows_of_step = rows_of_step
"""
QUICK_BEATS = """
module.BEAT_SECONDS, module.SILENT_SECONDS = 0.25, 3.0
"""
KILLED_WHILE_SAVING = """
ordinary = module.write_checkpoint

def write_checkpoint(root, run_id, state, *rest):
    if state.step == 8 and rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return ordinary(root, run_id, state, *rest)

module.write_checkpoint = write_checkpoint
"""
SPOILED = """
really = module.LossModel.forward

def forward(model, ids, *rest):
    loss, count = really(model, ids, *rest)
    if model.training and bool((ids == {letter}).any()):
        if "{what}" == "loss":
            loss = loss * float("nan")
        elif loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss, count

module.LossModel.forward = forward
"""


SPIKE = """
from trainkit.model.loss import LossModel
from trainkit.training import faults, spikes
spikes.FEWEST, faults.MOST_SHARE = 5, 0.5
really = LossModel.forward

def forward(model, ids, *rest):
    loss, count = really(model, ids, *rest)
    return (loss * 20 if model.training and bool((ids == {letter}).any()) else loss), count

LossModel.forward = forward
"""


@pytest.fixture(scope="session")
def uninterrupted(bench: Workbench) -> Ended:
    """The curve that every run here must come to, in one process."""
    run = bench.run(bench.recipe("uninterrupted"))
    assert run.code == 0, run.said
    return run


def assert_comes_to(run: Ended, uninterrupted: Ended) -> None:
    assert run.code == 0, run.said
    assert "continues after step" in run.output
    difference = largest_difference(run, uninterrupted)
    print(f"{run.folder.name}: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= ALMOST


def assert_nothing_unfinished(folder: Path) -> None:
    assert not [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")]


def end_soon(started: Started, sent: float) -> Ended:
    ended = started.end()
    print(f"{started.folder.name}: ended after {time.monotonic() - sent:.1f} s")
    assert time.monotonic() - sent < SOON_SECONDS, ended.said
    assert started.workers() == []
    return ended


def test_one_is_killed_and_the_same_command_goes_on(bench: Workbench, uninterrupted: Ended) -> None:
    """At a random moment; then stopped by SIGTERM, and ended by one process alone: saved on two, read on one."""
    recipe = bench.recipe("killed")
    started = bench.start(recipe, "two-fsdp2")
    started.wait_for_step(random.randint(1, 9))
    rank = random.randint(0, 1)
    started.workers()[rank].kill()
    killed = end_soon(started, time.monotonic())
    assert killed.code == 75, killed.said
    [line] = killed.error_lines()
    assert line.startswith(f"error: process {rank} was killed (SIGKILL), and the others were stopped; the same command")

    started = bench.start(recipe, "two-fsdp2")
    started.wait_for_step(13)
    started.send(signal.SIGTERM)
    stopped = end_soon(started, time.monotonic())
    assert stopped.code == 75, stopped.said
    assert stopped.errors.count("SIGTERM received: saving") == 1
    [line] = stopped.error_lines()
    assert line.startswith("error: SIGTERM after step ")
    assert line.endswith(
        f"to continue: trainkit fine-tune {stopped.folder / 'recipe.yaml'} --launch {bench.launch_file('two-fsdp2')}"
    )
    assert_nothing_unfinished(stopped.folder)
    assert {path.name for path in max((stopped.folder / "checkpoints").iterdir()).iterdir()} == {
        "manifest.json",
        "owner.json",
        "random.safetensors",
        "state.json",
        *(f"{kind}-0000{part}-of-00002.safetensors" for kind in ("weights", "optimizer") for part in (1, 2)),
    }
    assert_comes_to(bench.run(recipe), uninterrupted)


def assert_named(ended: Ended, rank: int, stopped: psutil.Process, seconds: float) -> None:
    assert ended.code == 75, ended.said
    [line] = ended.error_lines()
    where = f"process {rank} (pid {stopped.pid} on {socket.gethostname()})"
    assert line.startswith(f"error: {where} has not answered for {seconds:g} seconds")
    assert len(line) <= 200 + len(where)
    assert not stopped.is_running()


def test_one_that_hangs_is_named_and_the_same_command_goes_on(bench: Workbench, uninterrupted: Ended) -> None:
    recipe = bench.recipe("hanging")
    environment = write_fault(bench.root / "quick-beats", "trainkit.training.heartbeats", QUICK_BEATS)
    started = bench.start(recipe, "two-ddp", environment=environment)
    started.wait_for_step(random.randint(5, 12))
    rank = random.randint(0, 1)
    stopped = started.workers()[rank]
    stopped.suspend()
    ended = end_soon(started, time.monotonic())
    assert_named(ended, rank, stopped, 3)
    assert_comes_to(bench.run(recipe, "two-ddp"), uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "rank"), [("two-ddp", 0), ("two-fsdp2", 1), ("four-ddp", 2)])
def test_one_that_hangs_is_named_within_two_minutes(
    bench: Workbench, uninterrupted: Ended, kind: str, rank: int
) -> None:
    recipe = bench.recipe(f"hanging-{kind}")
    started = bench.start(recipe, kind)
    started.wait_for_step(random.randint(5, 12))
    stopped = started.workers()[rank]
    stopped.suspend()
    sent = time.monotonic()
    ended = started.end()
    print(f"{recipe.stem}: ended after {time.monotonic() - sent:.1f} s")
    assert time.monotonic() - sent < NAMED_WITHIN_SECONDS
    assert_named(ended, rank, stopped, 90)
    assert_comes_to(bench.run(recipe, kind), uninterrupted)


@pytest.mark.long
def test_when_all_are_stopped_for_a_while_nobody_is_blamed(bench: Workbench, uninterrupted: Ended) -> None:
    """As a batch system suspends a job, or a laptop sleeps."""
    recipe = bench.recipe("suspended")
    environment = write_fault(bench.root / "quick-beats-suspended", "trainkit.training.heartbeats", QUICK_BEATS)
    started = bench.start(recipe, "two-ddp", environment=environment)
    started.wait_for_step(4)
    for worker in started.workers():
        worker.suspend()
    time.sleep(8)
    for worker in started.workers():
        worker.resume()
    ended = started.end()
    assert ended.code == 0, ended.said
    assert ended.error_lines() == []
    assert largest_difference(ended, uninterrupted) <= ALMOST


@pytest.mark.long
def test_torchrun_is_not_held_up_by_one_that_hangs(bench: Workbench, uninterrupted: Ended) -> None:
    recipe = bench.recipe("hanging-torchrun")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainkit")
    environment = write_fault(bench.root / "quick-beats-torchrun", "trainkit.training.heartbeats", QUICK_BEATS)
    started = bench.start(recipe, program=torchrun, environment=environment)
    started.wait_for_step(6)
    stopped = started.workers()[1]
    stopped.suspend()
    ended = end_soon(started, time.monotonic())
    assert ended.code != 0
    [line] = ended.error_lines()
    assert line.startswith(f"error: process 1 (pid {stopped.pid} on ")
    assert_comes_to(bench.run(recipe, "two-ddp"), uninterrupted)


def test_one_fails_and_its_message_stands_there_once(bench: Workbench) -> None:
    failing = FAILS_IN_ONE.format(statement="from trainkit.errors import DataError; raise DataError('row 7: is odd')")
    environment = write_fault(bench.root / "odd-row", "trainkit.training.loop", failing)
    begun = time.monotonic()
    started = bench.start(bench.recipe("odd-row-run"), "two-ddp", environment=environment)
    started.wait_for_step(5)
    ended = end_soon(started, time.monotonic())
    assert ended.code == 3, ended.said
    [line] = ended.error_lines()
    newest = ended.folder / "checkpoints" / "step-000004"
    assert line == f"error: row 7: is odd. Newest good checkpoint: {newest}"
    assert "another process" not in ended.said
    assert time.monotonic() - begun < SOON_SECONDS + 60


@pytest.mark.long
def test_a_bug_in_one_is_told_once_with_its_report(bench: Workbench) -> None:
    failing = FAILS_IN_ONE.format(statement="raise ValueError('a mistake')")
    environment = write_fault(bench.root / "bug", "trainkit.training.loop", failing)
    ended = bench.run(bench.recipe("bug-run"), "two-fsdp2", environment=environment)
    assert ended.code == 1, ended.said
    [line] = ended.error_lines()
    assert line.startswith("error: this is a bug of trainkit (ValueError: a mistake); please report it with ")
    assert "ValueError: a mistake" in (ended.folder / "crash.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["two-ddp", "two-fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed_while_it_saves(bench: Workbench, uninterrupted: Ended, kind: str, rank: int) -> None:
    if kind == "two-ddp" and rank == 1:
        pytest.skip("with whole models the first process saves for all")
    recipe = bench.recipe(f"killed-saving-{kind}-{rank}")
    environment = write_fault(
        bench.root / f"fault-saving-{kind}-{rank}", "trainkit.training.saving", KILLED_WHILE_SAVING.format(rank=rank)
    )
    started = bench.start(recipe, kind, environment=environment)
    started.wait_for_step(8)
    killed = end_soon(started, time.monotonic())
    assert killed.code == 75, killed.said
    [line] = killed.error_lines()
    assert line.startswith(f"error: process {rank} was killed (SIGKILL)")
    assert not (killed.folder / "checkpoints" / "step-000008").exists()
    ended = bench.run(recipe, kind)
    assert_comes_to(ended, uninterrupted)
    assert_nothing_unfinished(ended.folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["two-ddp", "two-fsdp2"])
def test_killed_at_random_moments_it_comes_to_the_same_curve(bench: Workbench, uninterrupted: Ended, kind: str) -> None:
    """Any moment from the first second on: while it loads, meets, trains, evaluates, saves, writes the result."""
    recipe = bench.recipe(f"killed-often-{kind}")
    for _ in range(4):
        started = bench.start(recipe, kind)
        started.wait_for(lambda started=started: len(started.workers()) == 2)  # type: ignore[misc]
        begun, delay, rank = time.monotonic(), random.uniform(0, 20), random.randint(0, 1)
        started.wait_for(lambda begun=begun, delay=delay: time.monotonic() - begun > delay)  # type: ignore[misc]
        workers = started.workers()
        if len(workers) < 2:
            started.end()
            continue
        workers[rank].kill()
        ended = end_soon(started, time.monotonic())
        if ended.code == 0:  # it had done its part
            break
        assert ended.code == 75, ended.said
        [line] = ended.error_lines()
        assert line.startswith(f"error: process {rank} was killed (SIGKILL)")
    ended = bench.run(recipe, kind)
    assert ended.code == 0, ended.said
    assert largest_difference(ended, uninterrupted) <= ALMOST


@pytest.mark.long
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGTERM, signal.SIGHUP, signal.SIGTERM), 75),
        ((signal.SIGINT, signal.SIGTERM), 130),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGTERM), 75),
        ((signal.SIGQUIT,), 75),
    ],
    ids=lambda value: "-".join(one.name for one in value) if isinstance(value, tuple) else None,
)
def test_the_first_signal_to_the_launcher_counts(
    bench: Workbench, numbers: tuple[signal.Signals, ...], code: int
) -> None:
    """While the processes save, as long as they need."""
    name = "-".join(one.name for one in numbers)
    shorter = SLOW_STEP.replace("sleep(60)", "sleep(5)")
    environment = write_fault(bench.root / f"slow-{name}", "trainkit.training.loop", shorter)
    started = bench.start(bench.recipe(f"signals-{name}"), "two-ddp", environment=environment)
    started.wait_for_step(12)
    time.sleep(1)
    workers = started.workers()
    for number in numbers:
        started.send(number)
        time.sleep(0.5)
    ended = started.end()
    assert ended.code == code, ended.said
    [line] = ended.error_lines()
    assert line.startswith(f"error: {numbers[0].name} after step ")
    assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["two-ddp", "two-fsdp2"])
def test_ctrl_c_saves_and_a_second_one_does_not_wait(bench: Workbench, uninterrupted: Ended, kind: str) -> None:
    recipe = bench.recipe(f"ctrl-c-{kind}")
    started = bench.start(recipe, kind)
    started.wait_for_step(6)
    started.press_ctrl_c()
    stopped = end_soon(started, time.monotonic())
    assert stopped.code == 130, stopped.said
    assert stopped.errors.count("SIGINT received: saving") == 1
    [line] = stopped.error_lines()
    assert line.startswith("error: SIGINT after step ")

    environment = write_fault(bench.root / f"slow-{kind}", "trainkit.training.loop", SLOW_STEP)
    started = bench.start(recipe, kind, environment=environment)
    started.wait_for_step(12)
    time.sleep(1)
    started.press_ctrl_c()
    time.sleep(2)
    started.press_ctrl_c()
    stopped = end_soon(started, time.monotonic())
    assert stopped.code == 130, stopped.said
    [line] = stopped.error_lines()
    assert line.startswith("error: SIGINT stopped the run at once: Newest good checkpoint: ")
    assert_comes_to(bench.run(recipe, kind), uninterrupted)


@pytest.mark.long
def test_saved_on_two_resumed_on_one_and_on_four_and_back(bench: Workbench, uninterrupted: Ended) -> None:
    recipe = bench.recipe("moving")
    moves = [(3, "two-fsdp2"), (6, None), (9, "four-fsdp2"), (12, "two-ddp"), (15, "two-fsdp2"), (18, "four-ddp")]
    for step, kind in moves:
        started = bench.start(recipe, kind)
        started.wait_for_step(step)
        started.send(signal.SIGTERM)
        stopped = started.end()
        assert stopped.code == 75, stopped.said
        [line] = stopped.error_lines()
        assert line.startswith("error: SIGTERM after step ")
    assert_comes_to(bench.run(recipe, "two-fsdp2"), uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_every_process_leaves_out_the_same_step_and_names_the_same_row(
    bench: Workbench, tiny_tokenizer: PreTrainedTokenizerBase, what: str
) -> None:
    """`training.not_finite: skip`; one example holds a letter of its own, by which its row is known."""
    spoiled = SPOILED.format(letter=tiny_tokenizer.convert_tokens_to_ids(ODD_LETTER), what=what)
    environment = write_fault(bench.root / f"spoiled-{what}", "trainkit.model.loss", spoiled)
    changes: dict[str, Any] = {"training": {"not_finite": "skip", "steps": None, "epochs": 1}}
    runs = [
        bench.run(bench.recipe(f"spoiled-{what}-{kind}", changes), kind, environment=environment)
        for kind in (None, "two-ddp", "two-fsdp2")
    ]
    for run in runs:
        assert run.code == 0, run.said
        [line] = [line for line in run.lines() if line.get("skipped")]
        if what == "loss" or "fsdp2" not in run.folder.name:  # there the gradient of one row is not looked at
            assert len(line["rows"]) == 1
            assert f"train.jsonl:{ODD_LINE}" in line["documents"]
        assert run.errors.count("no update (training.not_finite: skip)") == 1
    whole = [[line["trained_tokens"] for line in run.lines() if "loss" in line] for run in runs]
    assert whole[0] == whole[1] == whole[2]
    last = [run.lines()[-1]["eval_loss"] for run in runs]
    assert last == pytest.approx([last[0]] * 3, rel=ALMOST)


@pytest.mark.long
def test_every_process_leaves_out_the_same_spike(bench: Workbench, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """`training.loss_spike: skip`; judged after five losses, since the run is short."""
    spoiled = SPIKE.format(letter=tiny_tokenizer.convert_tokens_to_ids(ODD_LETTER))
    environment = write_fault(bench.root / "spike", "trainkit.training.loop", spoiled)
    changes: dict[str, Any] = {"training": {"loss_spike": "skip"}}
    runs = [
        bench.run(bench.recipe(f"spike-{kind}", changes), kind, environment=environment)
        for kind in (None, "two-ddp", "two-fsdp2")
    ]
    for run in runs:
        assert run.code == 0, run.said
        left_out = [line["step"] for line in run.lines() if line.get("skipped")]
        assert left_out
        assert left_out == [line["step"] for line in run.lines() if "spike" in line]
        assert run.errors.count("no update (training.loss_spike: skip)") == len(left_out)
        assert largest_difference(run, runs[0]) <= ALMOST
