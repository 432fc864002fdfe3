"""Whose run a folder holds: the lock, what counts as begun, what may differ, and that nothing of others is touched."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from trainkit.errors import CheckpointError, MachineError, UsageError
from trainkit.recipe.schema import Adapter, Checkpoints, Data, Evaluation, Model, Packing, Recipe, Source, Training
from trainkit.run_folder import RunFolder
from trainkit.training.run_record import (
    FORMAT,
    RunRecord,
    begin_run,
    check_continuation,
    check_output,
    continue_run,
    finish_run,
    has_begun,
    locked,
    put_aside,
    read_record,
    recipe_differences,
)

RECIPE = Recipe(
    model=Model(name="tiny"),
    adapter=Adapter(target_modules=("q_proj", "v_proj")),
    data=Data(train=(Source(path="train.jsonl"),)),
    training=Training(steps=4),
    output_dir="run",
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def begun(folder: RunFolder) -> RunRecord:
    folder.root.mkdir()
    return begin_run(folder, RECIPE, data_key="data", base_model="base", micro_batch_size=2)


# The folder


def test_a_folder_that_is_not_there_can_be_one_and_is_not_made(tmp_path: Path) -> None:
    assert check_output(str(tmp_path / "a" / "b")).root == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_one_with_a_lock_alone_can_be_one(folder: RunFolder) -> None:
    folder.root.mkdir()
    check_output(str(folder.root))
    folder.lock.touch()
    check_output(str(folder.root))


def test_a_folder_is_found_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/runs/a").root == tmp_path / "runs" / "a"


@pytest.mark.usefixtures("begun")
def test_a_folder_is_named_without_dots(tmp_path: Path) -> None:
    """`..` has no name of its own to be put aside under."""
    (tmp_path / "run" / "below").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"run_id": "a"}')
    folder = check_output(str(tmp_path / "run" / "below" / ".."))
    assert put_aside(folder) == tmp_path / "run.1"


def test_the_home_folder_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="output_dir: ~nobody-at-all/run cannot be used"):
        check_output("~nobody-at-all/run")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(MachineError, match="cannot be used"):
        check_output(str(tmp_path / "round" / "run"))


def test_what_cannot_be_put_aside_is_a_fault_of_the_machine() -> None:
    with pytest.raises(MachineError, match=r"/proc/self/fd cannot be put aside: .*; name a new folder"):
        put_aside(RunFolder(Path("/proc/self/fd")))


def test_a_folder_of_a_run_is_ours(folder: RunFolder) -> None:
    check_output(str(folder.root))


def test_a_folder_of_others_is_refused(folder: RunFolder) -> None:
    folder.root.mkdir()
    (folder.root / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and no run of trainkit's; name a new folder"):
        check_output(str(folder.root))


def test_a_file_and_a_folder_below_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file is a file; name a new folder"):
        check_output(str(tmp_path / "file"))
    with pytest.raises(MachineError, match=r"cannot be made: .*file is a file; name a new folder"):
        check_output(str(tmp_path / "file" / "a" / "b"))


@pytest.mark.parametrize("name", ["ledger.json", "summary.json", "report.html", "metrics.jsonl", "samples.jsonl"])
def test_a_folder_in_place_of_a_file_is_refused(folder: RunFolder, begun: RunRecord, name: str) -> None:
    assert begun
    (folder.root / name).mkdir()
    with pytest.raises(MachineError) as caught:
        check_output(str(folder.root))
    assert str(caught.value) == (
        f"{folder.root / name}: is a folder where a run writes a file; move it away, or name a new folder"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(
        MachineError, match=r"run cannot be written: Permission denied \(tried in .*locked\); name a new"
    ):
        check_output(str(tmp_path / "locked" / "run"))


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("exists", [True, False], ids=["there", "not there yet"])
def test_a_place_that_takes_no_files_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int, exists: bool
) -> None:
    """Permissions say nothing of a disk that is full or read-only, of a quota, of a server that maps root to nobody."""
    run = tmp_path / "run"
    if exists:
        run.mkdir()

    def fails(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    if operation == "write":

        class Refusing(io.FileIO):
            write = fails

        monkeypatch.setattr(Path, "open", lambda path, mode, **rest: Refusing(path, mode.replace("b", "")))
    else:
        owner = os if operation == "fsync" else Path
        monkeypatch.setattr(owner, operation, fails)
    with pytest.raises(MachineError) as raised:
        check_output(str(run))
    monkeypatch.undo()
    place = run if exists else tmp_path
    space = "free some space, or " if number in {errno.ENOSPC, errno.EDQUOT} else ""
    assert str(raised.value).endswith(
        f"run cannot be written: {os.strerror(number)} (tried in {place}); {space}name a new folder"
    )
    assert list(tmp_path.rglob("*")) == ([run] if exists else [])


def test_what_is_tried_with_is_not_taken_for_anothers_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process of the same run looks into the folder at that moment, or this one is killed then."""
    folder.root.mkdir()
    for moment in ("rename", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, moment, lambda *_, **__: sys.exit("killed"))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with suppress(SystemExit):
                check_output(str(folder.root))
        assert list(folder.root.iterdir())
        check_output(str(folder.root))
        begin_run(folder, RECIPE, data_key="data", base_model="base", micro_batch_size=2)
        assert {path.name for path in folder.root.iterdir()} == {"run.json", "recipe.yaml"}
        for path in folder.root.iterdir():
            path.unlink()


