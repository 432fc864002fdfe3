from __future__ import annotations

import errno
import json
import random
import resource
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.errors import MachineError
from trainkit.training import checkpoint
from trainkit.training.checkpoint import (
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    problems_of,
    retire_checkpoints,
    save_checkpoint,
)
from trainkit.training.random_state import capture_random_state, restore_random_state, seed_everything

RUN = "0123456789abcdef"


def state_at(step: int) -> TrainingState:
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return TrainingState(
        step=step,
        weights={name: weight.detach() for name, weight in model.named_parameters()},
        optimizer=optimizer.state_dict(),
        scaler={"scale": 1024.0, "_growth_tracker": 3},
        random=capture_random_state(),
        counters={"step": step, "best_eval_loss": 0.1 + 0.2},
        log_bytes={"metrics": 17},
    )


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def test_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = state_at(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, RUN, state))
    assert_same(vars(state) | {"random": vars(state.random)}, vars(loaded) | {"random": vars(loaded.random)})


def test_an_optimizer_continues_from_it_as_if_nothing_had_happened(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, RUN, state_at(7)))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    optimizer.load_state_dict(dict(loaded.optimizer))
    assert_same(optimizer.state_dict(), loaded.optimizer)


def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, RUN, state_at(1))
    reference = tmp_path / "reference"
    reference.touch()
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode), path.name


def damage(folder: Path, how: str, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zero":
        path.write_bytes(bytes(len(content)))
    else:
        index = len(content) // 2
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])


FILES = [
    "owner.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["delete", "truncate", "zero", "flip a bit"])
def test_damage_is_found_named_and_the_earlier_one_is_taken(tmp_path: Path, how: str, name: str) -> None:
    older = save_checkpoint(tmp_path, RUN, state_at(1))
    damage(save_checkpoint(tmp_path, RUN, state_at(2)), how, name)
    found, skipped = newest_checkpoint(tmp_path, RUN)
    if how == "flip a bit" and name == "manifest.json":
        # One changed letter of the manifest is a wrong size, a wrong checksum or another key: never a good checkpoint.
        assert found == older
        return
    assert found == older
    assert len(skipped) == 1
    assert name in skipped[0]


def test_another_runs_checkpoint_is_never_taken_whatever_its_number(tmp_path: Path) -> None:
    ours = save_checkpoint(tmp_path, RUN, state_at(3))
    save_checkpoint(tmp_path, "somebody-elses", state_at(900))
    found, skipped = newest_checkpoint(tmp_path, RUN)
    assert found == ours
    assert skipped == ["step-000900 skipped: of another run"]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, RUN, state_at(3)).rename(tmp_path / "step-000004")
    assert newest_checkpoint(tmp_path, RUN)[0] is None


def test_none_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing", RUN) == (None, [])


def test_saving_the_same_step_again_keeps_the_good_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, RUN, state_at(5))
    before = (folder / "manifest.json").stat().st_ino
    save_checkpoint(tmp_path, RUN, state_at(5))
    assert (folder / "manifest.json").stat().st_ino == before
    (folder / "state.json").unlink()
    save_checkpoint(tmp_path, RUN, state_at(5))
    assert problems_of(folder, RUN) is None
    assert len(list(tmp_path.glob("step-000005.damaged-*"))) == 1


def test_a_full_disk_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, RUN, state_at(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(MachineError, match=r"disk is full.*earlier checkpoints are intact"):
        save_checkpoint(tmp_path, RUN, state_at(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_safetensors_cannot_write_is_the_machine_s_trouble(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, RUN, state_at(1))
    state = replace(state_at(2), weights={"large": torch.zeros(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a real failure of a real write
    try:
        with pytest.raises(MachineError, match=r"could not be saved: .*File too large.*earlier checkpoints are intact"):
            save_checkpoint(tmp_path, RUN, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_retiring_keeps_the_newest_and_the_best_and_what_is_not_ours(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, RUN, state_at(step))
    save_checkpoint(tmp_path, "somebody-elses", state_at(6))
    (tmp_path / "step-000007").mkdir()
    (tmp_path / "step-000007" / "precious.txt").write_text("mine")
    unfinished = tmp_path / ".step-000006.0a1b2c3d.partial"
    unfinished.mkdir()
    (unfinished / "owner.json").write_text(json.dumps({"run_id": RUN, "step": 6}))
    foreign = tmp_path / ".step-000009.0a1b2c3d.partial"
    foreign.mkdir()
    retire_checkpoints(tmp_path, RUN, keep_last=2, best_step=2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [
        ".step-000009.0a1b2c3d.partial",
        "step-000002",
        "step-000004",
        "step-000005",
        "step-000006",
        "step-000007",
    ]


def test_every_generator_continues_where_it_stood() -> None:
    seed_everything(5)
    state = capture_random_state()
    first = (random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist())  # noqa: NPY002
    restore_random_state(state)
    again = (random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist())  # noqa: NPY002
    assert first == again
