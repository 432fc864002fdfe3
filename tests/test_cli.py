"""The command line: exit codes, one line for every failure, and a surface that changes only on purpose."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from trainkit import __version__, errors
from trainkit.cli import app, run
from trainkit.launched import OUR_LAUNCHER
from trainkit.recipe.keys import all_keys

RECIPE = """\
model: {name: tiny}
data: {train: train.jsonl}
training: {epochs: 1}
output_dir: runs/a
"""

COMMANDS = ("fine-tune", "inspect-data", "pack-data", "estimate-memory", "show", "schema", "export")

Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Commands that only note how they are called."""
    noted: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("fine_tune", "inspect_data", "pack_data", "export"):
        module = ModuleType(name)
        setattr(module, name, lambda *given, _name=name, **named: noted.append((_name, given, named)))
        monkeypatch.setitem(sys.modules, f"trainkit.commands.{name}", module)
    return noted


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `fine-tune` that raises what it is given."""

    def install(error: BaseException) -> None:
        def fine_tune(*_given: object, **_named: object) -> None:
            raise error

        module = ModuleType("fine_tune")
        module.fine_tune = fine_tune  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "trainkit.commands.fine_tune", module)

    return install


def program(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "trainkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


# What exists: a change here is a change of the public surface


def test_no_new_commands_or_options() -> None:
    group: Any = typer.main.get_command(app)
    surface = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()
    }
    assert sorted(option for parameter in group.params for option in parameter.opts) == ["--debug", "--version"]
    assert tuple(surface) == COMMANDS
    assert surface == {
        "fine-tune": ["--fresh", "--json", "--launch", "--set", "--trust-remote-code", "recipe"],
        "inspect-data": ["--examples", "--json", "--set", "--trust-remote-code", "recipe"],
        "pack-data": [
            *("--chat-template", "--data", "--force", "--format", "--json", "--output", "--plot"),
            *("--sequence-length", "--set", "--tokenizer", "--trust-remote-code", "recipe"),
        ],
        "estimate-memory": [
            "--activation-checkpointing",
            "--adapter",
            "--exact",
            "--fits",
            "--gpu",
            "--gpus",
            "--json",
            "--memory",
            "--micro-batch-size",
            "--model",
            "--optimizer",
            "--plot",
            "--precision",
            "--sequence-length",
            "--set",
            "--shard",
            "--view",
            "recipe",
        ],
        "show": ["--set", "recipe"],
        "schema": [],
        "export": ["--json", "--merge", "--output", "--trust-remote-code", "run"],
    }


KEYS = {
    "": "model precision adapter data packing training evaluation checkpoints tracking output_dir",
    "model": "name revision attention activation_checkpointing",
    "adapter": "type r alpha dropout target_modules exclude_modules modules_to_save use_rslora use_dora "
    "init_lora_weights layers_to_transform rank_pattern alpha_pattern",
    "data": "train eval chat_template train_on max_dropped",
    "data.train": "path format weight columns name split",
    "packing": "strategy sequence_length long_documents overlap train_on_overlap separator "
    "isolate_documents reset_positions",
    "training": "epochs steps tokens_per_step micro_batch_size learning_rate lr_scheduler warmup_ratio warmup_steps "
    "weight_decay max_grad_norm not_finite loss_spike optimizer adam_beta1 adam_beta2 adam_epsilon seed",
    "evaluation": "every_steps samples exact_match max_new_tokens",
    "checkpoints": "every_steps keep_last keep_best",
}


def test_no_new_recipe_keys() -> None:
    expected = {f"{section}.{name}".lstrip(".") for section, names in KEYS.items() for name in names.split()}
    assert set(all_keys()) == expected


# Calling commands


def test_fine_tune_gets_the_recipe_and_its_switches(calls: list[Any]) -> None:
    assert (
        run(["fine-tune", "recipe.yaml", "--set", "training.seed=3", "--set", "precision=fp32", "--fresh", "--json"])
        == 0
    )
    ((name, (read,), named),) = calls
    assert name == "fine_tune"
    assert (read.recipe.training.seed, read.recipe.precision) == (3, "fp32")
    assert named == {"trust": None, "fresh": True, "json_output": True}


def test_the_other_commands_get_theirs(calls: list[Any]) -> None:
    assert run(["inspect-data", "recipe.yaml"]) == 0
    assert run(["export", "runs/a", "--merge", "--output", "out"]) == 0
    assert run(["pack-data", "recipe.yaml", "--force"]) == 0
    assert calls[0][2] == {"trust": None, "examples": 3, "json_output": False}
    assert calls[2][2] == {
        "trust": None,
        "output": None,
        "form": "store",
        "plot": None,
        "force": True,
        "json_output": False,
    }
    assert calls[1] == (
        "export",
        (Path("runs/a"),),
        {"trust": None, "merge": True, "output": Path("out"), "json_output": False},
    )


def test_pack_data_takes_options_in_place_of_a_recipe(calls: list[Any]) -> None:
    options = ["--data", "a.jsonl", "--data", "b.jsonl", "--tokenizer", "tok", "--sequence-length", "1000"]
    places = ["--output", "out", "--format", "parquet", "--plot", "a.png"]
    assert run(["pack-data", *options, "--set", "packing.overlap=1", *places, "--json"]) == 0
    ((_, (read,), named),) = calls
    assert [source.path for source in read.recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert (read.recipe.packing.sequence_length, read.recipe.packing.overlap) == (1000, 1)
    wanted = {"output": Path("out"), "form": "parquet", "plot": Path("a.png")}
    assert named == {**wanted, "trust": None, "force": False, "json_output": True}


@pytest.mark.usefixtures("calls")
def test_warnings_are_said_before_the_command_runs(capsys: Said) -> None:
    assert run(["fine-tune", "recipe.yaml", "--set", "evaluation.samples=3"]) == 0
    said = capsys.readouterr()
    assert said.err == "warning: --set evaluation.samples: has no effect: `data.eval` is not given\n"
    assert said.out == ""


def test_what_a_launcher_has_warned_of_its_processes_do_not(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    warned_of = ["fine-tune", "recipe.yaml", "--set", "evaluation.samples=3"]
    monkeypatch.setenv(OUR_LAUNCHER, str(os.getppid()))
    assert run(warned_of) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(OUR_LAUNCHER, str(os.getpid()))  # of a process further up
    assert run(warned_of) == 0
    assert capsys.readouterr().err.startswith("warning: --set evaluation.samples: ")
    assert len(calls) == 2


def test_launched_processes_get_a_recipe_that_looks_like_an_option(
    calls: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "-r.yaml").write_text(RECIPE)
    module = ModuleType("launch")
    module.launch = lambda _file, arguments: run(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainkit.commands.launch", module)
    assert run(["fine-tune", "--launch", "two.yaml", "--set", "training.seed=3", "--fresh", "--", "-r.yaml"]) == 0
    ((_, (read,), named),) = calls
    assert read.recipe.training.seed == 3
    assert named == {"trust": None, "fresh": True, "json_output": False}


def test_show_and_schema_print_results(capsys: Said) -> None:
    assert run(["show", "recipe.yaml"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("model:\n  name: tiny ")
    assert shown.err == ""
    assert run(["schema"]) == 0
    assert capsys.readouterr().out.startswith('{\n  "$schema"')


def test_the_version(capsys: Said) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"trainkit {__version__}\n"


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_fits_eighty_columns_and_shows_an_example(command: list[str], capsys: Said) -> None:
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert f"trainkit {command[0]} " in text.split("Example")[1] if command else "Exit codes" in text


# Failing


def only_line(capsys: Said) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fine-tun", "x"], "error: No such command 'fine-tun'. Did you mean 'fine-tune'? See `trainkit --help`"),
        (["fine-tune", "x", "--fersh"], "error: No such option: --fersh"),
        (["fine-tune"], "error: Missing argument 'RECIPE'; see `trainkit fine-tune --help`"),
        (["fine-tune", "a", "b"], "error: Got unexpected extra argument"),
        (["show", "recipe.yaml", "--set"], "error: Option '--set' requires an argument"),
        (["inspect-data", "recipe.yaml", "--examples", "0"], "error: Invalid value for '--examples'"),
        (
            ["pack-data", "recipe.yaml", "--format", "csv"],
            "error: Invalid value for '--format': 'csv' is not one of 'store', 'parquet'; see `trainkit pack-data",
        ),
        (["pack-data"], "error: give a RECIPE, or --data and --tokenizer; see `trainkit pack-data --help`"),
        (["fine-tune", "nowhere.yaml"], "error: nowhere.yaml: no such recipe; "),
        (["estimate-memory"], "error: give a RECIPE or --model NAME; see `trainkit estimate-memory --help`"),
        (
            ["show", "recipe.yaml", "--set", "training.epochs=-1"],
            "error: --set training.epochs: must be above 0; got -1",
        ),
    ],
)
def test_a_wrong_command_line_is_exit_2_in_one_line(arguments: list[str], line: str, capsys: Said) -> None:
    assert run(arguments) == 2
    assert only_line(capsys).startswith(line)


def test_no_command_is_exit_2_with_the_help_on_stderr(capsys: Said) -> None:
    assert run([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Usage: trainkit")


def test_every_mistake_of_a_recipe_is_a_line(folder: Path, capsys: Said) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("epochs: 1", "epochs: three, seed: -1"))
    assert run(["fine-tune", "recipe.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: recipe.yaml:3:20: training.epochs: expected a number or null; got the text `three`",
        "error: recipe.yaml:3:33: training.seed: must be at least 0 and below 4294967296; got -1",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("no"), 2),
        (errors.DataError("no"), 3),
        (errors.ModelError("no"), 4),
        (errors.MachineError("no"), 5),
        (errors.CheckpointError("no"), 6),
        (errors.DivergedError("no"), 7),
        (errors.Stopped("no", by_keyboard=False), 75),
        (errors.Stopped("no", by_keyboard=True), 130),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    fails: Any, error: Exception, code: int, folder: Path, capsys: Said
) -> None:
    fails(error)
    assert run(["fine-tune", "recipe.yaml"]) == code
    assert only_line(capsys) == "error: no\n"
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml"]


def test_ctrl_c_before_a_run_has_state(fails: Any, capsys: Said) -> None:
    fails(KeyboardInterrupt())
    assert run(["fine-tune", "recipe.yaml"]) == 130
    assert only_line(capsys) == "error: interrupted before there was anything to save\n"


@pytest.mark.parametrize("command", [["show", "recipe.yaml"], ["estimate-memory", "--model", "gpt2"]])
def test_ctrl_c_in_a_command_that_saves_nothing(
    folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    def interrupted(*_given: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainkit.commands.show.show", interrupted)
    monkeypatch.setattr("trainkit.commands.estimate_memory.estimate_memory", interrupted)
    assert (folder / "recipe.yaml").is_file()
    assert run(command) == 130
    assert only_line(capsys) == "error: interrupted\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/x"), "error: runs/a/x: no space left on the disk"),
        (
            OSError(errno.EROFS, "Read-only file system", "runs/a/x"),
            "error: runs/a/x: Read-only file system; mend that",
        ),
        (OSError(errno.EIO, "Input/output error"), "error: runs/a: Input/output error; mend that and run"),
        (OSError(errno.EMFILE, "Too many open files", "runs/a/x"), "error: this machine lets no more files be open; "),
        (OSError(errno.ENFILE, "Too many open files in system"), "error: this machine lets no more files be open; "),
        (MemoryError(), "error: this machine is out of memory"),
    ],
)
def test_what_the_machine_lacks_is_exit_5(fails: Any, error: Exception, line: str, capsys: Said) -> None:
    fails(error)
    assert run(["fine-tune", "recipe.yaml"]) == 5
    assert only_line(capsys).startswith(line)


def test_a_current_folder_that_is_gone_is_exit_5(folder: Path) -> None:
    """Otherwise a library of torch's ends the process, with a message and an exit code of its own."""
    (folder / "gone").mkdir()
    python = f"{shlex.quote(sys.executable)} -m trainkit"
    command = f"rmdir ../gone && {python} fine-tune quickstart --set output_dir={shlex.quote(str(folder / 'run'))}"
    done = subprocess.run(["sh", "-c", command], cwd=folder / "gone", capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == (
        "error: the current folder is gone (No such file or directory); change to one that is there\n"
    )


def test_a_bug_leaves_its_traceback_in_a_file(fails: Any, folder: Path, capsys: Said) -> None:
    fails(ZeroDivisionError("division\nby zero"))
    assert run(["fine-tune", "recipe.yaml"]) == 1
    line = only_line(capsys)
    (crash,) = folder.glob("trainkit-crash-*.txt")
    what = "this is a bug of trainkit (ZeroDivisionError: division by zero)"
    assert line == f"error: {what}; please report it with {crash.name}\n"
    assert "Traceback (most recent call last)" in crash.read_text()


def test_a_bug_of_a_run_is_told_in_its_own_folder(fails: Any, folder: Path, capsys: Said) -> None:
    (folder / "runs" / "a").mkdir(parents=True)
    fails(ZeroDivisionError())
    assert run(["fine-tune", "recipe.yaml"]) == 1
    assert list((folder / "runs" / "a").iterdir()) == []  # a folder that is not ours
    (folder / "runs" / "a" / "run.json").write_text("{}")
    assert run(["fine-tune", "recipe.yaml"]) == 1
    assert "report it with runs/a/crash.txt" in capsys.readouterr().err
    assert "ZeroDivisionError" in (folder / "runs" / "a" / "crash.txt").read_text()


def test_debug_shows_the_traceback_wherever_it_stands(fails: Any, capsys: Said) -> None:
    fails(errors.DataError("no rows"))
    for arguments in (["--debug", "fine-tune", "recipe.yaml"], ["fine-tune", "recipe.yaml", "--debug"]):
        assert run(arguments) == 3
        said = capsys.readouterr().err
        assert said.startswith("Traceback (most recent call last):\n")
        assert said.endswith("error: no rows\n")


def test_a_crash_report_holds_no_secret(fails: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    fails(RuntimeError("401 with 0123456789abcdef at https://me:hunter2@host/x for hf_abcdefghijklmnopqrstuvwx"))
    assert run(["fine-tune", "recipe.yaml"]) == 1
    (crash,) = folder.glob("trainkit-crash-*.txt")
    assert "401 with *** at https://***@host/x for ***" in crash.read_text()


# As a program


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    command = f"{shlex.quote(sys.executable)} -m trainkit schema | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")
    command = command.replace("schema", "--help").replace("head -1", "true")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_is_exit_5() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for environment in (buffered, {**buffered, "PYTHONUNBUFFERED": "1"}):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "trainkit", "--help"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=environment,
            )
        assert done.returncode == 5
        assert done.stderr == "error: no space left on the disk; free some and run the same command again\n"


