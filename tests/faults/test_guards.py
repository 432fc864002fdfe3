"""A run that goes wrong says so, names the step and the rows, and saves nothing that is spoiled."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import types
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from trainkit.cli import run
from trainkit.memory.fit import Fit
from trainkit.model.loss import LossModel
from trainkit.training import loop
from trainkit.training.step import _counts_over_all_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Said = pytest.CaptureFixture[str]
SENTENCES = ["the quick brown fox", "jumps over a lazy dog", "and what is it then", "it is the end"]
POISONED_LINE = 8
SURPRISING_LINE = 13
POISON, SURPRISE = "Z", "Y"  # letters of no other example: single tokens, by which their rows are known


@dataclass(frozen=True)
class Room:
    """A recipe over 24 examples, each a row of its own, 4 to a step; lines 8 and 13 hold a letter of their own."""

    recipe: dict[str, Any]
    folder: Path
    poison: int
    surprise: int
    monkeypatch: pytest.MonkeyPatch

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def fine_tune(self, *arguments: str, output_dir: str = "run") -> int:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe | {"output_dir": output_dir}))
        return run(["fine-tune", str(path), *arguments])

    def in_training(self, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Give every loss that is trained on, and the rows' tokens, to `change`."""
        really = LossModel.forward

        def forward(
            model: LossModel, ids_RT: torch.Tensor, labels_RT: torch.Tensor, positions_RT: torch.Tensor, lengths: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            loss, count = really(model, ids_RT, labels_RT, positions_RT, lengths)
            return (change(loss, ids_RT) if model.training else loss), count

        self.monkeypatch.setattr(LossModel, "forward", forward)

    def poison_loss(self, value: float) -> None:
        """Make the loss of the poisoned row `value`."""
        self.in_training(lambda loss, ids_RT: loss * value if bool((ids_RT == self.poison).any()) else loss)

    def poison_gradient(self) -> None:
        """Leave the loss of the poisoned row alone, and make its gradient infinite."""

        def change(loss: torch.Tensor, ids_RT: torch.Tensor) -> torch.Tensor:
            if bool((ids_RT == self.poison).any()) and loss.requires_grad:
                hook: Any = loss.register_hook
                hook(lambda gradient: gradient * math.inf)
            return loss

        self.in_training(change)

    def at_step(self, step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Give the loss of one step to `change`; a step is one micro-batch here, and one more goes before the first."""
        calls = iter(range(10**6))
        self.in_training(lambda loss, _: change(loss) if next(calls) == step else loss)

    def metrics(self, name: str = "run") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without what a clock put there."""
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if "second" not in key} for line in lines]

    def steps_saved(self) -> list[str]:
        return sorted(path.name for path in (self.run_folder / "checkpoints").glob("step-*"))


