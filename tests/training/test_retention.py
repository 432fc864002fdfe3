"""Which checkpoints stay: never fewer than the newest good one, and nothing of anybody else's is touched."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from trainkit.training import checkpoint
from trainkit.training.checkpoint import TrainingState, newest_checkpoint, problems_of, write_checkpoint
from trainkit.training.random_state import RandomState
from trainkit.training.retention import Retention, delete_oldest, retire_checkpoints

RUN = "0123456789abcdef"


def write(root: Path, step: int, run_id: str = RUN) -> Path:
    state = TrainingState(
        step=step,
        weights={"w": torch.full((4,), float(step))},
        optimizer={"state": {}, "param_groups": []},
        scaler=None,
        random=(RandomState({}, {}),),
        counters={},
        log_bytes={},
    )
    return write_checkpoint(root, run_id, state)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=2, best_step=2), newest_step=5)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]


def test_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    write(tmp_path, 6, "somebody-elses")
    (tmp_path / "step-000007").mkdir()
    (tmp_path / "step-000007" / "precious.txt").write_text("mine")
    elsewhere = tmp_path.with_name("elsewhere")
    write(tmp_path, 0).rename(elsewhere)
    (tmp_path / "step-000000").symlink_to(elsewhere)
    before = list(elsewhere.iterdir())
    (tmp_path / ".step-000009.0a1b2c3d.partial").mkdir()
    (tmp_path / ".step-000009.0a1b2c3d.partial" / "owner.json").write_text('{"run_id": "another", "step": 9}')
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=3)
    assert names(tmp_path) == [
        ".step-000009.0a1b2c3d.partial",
        "step-000000",
        "step-000003",
        "step-000006",
        "step-000007",
    ]
    assert list(elsewhere.iterdir()) == before


def test_a_file_that_somebody_put_into_a_checkpoint_stays(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "notes.txt").write_text("the good one")
    write(tmp_path, 2)
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=2)
    assert names(tmp_path / "step-000001") == ["notes.txt"]
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_damaged_later_one_does_not_count_as_kept(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (write(tmp_path, 4) / "weights.safetensors").write_bytes(b"")
    write(tmp_path, 3)
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=3)
    assert names(tmp_path) == ["step-000003", "step-000004"]
    assert newest_checkpoint(tmp_path, RUN)[0] == tmp_path / "step-000003"


def test_what_a_kill_left_goes_with_the_next_retention(tmp_path: Path) -> None:
    staging = tmp_path / ".step-000006.0a1b2c3d.partial"
    staging.mkdir()
    (tmp_path / ".step-000006.0a1b2c3e.partial").mkdir()
    (staging / "owner.json").write_text(json.dumps({"run_id": RUN, "step": 6}))
    (staging / "weights.safetensors").write_bytes(b"half")
    write(tmp_path, 7)
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=7)
    assert names(tmp_path) == ["step-000007"]


class Killed(BaseException):
    """What stands for a kill: nothing in trainkit expects it."""


@pytest.mark.parametrize("moment", range(8))
def test_killed_in_the_middle_of_a_deletion(tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of file operations the newest one is good, and the next retention tidies up."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    done = 0

    def counted(real: object) -> object:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal done
            if done == moment:
                raise Killed
            done += 1
            return real(*arguments, **keywords)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir", "rename"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        with pytest.raises(Killed):
            retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=3)
    assert newest_checkpoint(tmp_path, RUN) == (tmp_path / "step-000003", [])
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=3)
    assert names(tmp_path) == ["step-000003"]


def test_room_is_made_from_the_oldest_and_never_from_the_newest_or_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    gone = []
    while (folder := delete_oldest(tmp_path, RUN, Retention(keep_last=3, best_step=2), newest_step=5)) is not None:
        gone.append(folder.name)
    assert gone == ["step-000001", "step-000003"]
    assert names(tmp_path) == ["step-000002", "step-000004"]


@pytest.mark.parametrize("seed", range(50))
def test_any_layout_keeps_what_is_to_be_kept(tmp_path: Path, seed: int) -> None:
    any_layout(tmp_path, seed)


@pytest.mark.long
def test_a_thousand_layouts(tmp_path: Path) -> None:
    for seed in range(50, 1050):
        any_layout(tmp_path / str(seed), seed)


def any_layout(root: Path, seed: int) -> None:
    """Good, damaged, foreign, half-deleted and unrelated things in one folder."""
    draw = random.Random(seed)
    root.mkdir(exist_ok=True)
    foreign: dict[Path, bytes] = {}
    good: list[int] = []
    for step in draw.sample(range(1, 30), draw.randint(1, 12)):
        kind = draw.choice(["good", "good", "damaged", "foreign", "unrelated", "retired", "noted"])
        folder = write(root, step, "another" if kind == "foreign" else RUN)
        if kind in {"good", "noted"}:
            good.append(step)
        if kind == "noted":
            (folder / "notes.txt").write_text("mine")
            foreign[folder / "notes.txt"] = b"mine"
        elif kind == "damaged":
            name = draw.choice(["weights.safetensors", "manifest.json", "owner.json"])
            (folder / name).write_bytes(draw.randbytes(draw.randint(0, 40)))
        elif kind == "foreign":
            foreign |= {path: path.read_bytes() for path in folder.iterdir()}
        elif kind == "unrelated":
            for path in list(folder.iterdir()):
                path.unlink()
            (folder / "owner.json").write_text(draw.choice(["", "[]", '{"run_id": "another"}', "null", "\x00"]))
            foreign[folder / "owner.json"] = (folder / "owner.json").read_bytes()
        elif kind == "retired":
            (folder / "manifest.json").rename(folder / "retired.json")
    newest = draw.randint(1, 31)
    write(root, newest)
    foreign = {path: content for path, content in foreign.items() if path.parent.name != f"step-{newest:06d}"}
    best, keep_last = draw.choice([None, *good]), draw.randint(1, 4)
    retire_checkpoints(root, RUN, Retention(keep_last, best), newest)
    assert {path: path.read_bytes() for path in foreign} == foreign
    kept = {*sorted({s for s in good if s <= newest} | {newest})[-keep_last:], newest} | ({best} - {None})
    kept |= {step for step in good if step > newest}
    whole = {step for step in {*good, newest} if problems_of(root / checkpoint.step_name(step), RUN) is None}
    assert whole == kept


def test_a_save_killed_before_its_owner_was_written_is_known_by_how_little_it_holds(tmp_path: Path) -> None:
    whole = json.dumps({"run_id": RUN, "step": 6}, indent=2) + "\n"
    foreign = json.dumps({"run_id": "another", "step": 6}, indent=2) + "\n"
    for index, owner in enumerate(["", whole[:7], foreign[:30], foreign]):
        (tmp_path / f".step-000006.0a1b2c3{index}.partial").mkdir()
        (tmp_path / f".step-000006.0a1b2c3{index}.partial" / "owner.json").write_text(owner)
    with_more = tmp_path / ".step-000006.0a1b2c3f.partial"
    with_more.mkdir()
    for name in ("owner.json", "notes.txt"):
        (with_more / name).touch()
    write(tmp_path, 7)
    retire_checkpoints(tmp_path, RUN, Retention(keep_last=1), newest_step=7)
    assert names(tmp_path) == [
        ".step-000006.0a1b2c32.partial",
        ".step-000006.0a1b2c33.partial",
        ".step-000006.0a1b2c3f.partial",
        "step-000007",
    ]