def test_the_program_fails_with_the_exit_code_and_no_traceback() -> None:
    done = program("show", "recipe.yaml", "--set", "training.learning_rate=.nan")
    assert done.returncode == 2
    assert done.stderr == "error: --set training.learning_rate: must be a finite number; got .nan\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["show", "recipe.yaml"],
        ["show", "nowhere"],
        ["pack-data", "--help"],
        ["pack-data", "--data", "a"],
        ["estimate-memory", "--help"],
        ["estimate-memory", "--model", "lama-70b"],
        ["estimate-memory", "--model", "llama-70b", "--memory", "24"],
        ["estimate-memory", "--model", "llama-3.1-8b", "--adapter", "lora", "--gpu", "h100-80gb"],
    ],
)
def test_help_and_refusals_load_nothing_heavy(arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "datasets", "numpy", "rich"}
    code = f"import sys; from trainkit.cli import run; run(sys.argv[1:]); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_a_recipe_error_costs_no_wait() -> None:
    start = time.perf_counter()
    before = os.times()
    program("show", "nowhere")
    after = os.times()
    assert after.children_user - before.children_user < 1.0
    assert time.perf_counter() - start < 20  # wall-clock of a busy machine


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_streams_that_were_closed_change_no_exit_code(tmp_path: Path, closed: str) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {name: tiny}\n")
    command = f"{shlex.quote(sys.executable)} -m trainkit show recipe.yaml {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False, timeout=60).returncode == 2