# The lock


def test_the_lock_keeps_a_second_one_out_and_is_let_go(folder: RunFolder) -> None:
    with locked(folder):
        folder.metrics.touch()
        with pytest.raises(UsageError, match="another trainkit process is running"), locked(folder):
            pass
    with locked(folder):
        pass


def test_the_lock_of_a_killed_process_is_gone(folder: RunFolder) -> None:
    folder.root.mkdir()
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(folder.lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError), locked(folder):
            pass
        process.kill()
    with locked(folder):
        pass


def test_a_refusal_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no"), locked(RunFolder(tmp_path / "a" / "b")):
        raise UsageError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(folder: RunFolder) -> None:
    folder.root.mkdir()
    with locked(folder):
        pass
    assert folder.root.is_dir()


def test_what_was_written_under_the_lock_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    with locked(folder):
        folder.metrics.write_text("{}\n")
    assert folder.metrics.read_text() == "{}\n"


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(MachineError, match="cannot be made: Not a directory; name a new folder"),
        locked(RunFolder(tmp_path / "file" / "run")),
    ):
        pass


# The record


def test_a_record_is_read_as_it_was_written(folder: RunFolder, begun: RunRecord) -> None:
    assert read_record(folder) == begun
    assert begun == RunRecord(begun.run_id, "data", "base", 2, finished=False, format=FORMAT)
    assert finish_run(folder, begun) == replace(begun, finished=True) == read_record(folder)


def test_two_runs_have_two_ids(folder: RunFolder, begun: RunRecord) -> None:
    assert begin_run(folder, RECIPE, data_key="d", base_model="b", micro_batch_size=1).run_id != begun.run_id


def test_no_record_is_none(folder: RunFolder) -> None:
    assert read_record(folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "new": 2}', "\udcff"])
def test_a_damaged_record_is_named(folder: RunFolder, content: str) -> None:
    folder.root.mkdir()
    folder.marker.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"run\.json: damaged \(\w+\); --fresh begins anew"):
        read_record(folder)


def test_a_record_of_another_format_is_named(folder: RunFolder, begun: RunRecord) -> None:
    folder.marker.write_text(json.dumps({**vars(begun), "format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}, this trainkit reads {FORMAT}; .* --fresh"):
        read_record(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"missing; restore it, or --fresh begins anew$"),
        ("", r"damaged \(1:1: the recipe is empty; .*\); restore it, or --fresh begins anew$"),
        ("model: {", r"damaged \(\d+:.*\); restore it, or --fresh begins anew$"),
        ("no_such_key: 1\n", r"damaged \(1:1: no_such_key: .*\); restore it, or --fresh begins anew$"),
        ("\udcff", r"damaged \(.*\); restore it, or --fresh begins anew$"),
    ],
)
def test_a_lost_recipe_of_a_run_is_named(folder: RunFolder, begun: RunRecord, content: str | None, says: str) -> None:
    if content is None:
        folder.recipe.unlink()
    else:
        folder.recipe.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder.recipe))}: {says}") as caught:
        continuation(folder, begun, RECIPE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 140 + len(str(folder.recipe))


@pytest.mark.usefixtures("begun")
def test_a_run_has_begun_when_it_has_something_to_lose(folder: RunFolder) -> None:
    assert not has_begun(folder)
    folder.metrics.touch()
    folder.checkpoints.mkdir()
    assert not has_begun(folder)
    folder.metrics.write_text("{}\n")
    assert has_begun(folder)
    folder.metrics.unlink()
    (folder.checkpoints / "step-000001").mkdir()
    assert has_begun(folder)
    (folder.checkpoints / "step-000001").rmdir()
    folder.final.mkdir()
    assert has_begun(folder)


# Continuing


def continuation(
    folder: RunFolder, begun: RunRecord, recipe: Recipe, data_key: str = "data", base: str = "base"
) -> list[str]:
    return check_continuation(folder, begun, recipe, data_key=data_key, base_model=base)


def test_the_same_recipe_continues(folder: RunFolder, begun: RunRecord) -> None:
    assert continuation(folder, begun, RECIPE) == []


def test_a_run_may_go_on_longer_and_be_fitted_into_memory_otherwise(folder: RunFolder, begun: RunRecord) -> None:
    other = replace(
        RECIPE,
        model=replace(RECIPE.model, activation_checkpointing=True),
        training=replace(RECIPE.training, steps=None, epochs=2, micro_batch_size=1, not_finite="skip"),
    )
    changes = continuation(folder, begun, other)
    assert changes == [
        "model.activation_checkpointing: false → true",
        "training.epochs: null → 2",
        "training.micro_batch_size: auto → 1",
        "training.not_finite: stop → skip",
        "training.steps: 4 → null",
    ]
    finished = finish_run(folder, begun)
    continued = continue_run(folder, finished, other, micro_batch_size=1)
    assert (continued.finished, continued.micro_batch_size, continued.run_id) == (False, 1, begun.run_id)
    assert read_record(folder) == continued
    assert continuation(folder, continued, other) == []


@pytest.mark.parametrize("left", [[], ["run.lock"], ["run.lock", ".run.json.a1b2c3d4"]])
def test_a_folder_that_a_kill_left_at_the_beginning_can_be_used(folder: RunFolder, left: list[str]) -> None:
    folder.root.mkdir()
    for name in left:
        (folder.root / name).touch()
    check_output(str(folder.root))


def test_killed_between_record_and_recipe_a_run_begins_anew(folder: RunFolder, begun: RunRecord) -> None:
    folder.recipe.unlink()
    check_output(str(folder.root))
    assert not has_begun(folder)
    assert begin_run(folder, RECIPE, data_key="d", base_model="b", micro_batch_size=2).run_id != begun.run_id


def test_what_is_only_looked_at_or_kept_may_change(folder: RunFolder, begun: RunRecord) -> None:
    other = replace(
        RECIPE,
        output_dir="elsewhere",
        tracking=("tensorboard",),
        evaluation=Evaluation(every_steps=7),
        checkpoints=Checkpoints(keep_last=9),
    )
    continuation(folder, begun, other)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (replace(RECIPE, training=replace(RECIPE.training, seed=1)), r"training\.seed: 42 → 1\."),
        (replace(RECIPE, packing=Packing(overlap=8)), r"packing\.overlap: 64 → 8"),
        (replace(RECIPE, data=Data(train=(Source(path="b.jsonl"),))), r"data\.train\.0\.path: train\.jsonl → b\.jsonl"),
        (replace(RECIPE, adapter=Adapter(target_modules=("q_proj",))), r"adapter\.target_modules\.1: v_proj → null"),
        (
            replace(RECIPE, precision="bf16", training=replace(RECIPE.training, steps=5)),
            r"precision: auto → bf16\. ",
        ),
    ],
)
def test_another_recipe_does_not_continue(folder: RunFolder, begun: RunRecord, recipe: Recipe, says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"differs in {says}.*--fresh") as caught:
        continuation(folder, begun, recipe)
    assert "\n" not in str(caught.value)


