from __future__ import annotations

import random
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.training import checkpoint
from trainkit.training.checkpoint import (
    SavingAbandoned,
    Share,
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    problems_of,
    staging_name,
    write_checkpoint,
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
        random=(capture_random_state(),),
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
    loaded = load_checkpoint(write_checkpoint(tmp_path, RUN, state))
    assert_same(dict(state.weights), dict(loaded.weights))
    assert_same(state.optimizer, loaded.optimizer_state())
    assert_same([vars(one) for one in state.random], [vars(one) for one in loaded.random])
    for name in ("step", "scaler", "counters", "log_bytes"):
        assert_same(getattr(state, name), getattr(loaded, name))


def test_an_optimizer_continues_from_it_as_if_nothing_had_happened(tmp_path: Path) -> None:
    loaded = load_checkpoint(write_checkpoint(tmp_path, RUN, state_at(7)))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    optimizer.load_state_dict(loaded.optimizer_state())
    assert_same(optimizer.state_dict(), loaded.optimizer_state())


def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, RUN, state_at(1))
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
    older = write_checkpoint(tmp_path, RUN, state_at(1))
    damage(write_checkpoint(tmp_path, RUN, state_at(2)), how, name)
    found, skipped = newest_checkpoint(tmp_path, RUN)
    assert found == older
    assert len(skipped) == 1
    assert name in skipped[0]


def test_another_runs_checkpoint_is_never_taken_whatever_its_number(tmp_path: Path) -> None:
    ours = write_checkpoint(tmp_path, RUN, state_at(3))
    write_checkpoint(tmp_path, "somebody-elses", state_at(900))
    found, skipped = newest_checkpoint(tmp_path, RUN)
    assert found == ours
    assert skipped == ["step-000900 skipped: of another run"]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RUN, state_at(3)).rename(tmp_path / "step-000004")
    assert newest_checkpoint(tmp_path, RUN)[0] is None


def test_none_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing", RUN) == (None, [])


def test_saving_the_same_step_again_keeps_the_good_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, RUN, state_at(5))
    before = (folder / "manifest.json").stat().st_ino
    write_checkpoint(tmp_path, RUN, state_at(5))
    assert (folder / "manifest.json").stat().st_ino == before
    (folder / "state.json").unlink()
    write_checkpoint(tmp_path, RUN, state_at(5))
    assert problems_of(folder, RUN) is None
    assert (tmp_path / "step-000005.aside-1").is_dir()


def test_told_to_stop_it_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SavingAbandoned):
        write_checkpoint(tmp_path, RUN, state_at(1), lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_what_has_the_name_is_put_aside_and_never_lost(tmp_path: Path) -> None:
    for content in ("mine", "mine too"):
        (tmp_path / "step-000003").mkdir()
        (tmp_path / "step-000003" / "notes.txt").write_text(content)
        write_checkpoint(tmp_path, RUN, state_at(3))
        assert problems_of(tmp_path / "step-000003", RUN) is None
        (tmp_path / "step-000003").rename(tmp_path / f"moved {content}")
    assert (tmp_path / "step-000003.aside-1" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "step-000003.aside-2" / "notes.txt").read_text() == "mine too"


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "", RUN, state_at(1))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert name == "manifest.json" or problems_of(folder, RUN) == f"{name} is a link"


def test_every_type_of_tensor_is_read_back_by_safetensors(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    weights = {str(one): torch.arange(5).to(one) for one in [*types, torch.int8, torch.uint8, torch.bool]}
    weights |= {"none": torch.zeros(0, 3), "number": torch.tensor(2.5), "strided": torch.arange(12.0).view(3, 4).T}
    loaded = load_checkpoint(write_checkpoint(tmp_path, RUN, replace(state_at(1), weights=weights)))
    assert_same(weights, dict(loaded.weights))


def shares_of(state: TrainingState, processes: int) -> list[TrainingState]:
    """The state as several processes hold it: every matrix is cut by rows, as torch cuts them."""
    shares = []
    for rank in range(processes):

        def part(tensor: torch.Tensor, rank: int = rank) -> torch.Tensor:
            most = -(-tensor.shape[0] // processes)
            return tensor[min(rank * most, tensor.shape[0]) :][:most]

        entries = state.optimizer["state"]
        cut = {index: {n: part(t) if t.ndim else t for n, t in entry.items()} for index, entry in entries.items()}
        first = {name: min(rank * -(-t.shape[0] // processes), t.shape[0]) for name, t in state.weights.items()}
        share = Share(
            rank=rank,
            processes=processes,
            weight_rows={name: (first[name], tensor.shape[0]) for name, tensor in state.weights.items()},
            optimizer_rows={
                f"{index}.{name}": (min(rank * -(-t.shape[0] // processes), t.shape[0]), t.shape[0])
                for index, entry in entries.items()
                for name, t in entry.items()
                if t.ndim
            },
        )
        weights = {name: part(tensor) for name, tensor in state.weights.items()}
        shares.append(replace(state, weights=weights, optimizer={**state.optimizer, "state": cut}, share=share))
    return shares


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_shares_of_several_processes_are_one_checkpoint(tmp_path: Path, processes: int) -> None:
    state = state_at(7)
    shares = shares_of(state, processes)
    staging = staging_name(tmp_path, RUN, 7)
    with ThreadPoolExecutor(processes) as pool:
        saved = [pool.submit(write_checkpoint, tmp_path, RUN, share, staging=staging) for share in reversed(shares)]
        folder = {future.result() for future in saved}.pop()
    assert problems_of(folder, RUN) is None
    loaded = load_checkpoint(folder)
    assert_same(dict(state.weights), dict(loaded.weights))
    assert_same(state.optimizer, loaded.optimizer_state())
    for name, weight in state.weights.items():
        for first in range(weight.shape[0] + 1):
            for behind in range(first, weight.shape[0] + 1):
                assert torch.equal(loaded.weights.read(name, first, behind), weight[first:behind])
    (folder / f"weights-00002-of-{processes:05d}.safetensors").unlink()
    assert problems_of(folder, RUN) == f"weights-00002-of-{processes:05d}.safetensors is missing"


def test_a_process_that_never_saves_its_share_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PART_SECONDS", 0.2)
    first, second = shares_of(state_at(7), 2)
    for share in (first, second):
        with pytest.raises(OSError, match="do all machines see this folder"):
            write_checkpoint(tmp_path, RUN, share, staging=staging_name(tmp_path, RUN, 7))
    assert list(tmp_path.iterdir()) == []


def test_every_generator_continues_where_it_stood() -> None:
    seed_everything(5)
    state = capture_random_state()
    first = (random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist())  # noqa: NPY002
    restore_random_state(state)
    again = (random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist())  # noqa: NPY002
    assert first == again


def test_what_an_optimizer_keeps_in_mappings_comes_back(tmp_path: Path) -> None:
    """bitsandbytes keeps its 8-bit tensors so."""
    entry = {"step": 3, "quantised": {"state1": torch.arange(4, dtype=torch.uint8), "scale": 0.5}}
    optimizer = {"state": {0: entry, 1: {}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    state = replace(state_at(1), optimizer=optimizer)
    copied = state.on_host().optimizer["state"][0]["quantised"]["state1"]
    assert copied.data_ptr() != entry["quantised"]["state1"].data_ptr()  # type: ignore[index]
    loaded = load_checkpoint(write_checkpoint(tmp_path, RUN, state)).optimizer_state()
    assert_same(loaded["state"][0], entry)
    assert loaded["param_groups"] == optimizer["param_groups"]
