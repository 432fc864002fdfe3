"""A run that is stopped, by whatever means, continues to the same bits. Real processes, real signals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from trainkit.cli import run
from trainkit.run_folder import RunFolder
from trainkit.training import loop
from trainkit.training.interruption import Interruption
from trainkit.training.run_record import read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainkit.training.loop import StepReport, Trainer

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(small_recipe: dict[str, Any]) -> dict[str, Any]:
    """What makes resuming hard: dropout, packing, accumulation, the middle of an epoch, evaluations in between."""
    small_recipe["adapter"]["dropout"] = 0.1
    small_recipe["training"] |= {"steps": 12, "tokens_per_step": 512, "micro_batch_size": 3}
    small_recipe["evaluation"] = {"every_steps": 4, "samples": 1, "max_new_tokens": 2}
    return small_recipe


def start(recipe: dict[str, Any], tmp_path: Path, name: str, *, output_dir: str | None = None) -> subprocess.Popen[str]:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": output_dir or str(tmp_path / name)}))
    return trainkit(["fine-tune", str(path)], tmp_path, cwd=tmp_path)


def trainkit(arguments: list[str], tmp_path: Path, *, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainkit", *arguments],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, "TRAINKIT_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output + errors


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock put there, and without the memory that the process happened to hold."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "second" not in key and "memory" not in key} for line in lines
    ]


def assert_same_run(left: Path, right: Path) -> None:
    assert metrics(left) == metrics(right)
    assert (left / "samples.jsonl").read_text() == (right / "samples.jsonl").read_text()
    for name in ("weights.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoints" / "step-000012" / name) for folder in (left, right))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    file, deadline = folder / "metrics.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and f'"step": {step},' in file.read_text():
            return
        time.sleep(0.002)


@pytest.fixture
def uninterrupted(recipe: dict[str, Any], tmp_path: Path) -> Path:
    code, said = finish(start(recipe, tmp_path, "uninterrupted"))
    assert code == 0, said
    return tmp_path / "uninterrupted"


def test_killed_three_times_and_stopped_once_it_ends_in_the_same_bits(
    recipe: dict[str, Any], tmp_path: Path, uninterrupted: Path
) -> None:
    for step in (1, 3, 7):  # before the first checkpoint, right after one, in the middle of an epoch
        process = start(recipe, tmp_path, "killed")
        wait_for_step(tmp_path / "killed", step, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    process = start(recipe, tmp_path, "killed")
    wait_for_step(tmp_path / "killed", 9, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "SIGTERM after step" in said
    assert "to continue: trainkit fine-tune" in said
    code, said = finish(start(recipe, tmp_path, "killed"))
    assert code == 0, said
    assert "continues after step" in said
    assert_same_run(uninterrupted, tmp_path / "killed")


def test_ctrl_c_saves_and_says_how_to_continue_from_anywhere(
    recipe: dict[str, Any], tmp_path: Path, uninterrupted: Path
) -> None:
    process = start(recipe, tmp_path, "stopped here", output_dir="stopped here")
    wait_for_step(tmp_path / "stopped here", 5, process)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert said.count("SIGINT received: saving") == 1
    last = said.strip().splitlines()[-1]
    assert len(last) < 400
    program, *arguments = shlex.split(last.partition("to continue: ")[2])
    assert program == "trainkit"
    (tmp_path / "elsewhere").mkdir()
    code, said = finish(trainkit(arguments, tmp_path, cwd=tmp_path / "elsewhere"))
    assert code == 0, said
    assert_same_run(uninterrupted, tmp_path / "stopped here")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_finished_run_is_left_alone(recipe: dict[str, Any], tmp_path: Path, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    code, said = finish(start(recipe, tmp_path, "uninterrupted"))
    assert code == 0
    assert "already finished" in said
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()} == before


def test_a_lost_result_is_made_again_from_the_last_checkpoint(
    recipe: dict[str, Any], tmp_path: Path, uninterrupted: Path
) -> None:
    """Never trained again, and never called finished where it is not there."""
    adapter = uninterrupted / "final" / "adapter_model.safetensors"
    weights, recorded = adapter.read_bytes(), metrics(uninterrupted)
    shutil.rmtree(uninterrupted / "final")
    (uninterrupted / "summary.json").unlink()
    code, said = finish(start(recipe, tmp_path, "uninterrupted"))
    assert code == 0, said
    assert "continues after step 12" in said
    assert adapter.read_bytes() == weights
    assert metrics(uninterrupted) == recorded
    assert (uninterrupted / "summary.json").is_file()

    shutil.rmtree(uninterrupted / "final")
    shutil.rmtree(uninterrupted / "checkpoints")
    code, said = finish(start(recipe, tmp_path, "uninterrupted"))
    assert code == 6, said
    assert "no checkpoint is left to make it from; --fresh trains anew" in said
    assert metrics(uninterrupted) == recorded


def test_fewer_samples_may_be_asked_for_when_a_run_is_continued(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["evaluation"] |= {"samples": 3}
    process = start(recipe, tmp_path, "stopped")
    wait_for_step(tmp_path / "stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    recipe["evaluation"] |= {"samples": 1}
    code, said = finish(start(recipe, tmp_path, "stopped"))
    assert code == 0, said
    assert said.count("  before  ") == said.count("  after   ") == 1


def test_a_second_ctrl_c_stops_at_once_and_says_what_is_saved(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stopped.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    saved = Path(recipe["output_dir"]) / "checkpoints" / "step-000002"

    def interrupted(trainer: Trainer, should_stop: Callable[[], bool]) -> Iterator[StepReport]:
        for report in loop.train(trainer, should_stop):
            yield report
            if report.step == 3:
                while not saved.exists():  # written beside training, and perhaps not yet done
                    time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("trainkit.commands.fine_tune.train", interrupted)
        assert run(["fine-tune", str(path)]) == 130
    assert "SIGINT stopped the run at once: Newest good checkpoint: " in (errors := capfd.readouterr().err)
    assert "step-000002" in errors
    assert run(["fine-tune", str(path)]) == 0
    assert "continues after step 2" in capfd.readouterr().out


def said_by(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(arguments)
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path, folder = tmp_path / "recipe.yaml", Path(small_recipe["output_dir"])
    small_recipe["training"] |= {"steps": 4, "lr_scheduler": "linear", "warmup_ratio": 0}
    path.write_text(yaml.safe_dump(small_recipe))
    assert said_by(["fine-tune", str(path)], capfd)[0] == 0
    weights = (folder / "final" / "adapter_model.safetensors").read_bytes()

    longer = ["fine-tune", str(path), "--set", "training.steps=6", "--set", "training.micro_batch_size=1"]
    code, said = said_by(longer, capfd)
    assert code == 0, said
    assert "changed: training.steps: 4 → 6" in said
    assert "changed: training.micro_batch_size: 4 → 1" in said
    rate = small_recipe["training"]["learning_rate"] / 3
    assert f"schedule of all 6 steps from here on: step 5 takes {rate:.3g} (before: none)" in said
    assert "continues after step 4" in said
    steps = [line["step"] for line in metrics(folder) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in metrics(folder) if "loss" in line][4] == pytest.approx(rate)
    assert (folder / "final" / "adapter_model.safetensors").read_bytes() != weights
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6

    (folder / "report.html").unlink()  # as where it could not be written
    code, said = said_by(longer, capfd)
    assert code == 0
    assert "already finished" in said
    assert (folder / "report.html").is_file()

    code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == 6
    assert "6 steps are done already, the recipe now ends after 4; ask for 6 or more" in said
    code, said = said_by([*longer, "--set", "training.seed=1"], capfd)
    assert code == 6
    assert "differs in training.seed: 42 → 1. " in said


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_continued_from(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path, folder = tmp_path / "recipe.yaml", Path(small_recipe["output_dir"])
    small_recipe["training"] |= {"steps": 4}
    small_recipe["checkpoints"] = {"every_steps": 1, "keep_last": 2, "keep_best": False}
    path.write_text(yaml.safe_dump(small_recipe))
    assert said_by(["fine-tune", str(path)], capfd)[0] == 0
    result = (folder / "final" / "adapter_model.safetensors").read_bytes()
    newest = folder / "checkpoints" / "step-000004"
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (folder / "summary.json").unlink()
    code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == 0, said
    assert "step-000004 skipped: weights.safetensors does not match its checksum" in said
    assert "continues after step 3" in said
    assert (folder / "final" / "adapter_model.safetensors").read_bytes() == result
    assert (folder / "checkpoints" / "step-000004.aside-1" / "weights.safetensors").read_bytes() == content


def test_a_run_folder_that_was_moved_is_named_with_what_continues_it(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path, folder, moved = tmp_path / "recipe.yaml", Path(small_recipe["output_dir"]), tmp_path / "moved here"
    path.write_text(yaml.safe_dump(small_recipe))
    code, said = said_by(["fine-tune", str(path)], capfd)
    assert (code, "not the run folder" in said) == (0, False)
    code, said = said_by(["fine-tune", str(folder / "recipe.yaml")], capfd)
    assert (code, "not the run folder" in said) == (0, False)
    folder.rename(moved)
    own = str(moved / "recipe.yaml")
    code, said = said_by(["fine-tune", own], capfd)
    assert code == 0
    warned = f"warning: output_dir: {folder}, not the run folder that {own} lies in; "
    [line] = (line for line in said.splitlines() if line.startswith(warned))
    assert (folder / "final").is_dir()
    options = shlex.split(line.removeprefix(warned).removesuffix(" continues that"))
    code, said = said_by(["fine-tune", own, *options], capfd)
    assert code == 0
    assert f"already finished, nothing to do: {moved}" in said
    assert "not the run folder" not in said


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_a_run_whose_checkpoints_are_lost_says_that_it_begins_anew(
    small_recipe: dict[str, Any],
    tmp_path: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path, folder = tmp_path / "recipe.yaml", RunFolder(Path(small_recipe["output_dir"]))
    path.write_text(yaml.safe_dump(small_recipe))
    code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == 0
    assert "begins anew" not in said
    record = read_record(folder)
    assert record is not None
    write_record(folder, replace(record, finished=False))  # as if interrupted
    logged = len(folder.metrics.read_text().splitlines())
    if how == "removed":
        shutil.rmtree(folder.checkpoints)
    for weights in folder.checkpoints.glob("*/weights.safetensors"):
        weights.write_bytes(b"")
    code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == 0, said
    place = f"{folder.checkpoints} ({logged} logged lines are dropped)"
    assert f"run        begins anew: no checkpoint to continue from in {place}" in said.splitlines()
    assert len(folder.metrics.read_text().splitlines()) == logged


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_at_once_with_its_code(
    small_recipe: dict[str, Any],
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe))

    def interrupted(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("trainkit.commands.fine_tune.prepare", interrupted)
    code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == (130 if number == signal.SIGINT else 75)
    assert f"error: {number.name} before training began or went on: nothing is lost" in said
    assert not Path(small_recipe["output_dir"]).exists()


def test_nohup_is_heeded() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(lambda _: None) as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_while_the_result_is_written_loses_nothing(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe))

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("trainkit.model.export.write_tokenizer", interrupted)
        code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == 75
    assert "SIGTERM while the result was written: training is done and saved" in said
    assert not any(entry.name.startswith(".final") for entry in Path(small_recipe["output_dir"]).iterdir())
    code, said = said_by(["fine-tune", str(path)], capfd)
    assert code == 0, said
    assert (Path(small_recipe["output_dir"]) / "final" / "adapter_model.safetensors").exists()