@pytest.fixture
def room(
    small_recipe: dict[str, Any],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Room:
    lines = []
    for number in range(1, 25):
        letter = {POISONED_LINE: POISON, SURPRISING_LINE: SURPRISE}.get(number, "")
        answer = f"{SENTENCES[number % 4]} {letter}".strip()
        turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    small_recipe["data"] = {"train": "train.jsonl"}
    small_recipe["adapter"]["dropout"] = 0.1
    small_recipe["packing"] = {"sequence_length": 64, "overlap": 8, "strategy": "none"}
    small_recipe["training"] = {"steps": 12, "tokens_per_step": 256, "micro_batch_size": 4, "learning_rate": 1e-3}
    small_recipe["checkpoints"] = {"every_steps": 1, "keep_last": 20}
    del small_recipe["evaluation"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    # What a step takes is not asked here; that it is asked has tests of its own.
    monkeypatch.setattr("trainkit.commands.fine_tune.fit", lambda *_: Fit(4, None, ()))
    poison, surprise = tiny_tokenizer.convert_tokens_to_ids([POISON, SURPRISE])
    return Room(small_recipe, tmp_path, poison, surprise, monkeypatch)


def only_error(capfd: Said) -> str:
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    (line,) = (line for line in said.err.splitlines() if line.startswith("error: "))
    return line


def everything_saved_is_finite(folder: Path) -> bool:
    files = list(folder.rglob("*.safetensors"))
    assert files
    return all(bool(torch.isfinite(one).all()) for path in files for one in load_file(path).values())


# --- not finite: stop


@pytest.mark.parametrize("what", ["the loss is nan", "the loss is inf", "the gradient's norm is (nan|inf)"])
def test_the_step_and_the_row_that_is_not_finite_are_named(room: Room, capfd: Said, what: str) -> None:
    if "loss" in what:
        room.poison_loss(math.nan if "nan" in what else math.inf)
    else:
        room.poison_gradient()
    assert room.fine_tune() == 7
    line = only_error(capfd)
    found = re.match(
        rf"error: step (\d+): {what} before the update, in row \d+ \(train\.jsonl:{POISONED_LINE}\); look at them, or "
        r"set training\.not_finite: skip\. (.*)$",
        line,
    )
    assert found, line
    step = int(found.group(1))
    assert found.group(3 if "|" in what else 2).endswith(
        f"step-{step - 1:06d}" if step > 1 else "No checkpoint was saved yet"
    )
    assert [one["step"] for one in room.metrics()] == list(range(1, step))
    assert step == 1 or everything_saved_is_finite(room.run_folder)
    assert not (room.run_folder / "final").exists()


def test_a_row_that_is_mended_lets_the_run_go_on_to_the_same_bits(room: Room, capfd: Said) -> None:
    """What the search for the row drew and computed leaves no trace: dropout goes on where it was."""
    assert room.fine_tune(output_dir="whole") == 0
    with room.monkeypatch.context() as patch:
        replace(room, monkeypatch=patch).poison_loss(math.nan)
        assert room.fine_tune() == 7
    assert room.fine_tune() == 0
    assert room.metrics() == room.metrics("whole")
    assert same_weights(room.folder / "whole", room.run_folder)


def same_weights(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_where_every_row_is_not_finite_the_learning_rate_is_to_blame(room: Room, capfd: Said) -> None:
    room.in_training(lambda loss, _: loss * math.nan)
    assert room.fine_tune() == 7
    assert re.match(
        r"error: step 1: the loss is nan before the update, in each of its 4 rows \(train\.jsonl:\d+, .* and 1 more\); "
        r"lower training\.learning_rate\. No checkpoint was saved yet$",
        only_error(capfd),
    )


def test_what_no_row_does_alone_is_said_to_be_of_all(room: Room, capfd: Said) -> None:
    room.at_step(3, lambda loss: loss * math.nan)
    assert room.fine_tune() == 7
    assert re.match(
        r"error: step 3: the loss is nan before the update, in no single one of its 4 rows, only in all together",
        only_error(capfd),
    )


def spoil_a_weight(room: Room, at_update: int, value: float) -> None:
    """Let one update leave a weight that is not finite, as an overflow in the optimizer would."""
    really, calls = torch.optim.AdamW.step, iter(range(1, 10**6))

    def spoiled(optimizer: torch.optim.AdamW, closure: None = None) -> None:
        really(optimizer)
        if next(calls) == at_update:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].view(-1)[3] = value

    room.monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_an_update_spoiled_is_never_saved(room: Room, capfd: Said, value: float) -> None:
    spoil_a_weight(room, 3, value)
    assert room.fine_tune() == 7
    line = only_error(capfd)
    assert re.match(r"error: after step 3: `.*lora_A.*` is not finite, so this state was not saved; lower", line), line
    assert line.endswith("step-000002")
    assert room.steps_saved() == ["step-000001", "step-000002"]
    assert everything_saved_is_finite(room.run_folder)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_spoiled_weight_that_is_not_yet_to_be_saved_is_named_by_the_next_step(
    room: Room, capfd: Said, policy: str
) -> None:
    """Leaving updates out would not help: the weight stays as it is."""
    room.recipe["checkpoints"]["every_steps"] = 2
    room.recipe["training"]["not_finite"] = policy
    spoil_a_weight(room, 3, math.nan)
    assert room.fine_tune() == 7
    line = only_error(capfd)
    assert re.match(
        r"error: step 4: the loss is nan, and so is the weight `.*lora_A.*` since an earlier update; lower training\.",
        line,
    ), line
    assert room.steps_saved() == ["step-000002"]


def test_the_last_update_is_looked_at_too(room: Room, capfd: Said) -> None:
    room.recipe["checkpoints"]["every_steps"] = None
    spoil_a_weight(room, 12, math.inf)
    assert room.fine_tune() == 7
    assert re.match(r"error: after step 12: the loss is nan; lower training\.learning_rate", only_error(capfd))
    assert not list(room.run_folder.rglob("*.safetensors"))


# --- not finite: skip


def test_a_step_that_is_not_finite_is_left_out_and_counted(room: Room, capfd: Said) -> None:
    room.recipe["training"] |= {"not_finite": "skip", "steps": None, "epochs": 1}
    room.poison_loss(math.nan)
    assert room.fine_tune("--json") == 0
    out, err = capfd.readouterr()
    summary = json.loads(out)
    (skipped,) = (line for line in room.metrics() if line.get("skipped"))
    where = rf"the loss is nan before the update, in row \d+ \(train\.jsonl:{POISONED_LINE}\)"
    assert re.search(rf"^step {skipped['step']}: {where}; no update \(training\.not_finite: skip\)$", err, re.MULTILINE)
    assert re.fullmatch(where, skipped["fault"])
    assert skipped["documents"] == f"train.jsonl:{POISONED_LINE}"
    assert skipped["loss"] is None
    assert skipped["not_finite"]["loss"] == "nan"
    assert len(skipped["rows"]) == 1
    assert (summary["steps"], summary["updates"], summary["skipped"]) == (6, 5, 1)
    assert summary["skipped_tokens"] == skipped["trained_tokens"] > 0
    assert summary["trained_tokens"] + summary["skipped_tokens"] == summary["ledger"]["trained_targets"]
    assert f"1 of 6 steps had no update; {skipped['trained_tokens']:,} tokens were seen and not trained" in err
    assert everything_saved_is_finite(room.run_folder)
    page = (room.run_folder / "report.html").read_text()
    assert "no update: the loss is nan before the update" in page
    assert f"train.jsonl:{POISONED_LINE}" in page


def test_a_step_that_was_left_out_moved_nothing(room: Room) -> None:
    room.recipe["training"] |= {"not_finite": "skip", "steps": 6}
    room.poison_gradient()
    assert room.fine_tune() == 0
    (at,) = (line["step"] for line in room.metrics() if line.get("skipped"))
    root = room.run_folder / "checkpoints"
    if at > 1:
        before, after = (load_file(root / f"step-{step:06d}" / "weights.safetensors") for step in (at - 1, at))
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def stopped_after(room: Room) -> Callable[[int], None]:
    """`stopped_after(step)` sends the next run a SIGTERM after that step."""

    def stop(step: int) -> None:
        def train(trainer: loop.Trainer, should_stop: Callable[[], bool]) -> Iterator[loop.StepReport]:
            for report in loop.train(trainer, should_stop):
                yield report
                if report.step == step:
                    signal.raise_signal(signal.SIGTERM)

        room.monkeypatch.setattr("trainkit.commands.fine_tune.train", train)

    return stop


def test_a_run_with_a_step_left_out_and_spikes_continues_to_the_same_bits(
    room: Room, stopped_after: Callable[[int], None], capfd: Said
) -> None:
    room.monkeypatch.setattr("trainkit.training.spikes.FEWEST", 1)
    room.monkeypatch.setattr("trainkit.training.faults.MOST_SHARE", 0.5)
    room.recipe["training"] |= {"not_finite": "skip", "steps": 10}
    room.poison_loss(math.nan)
    room.in_training(lambda loss, ids_RT: loss * 20 if bool((ids_RT == room.surprise).any()) else loss)
    assert room.fine_tune(output_dir="whole") == 0
    whole = room.metrics("whole")
    at = next(line["step"] for line in whole if line.get("skipped"))
    spikes = [line["step"] for line in whole if "spike" in line]
    assert spikes
    for step in sorted({at, spikes[0], 8}):
        stopped_after(step)
        assert room.fine_tune() == 75
    room.monkeypatch.setattr("trainkit.commands.fine_tune.train", loop.train)
    assert room.fine_tune() == 0
    assert room.metrics() == whole
    assert same_weights(room.folder / "whole", room.run_folder)


def test_too_many_steps_without_an_update_end_the_run(room: Room, capfd: Said) -> None:
    room.recipe["training"]["not_finite"] = "skip"
    room.in_training(lambda loss, ids_RT: loss * math.nan if len(ids_RT) > 1 else loss)
    assert room.fine_tune() == 7
    line = only_error(capfd)
    assert re.match(r"error: step 2: .*; 2 of 12 steps without an update, 1 may be; lower training\.", line), line
    assert line.endswith("step-000001")
    assert [one["step"] for one in room.metrics()] == [1]


# --- nothing moves


def test_a_step_without_a_token_to_train_is_an_error(room: Room, capfd: Said) -> None:
    steps = iter(range(1, 10**6))

    really = _counts_over_all_processes

    def counts(*given: Any) -> tuple[int, int]:
        return really(*given) if next(steps) < 3 else (0, 40)

    room.monkeypatch.setattr("trainkit.training.step._counts_over_all_processes", counts)
    assert room.fine_tune() == 3
    line = only_error(capfd)
    assert re.match(r"error: step 3: no trained token in a whole step \(rows: train\.jsonl:.* and 1 more\); ", line), (
        line
    )
    assert line.endswith("step-000002")


def test_a_run_whose_only_step_is_left_out_has_trained_nothing(room: Room, capfd: Said) -> None:
    room.recipe["training"] |= {"not_finite": "skip", "steps": 1}
    room.in_training(lambda loss, ids_RT: loss * math.nan if len(ids_RT) > 1 else loss)
    assert room.fine_tune() == 7
    assert "error: step 1: the run ends without a single update; nothing was trained. No checkpoint" in only_error(
        capfd
    )
    assert not (room.run_folder / "final").exists()


def test_a_learning_rate_that_fp32_rounds_away_is_no_training(room: Room, capfd: Said) -> None:
    """All but the embedding of padding, which is exactly zero and therefore moves: that is no training either."""
    del room.recipe["adapter"]
    room.recipe["training"] |= {"learning_rate": 1e-30, "optimizer": "sgd"}
    assert room.fine_tune() == 7
    line = only_error(capfd)
    assert re.match(
        r"error: step 5: 0\.\d% of the trained weights changed in 5 updates at learning rates up to 1e-30, `.*` "
        r"first; raise training\.learning_rate: fp32 rounds smaller changes away\. Newest good checkpoint: ",
        line,
    ), line


def test_a_run_shorter_than_that_is_looked_at_at_its_end(room: Room, capfd: Said) -> None:
    room.recipe["training"]["steps"] = 2
    room.monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    assert room.fine_tune() == 7
    assert re.match(r"error: step 2: 0\.0% of the trained weights changed in 2 updates", only_error(capfd))
    assert not (room.run_folder / "final").exists()


def test_a_gradient_of_zero_is_no_training_whatever_the_decay_moves(room: Room, capfd: Said) -> None:
    room.recipe["training"]["weight_decay"] = 0.1
    room.in_training(lambda loss, _: loss * 0 + 3.0)
    assert room.fine_tune() == 7
    assert re.match(r"error: step 5: the gradient was 0 in all of 5 updates: nothing is learned", only_error(capfd))


# --- spikes


def test_a_loss_spike_is_said_recorded_and_shown_with_its_rows(room: Room, capfd: Said) -> None:
    room.recipe["training"]["steps"] = 24
    room.recipe["checkpoints"]["every_steps"] = None
    room.at_step(22, lambda loss: loss * 20)
    assert room.fine_tune("--json") == 0
    out, err = capfd.readouterr()
    (line,) = (line for line in room.metrics() if "spike" in line)
    assert line["step"] == 22
    assert line["spike"] > 6
    assert len(line["rows"]) == 4
    assert re.fullmatch(r"train\.jsonl:\d+, train\.jsonl:\d+, train\.jsonl:\d+ and 1 more", line["documents"])
    (said,) = (text for text in err.splitlines() if "jumped to" in text)
    assert said == (
        f"step 22: the loss jumped to {line['loss']:.4g}, {line['spike']:.1f} standard deviations above the last ones; "
        f"rows: {line['documents']}"
    )
    assert json.loads(out)["spikes"] == 1
    assert f"loss {line['loss']:.4g}" in (page := (room.run_folder / "report.html").read_text())
    assert line["documents"] in page


def test_a_spike_is_left_out_where_the_recipe_says_so(room: Room, capfd: Said) -> None:
    room.recipe["training"] |= {"steps": 24, "loss_spike": "skip"}
    room.recipe["checkpoints"] |= {"every_steps": 1, "keep_last": 9}
    room.at_step(22, lambda loss: loss * 20)
    assert room.fine_tune("--json") == 0
    out, err = capfd.readouterr()
    summary = json.loads(out)
    (line,) = (line for line in room.metrics() if "spike" in line)
    assert line["step"] == 22
    assert line["skipped"]
    assert len(line["rows"]) == 4
    assert (summary["steps"], summary["updates"], summary["skipped"], summary["spikes"]) == (24, 23, 1, 1)
    assert summary["skipped_tokens"] == line["trained_tokens"] > 0
    (said,) = (text for text in err.splitlines() if "jumped to" in text)
    assert said.endswith(f"; rows: {line['documents']}; no update (training.loss_spike: skip)")
    root = room.run_folder / "checkpoints"
    before, left_out, after = (load_file(root / f"step-{step:06d}" / "weights.safetensors") for step in (21, 22, 23))
    assert all(torch.equal(before[name], left_out[name]) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert f"no update: loss {line['loss']:.4g}" in (room.run_folder / "report.html").read_text()


def test_a_run_with_spikes_left_out_continues_to_the_same_bits(
    room: Room, stopped_after: Callable[[int], None], capfd: Said
) -> None:
    room.monkeypatch.setattr("trainkit.training.spikes.FEWEST", 1)
    room.monkeypatch.setattr("trainkit.training.faults.MOST_SHARE", 0.9)
    room.recipe["training"] |= {"loss_spike": "skip", "steps": 10}
    room.in_training(lambda loss, ids_RT: loss * 20 if bool((ids_RT == room.surprise).any()) else loss)
    assert room.fine_tune(output_dir="whole") == 0
    whole = room.metrics("whole")
    left_out = [line["step"] for line in whole if line.get("skipped")]
    assert left_out == [line["step"] for line in whole if "spike" in line] != []
    for step in sorted({left_out[0] - 1, left_out[0], 8} - {0}):
        stopped_after(step)
        assert room.fine_tune() == 75
    room.monkeypatch.setattr("trainkit.commands.fine_tune.train", loop.train)
    assert room.fine_tune() == 0
    assert room.metrics() == whole
    assert same_weights(room.folder / "whole", room.run_folder)


def test_a_loss_that_stays_high_ends_the_run_in_which_spikes_are_left_out(room: Room, capfd: Said) -> None:
    room.recipe["training"] |= {"steps": 24, "loss_spike": "skip"}
    calls = count()
    room.in_training(lambda loss, _: loss * 20 if next(calls) >= 22 else loss)
    assert room.fine_tune() == 7
    line = only_error(capfd)
    where = r"train\.jsonl:\d+, train\.jsonl:\d+, train\.jsonl:\d+ and 1 more"
    assert re.match(
        rf"error: step 23: the loss jumped to [\d.]+, [\d.]+ standard deviations above the last ones "
        rf"\(rows: {where}\); "
        r"2 of 24 steps without an update, 1 may be; lower training\.learning_rate\. Newest good checkpoint: ",
        line,
    ), line


# --- out of memory


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_out_of_memory_says_what_was_held_and_what_to_change_and_saves_the_state(
    room: Room, capfd: Said, where: str
) -> None:
    def full(loss: torch.Tensor) -> torch.Tensor:
        if where == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss + torch.empty(2**50)  # beyond every address: what a real failure raises on a CPU

    room.recipe["checkpoints"]["every_steps"] = None
    with room.monkeypatch.context() as patch:
        replace(room, monkeypatch=patch).at_step(4, full)
        assert room.fine_tune() == 5
    line = only_error(capfd)
    assert re.match(
        r"error: after step 3 of 12: 4 rows of 64 tokens do not fit in the memory of cpu, which held [\d.,]+ [MG]iB "
        r"resident; a step was estimated at [\d.]+ MiB, with micro_batch_size: [12] it takes [\d.]+ MiB\. "
        r"Newest good checkpoint: .*/step-000003$",
        line,
    ), line
    assert room.fine_tune() == 0
    assert "continues after step 3" in capfd.readouterr().out


def test_weights_of_an_update_that_broke_off_are_not_saved(room: Room, capfd: Said) -> None:
    really, calls = torch.optim.AdamW.step, iter(range(1, 10**6))

    def broken_off(optimizer: torch.optim.AdamW, closure: None = None) -> None:
        really(optimizer)
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    room.recipe["checkpoints"]["every_steps"] = 2
    room.monkeypatch.setattr(torch.optim.AdamW, "step", broken_off)
    assert room.fine_tune() == 5
    line = only_error(capfd)
    assert line.startswith("error: after step 3 of 12: 4 rows of 64 tokens do not fit")
    assert line.endswith("step-000002")
    assert room.steps_saved() == ["step-000002"]


# --- what only looks on


def test_a_full_disk_under_the_metrics_ends_no_run_and_no_resume(
    room: Room, stopped_after: Callable[[int], None], capfd: Said
) -> None:
    really, room_left = os.pwrite, 900

    def write(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > room_left:
            raise OSError(28, "No space left on device")
        return really(descriptor, data, offset)

    room.monkeypatch.setattr("trainkit.training.metrics.os.pwrite", write)
    stopped_after(6)
    assert room.fine_tune() == 75
    assert room.fine_tune() == 0
    said = capfd.readouterr().err
    assert (
        said.count("metrics.jsonl: No space left on device; training goes on, this record has gaps") == 2
    )  # once a run
    recorded = [line["step"] for line in room.metrics()]
    assert recorded == list(range(1, len(recorded) + 1))
    assert 0 < len(recorded) < 6
    assert (room.run_folder / "report.html").is_file()


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_ends_no_run(room: Room, capfd: Said, fails: str) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("server gone")

    calls: dict[str, Any] = {"log": lambda *_, **__: None, "finish": lambda: None} | {fails: gone}
    tracker = types.ModuleType("wandb")
    tracker.__spec__ = types.SimpleNamespace(origin="here")  # type: ignore[assignment]
    vars(tracker).update(init=lambda **_: types.SimpleNamespace(**calls), Settings=dict)
    room.monkeypatch.setitem(sys.modules, "wandb", tracker)
    room.recipe["tracking"] = ["wandb"]
    assert room.fine_tune() == 0
    assert capfd.readouterr().err.count("warning: tracking: wandb failed at") == 1


def test_a_report_that_cannot_be_written_is_no_failed_run(room: Room, capfd: Said) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    room.monkeypatch.setattr("trainkit.commands.fine_tune.write_report", full)
    assert room.fine_tune() == 0
    assert "report.html: not written: [Errno 28] No space left on device" in capfd.readouterr().err
    assert json.loads((room.run_folder / "run.json").read_text())["finished"]


@pytest.mark.parametrize("damage", ["{\n", "{}\n", '{"step": "x", "exact_match": "y", "loss": "z"}\n', "\udcff\n"])
@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
def test_a_damaged_log_is_no_failed_run(
    room: Room, stopped_after: Callable[[int], None], capfd: Said, log: str, damage: str
) -> None:
    room.recipe["data"]["eval"] = 0.2
    room.recipe["evaluation"] = {"samples": 1, "exact_match": 1, "max_new_tokens": 2}
    stopped_after(6)
    assert room.fine_tune() == 75
    path = room.run_folder / log
    first, *others = path.read_bytes().splitlines(keepends=True)
    line = damage.encode("utf-8", "surrogateescape")
    path.write_bytes(b"".join([line[:-1].ljust(len(first) - 1) + b"\n", *others]))  # the length is known to be that
    capfd.readouterr()
    assert room.fine_tune() == 0
    said = capfd.readouterr().err
    if damage != "{}\n" or log == "samples.jsonl":
        assert log in said
        assert all(line.startswith("warning: ") for line in said.splitlines() if log in line)
    assert json.loads((room.run_folder / "run.json").read_text())["finished"]
    summary = json.loads((room.run_folder / "summary.json").read_text())
    assert ("exact_match_before" in summary) == (log == "samples.jsonl")


# --- the result


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_a_bit_that_flips_after_the_save_is_no_success(room: Room, capfd: Said, adapter: bool) -> None:
    if not adapter:
        del room.recipe["adapter"]
    from trainkit.model.export import verify_result

    def verify(folder: Path, *given: Any) -> tuple[str, ...]:
        flipped(next(folder.glob("*.safetensors")), -1)
        return verify_result(folder, *given)

    with room.monkeypatch.context() as patch:
        patch.setattr("trainkit.commands.fine_tune.verify_result", verify)
        assert room.fine_tune() == 4
    assert re.search(r"final: `.*` is not what the model holds; do not use it", only_error(capfd))
    assert not json.loads((room.run_folder / "run.json").read_text())["finished"]
    assert not (room.run_folder / "summary.json").exists()
    assert room.fine_tune() == 0  # made again from the last checkpoint


def test_a_tokenizer_that_changes_after_the_save_is_no_success(room: Room, capfd: Said) -> None:
    from trainkit.model.export import verify_result

    def verify(folder: Path, *given: Any) -> tuple[str, ...]:
        sentences = verify_result(folder, *given)
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"Z":', '"\\u00c0\\u00c0":', 1))
        return sentences

    room.monkeypatch.setattr("trainkit.commands.fine_tune.verify_result", verify)
    assert room.fine_tune() == 4
    assert re.search("final: the tokenizer's vocabulary is not what was used", only_error(capfd))