def test_other_content_behind_the_same_recipe_does_not_continue(folder: RunFolder, begun: RunRecord) -> None:
    with pytest.raises(CheckpointError, match="differs in the data, the tokenizer or the chat template"):
        continuation(folder, begun, RECIPE, data_key="other")
    with pytest.raises(CheckpointError, match="differs in the base model"):
        continuation(folder, begun, RECIPE, base="other")


def test_no_adapter_differs_from_one_in_every_key() -> None:
    differing = recipe_differences(RECIPE, replace(RECIPE, adapter=None))
    assert differing["adapter.r"] == "adapter.r: 16 → null"
    assert all(key.startswith("adapter") for key in differing)


# Putting aside


@pytest.mark.usefixtures("begun")
def test_putting_aside_renames_and_never_overwrites(folder: RunFolder) -> None:
    (folder.root.parent / "run.1").mkdir()
    (folder.root / "precious").write_text("a")
    aside = put_aside(folder)
    assert aside == folder.root.parent / "run.2"
    assert (aside / "precious").read_text() == "a"
    assert not folder.root.exists()


@pytest.mark.usefixtures("begun")
def test_a_run_put_aside_under_its_lock_leaves_room_for_another_lock(folder: RunFolder) -> None:
    with locked(folder):
        aside = put_aside(folder)
        with locked(folder):
            folder.metrics.touch()
    assert RunFolder(aside).marker.exists()
    assert folder.metrics.exists()


# What a kill leaves


def test_half_written_files_go_when_a_run_begins_or_goes_on_and_nothing_else(folder: RunFolder) -> None:
    folder.root.mkdir()
    stay = [".summary.json.mine", "summary.json.abcd1234", ".notes.txt.abcd1234", ".summary.json.ABCD1234"]
    go = [".run.json.abcd1234", ".recipe.yaml.a_cd1234", ".summary.json.abcd1234", ".report.html.abcd1234"]
    for name in [*stay, *go]:
        (folder.root / name).write_text("half")
    (folder.root / ".ledger.json.abcd1234").mkdir()
    (folder.root / ".environment.json.abcd1234").symlink_to(folder.root / stay[0])
    stay += [".ledger.json.abcd1234", ".environment.json.abcd1234"]
    record = begin_run(folder, RECIPE, data_key="data", base_model="base", micro_batch_size=2)
    assert {path.name for path in folder.root.iterdir()} == {*stay, "run.json", "recipe.yaml"}
    (folder.root / go[0]).write_text("half")
    continue_run(folder, record, RECIPE, micro_batch_size=2)
    assert {path.name for path in folder.root.iterdir()} == {*stay, "run.json", "recipe.yaml"}
