"""The record of a run: lines that are whole, go back on resume, and never end a run; trackers that may fail."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import types
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import CheckpointError, MachineError
from trainkit.run_folder import RunFolder
from trainkit.training.metrics import MetricsLog, Trackers, check_trackers, open_trackers, read_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def ignore(line: str) -> None:
    raise AssertionError(f"unexpected failure: {line}")


@given(
    records=st.lists(
        st.dictionaries(st.text(min_size=1).filter(lambda name: name != "not_finite"), SCALARS), max_size=5
    )
)
def test_every_record_is_one_valid_line(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsLog(path, ignore) as log:
        assert all(log.append(record) for record in records)
        assert log.length_bytes == path.stat().st_size
    read = read_metrics(path)
    assert len(read) == len(records)
    for record, back in zip(records, read, strict=True):
        odd = back.pop("not_finite", {})
        assert set(back) == set(record)
        for name, value in record.items():
            assert (repr(float(odd[name])) if name in odd else repr(back[name])) == repr(value)


def test_a_number_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", ignore) as log:
        log.append({"step": 1, "loss": float("nan"), "grad_norm": float("-inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "not_finite": {"loss": "nan", "grad_norm": "-inf"}}\n'


def test_a_line_can_be_read_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, ignore) as log:
        log.append({"step": 1})
        assert read_metrics(path) == [{"step": 1}]


def test_a_resumed_run_goes_back_to_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, ignore) as log:
        log.append({"step": 1})
        log.sync()
        at_checkpoint = log.length_bytes
        log.append({"step": 2, "loss": 3.0})
    with MetricsLog(path, ignore) as log:
        log.truncate_to(at_checkpoint)
        log.append({"step": 2, "loss": 4.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 4.0}]


def test_going_back_to_where_no_line_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, ignore) as log:
        log.append({"step": 1})
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: has 12 bytes and no line ending at byte 5,"):
            log.truncate_to(5)
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("content", "state"), [("", "is empty"), ('{"step": 1}\n{"st', "has lost its last lines")], ids=["moved", "lost"]
)
def test_lines_that_are_gone_do_not_keep_a_run_from_continuing(tmp_path: Path, content: str, state: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    said: list[str] = []
    with MetricsLog(path, said.append) as log:
        log.truncate_to(100)
        log.append({"step": 9})
    assert read_metrics(path) == [*([{"step": 1}] if content else []), {"step": 9}]
    assert said == [f"{path}: {state}; steps before this one are not recorded"]


def test_what_the_file_system_says_at_the_close_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with MetricsLog(path, said.append) as log:
        log.append({"step": 1})
        monkeypatch.setattr("trainkit.training.metrics.os.ftruncate", full)
        monkeypatch.setattr("trainkit.training.metrics.os.fsync", full)
        log.sync()
    assert said == [f"{path}: No space left on device; training goes on, this record may have gaps"]
    assert read_metrics(path) == [{"step": 1}]


def test_half_a_line_of_a_killed_run_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    assert read_metrics(path) == [{"step": 1}]
    with MetricsLog(path, ignore) as log:
        log.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_is_said_once_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []
    really_write = os.pwrite
    room = 20

    def write_until_full(descriptor: int, data: bytes, offset: int) -> int:
        if offset >= room:
            raise OSError(28, "No space left on device")
        return really_write(descriptor, data[: room - offset], offset)

    with MetricsLog(path, said.append) as log:
        assert log.append({"step": 1})
        monkeypatch.setattr("trainkit.training.metrics.os.pwrite", write_until_full)
        assert not log.append({"step": 2, "loss": 1.0})
        assert not log.append({"step": 3, "loss": 1.0})
        monkeypatch.undo()
        assert log.append({"step": 4})
        assert path.read_text() == '{"step": 1}\n{"step": 4}\n'
        monkeypatch.setattr("trainkit.training.metrics.os.pwrite", write_until_full)
        assert not log.append({"step": 5})
    assert said == [f"{path}: No space left on device; training goes on, this record has gaps"]
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(tmp_path / "missing" / "metrics.jsonl", ignore)


@pytest.mark.parametrize("line", ["{", "3", "", "\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: is no JSON object"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MachineError, match=rf"^tracking: {name} is not installed; pip install 'trainkit\[{name}\]'"):
        check_trackers([name])


def test_a_folder_of_a_packages_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(MachineError, match="mlflow is not installed"):
        check_trackers(["mlflow"])


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tensorboard(folder: RunFolder, first_step: int = 0) -> Trackers:
    config = {"model": {"name": "tiny"}}
    return open_trackers(["tensorboard"], folder, config, on_failure=ignore, run_id="a1", first_step=first_step)


def test_tensorboard_reads_the_numbers_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path)
    trackers = tensorboard(folder)
    trackers.log(1, {"step": 1, "loss": 4.0, "skipped": True, "place": "text", "epoch": 0})
    trackers.log(2, {"step": 2, "loss": 3.5})
    trackers.finish()
    assert scalars(folder) == {"loss": [(1, 4.0), (2, 3.5)], "epoch": [(1, 0.0)]}


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path)
    for first_step, losses in [(0, [4.0, 3.0, 9.0, 9.0]), (2, [2.0, 1.0])]:
        trackers = tensorboard(folder, first_step)
        for step, loss in enumerate(losses, first_step + 1):
            trackers.log(step, {"loss": loss})
        trackers.finish()
    assert scalars(folder) == {"loss": [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]}


def pretend_package(name: str, monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    """A module that stands for a tracker's package."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(origin="here")  # type: ignore[assignment]
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_tracker_that_cannot_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no API key\nsecond line")

    pretend_package("wandb", monkeypatch, init=init, Settings=dict)
    with pytest.raises(MachineError, match=r"^tracking: wandb could not be started \(no API key\)"):
        open_trackers(["wandb"], RunFolder(tmp_path), {}, on_failure=ignore, run_id="a1")


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def log(values: Mapping[str, float], step: int) -> None:
        calls.append(step)
        raise ConnectionError("server gone")

    def init(**_: object) -> object:
        return types.SimpleNamespace(log=log, finish=lambda: calls.append(-1))

    pretend_package("wandb", monkeypatch, init=init, Settings=dict)
    said: list[str] = []
    trackers = open_trackers(["wandb"], RunFolder(tmp_path), {}, on_failure=said.append, run_id="a1")
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 1.0})
    trackers.finish()
    assert calls == [1]
    assert said == ["tracking: wandb failed at step 1 and is left out: server gone"]


def test_a_tracker_that_fails_at_the_end_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish() -> None:
        raise OSError

    run = types.SimpleNamespace(log=lambda *_args, **_kw: None, finish=finish)
    pretend_package("wandb", monkeypatch, init=lambda **_: run, Settings=dict)
    said: list[str] = []
    open_trackers(["wandb"], RunFolder(tmp_path), {}, on_failure=said.append, run_id="a1").finish()
    assert said == ["tracking: wandb failed at the end: OSError"]


@pytest.mark.parametrize("hangs", ["log", "finish"])
def test_a_server_that_does_not_answer_holds_up_nothing(
    hangs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def wait(*_: object, **__: object) -> None:
        answered.wait()

    calls: dict[str, Any] = {"log": lambda *_, **__: None, "finish": lambda: None} | {hangs: wait}
    run = types.SimpleNamespace(**calls)
    pretend_package("wandb", monkeypatch, init=lambda **_: run, Settings=dict)
    monkeypatch.setattr("trainkit.training.metrics.FINISH_SECONDS", 0.2)
    said: list[str] = []
    trackers = open_trackers(["wandb"], RunFolder(tmp_path), {}, on_failure=said.append, run_id="a1")
    started = time.monotonic()
    for step in range(100):
        trackers.log(step, {"loss": 1.0})
    trackers.finish()
    assert time.monotonic() - started < 10
    assert said == ["tracking: wandb did not finish in 0.2 seconds and is left behind"]
    answered.set()


def test_numbers_that_a_tracker_does_not_take_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    run = types.SimpleNamespace(log=lambda *_, **__: answered.wait(), finish=lambda: None)
    pretend_package("wandb", monkeypatch, init=lambda **_: run, Settings=dict)
    monkeypatch.setattr("trainkit.training.metrics.MOST_WAITING", 3)
    said: list[str] = []
    trackers = open_trackers(["wandb"], RunFolder(tmp_path), {}, on_failure=said.append, run_id="a1")
    for step in range(9):
        trackers.log(step, {"loss": 1.0})
    trackers.finish()
    assert len(said) == 1
    assert re.fullmatch(r"tracking: wandb takes no numbers any more \(step [34]\) and is left out", said[0])
    answered.set()


@pytest.mark.filterwarnings("default")
def test_wandb_really_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = open_trackers(["wandb"], RunFolder(tmp_path), {"a": {"b": 1}}, on_failure=ignore, run_id="a1")
    trackers.log(1, {"loss": 1.5})
    trackers.finish()
    assert list(tmp_path.glob("wandb/offline-run-*-a1/*.wandb"))


@pytest.mark.filterwarnings("default")
def test_mlflow_really_records_into_the_run_folder_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for first_step in (0, 1):
        trackers = open_trackers(
            ["mlflow"], RunFolder(tmp_path), {"a": {"b": 1}}, on_failure=ignore, run_id="a1", first_step=first_step
        )
        trackers.log(first_step + 1, {"loss": 1.5 - first_step})
        trackers.finish()
    runs = mlflow.search_runs(output_format="list")
    assert [run.data.params for run in runs] == [{"a.b": "1"}]
    history = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 0.5)]


def test_no_tracker_is_fine(tmp_path: Path) -> None:
    trackers = open_trackers([], RunFolder(tmp_path), {}, on_failure=ignore, run_id="a1")
    trackers.log(1, {"loss": 1.0})
    trackers.finish()
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"
