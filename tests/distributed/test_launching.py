"""Launch files, what is refused and how, other launchers, several machines."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from tests.distributed.workbench import Started, Workbench, largest_difference, write_conversations
from trainkit.cli import run
from trainkit.commands.launch import read_launch_file
from trainkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Said = pytest.CaptureFixture[str]
TWO_ON_A_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}

WRONG: dict[str, tuple[dict[str, Any] | str | None, str]] = {
    "no such file": (None, "--launch: {path} is no file; configs/ddp.yaml and configs/fsdp2.yaml are examples"),
    "no YAML": ("{[", "{path}: is no launch file of Accelerate's: "),
    "a list": ("- 1\n- 2\n", "{path}: is no launch file of Accelerate's: "),
    "empty": ("", "{path}: is no launch file of Accelerate's: "),
    "unknown key": ({"num_procesess": 2}, "{path}: num_procesess: has no effect here; take it out"),
    "mixed_precision": (
        {"mixed_precision": "bf16"},
        '{path}: mixed_precision: leave it "no"; `precision` in the recipe',
    ),
    "DeepSpeed": ({"distributed_type": "DEEPSPEED"}, "{path}: distributed_type: DEEPSPEED is not supported; one of NO"),
    "Megatron": ({"distributed_type": "MEGATRON_LM"}, "{path}: distributed_type: MEGATRON_LM is not supported"),
    "unknown type": ({"distributed_type": "BOTH"}, "{path}: "),
    "a word for a number": ({"num_processes": "two"}, "{path}: num_processes: 'two' is no whole number"),
    "no process": ({"num_processes": 0}, "{path}: num_processes: "),
    "not divisible": (
        {"num_machines": 2, "num_processes": 3, "main_process_ip": "localhost", "main_process_port": 1},
        "{path}: num_processes: 3 ",
    ),
    "machine out of range": (
        {"num_machines": 2, "machine_rank": 2, "main_process_ip": "localhost", "main_process_port": 1},
        "{path}: machine_rank: 2 ",
    ),
    "no address": ({"num_machines": 2}, "{path}: main_process_ip and main_process_port: needed"),
    "FSDP version 1": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}},
        "{path}: fsdp_config.fsdp_version: set it to 2; the first version is not supported",
    ),
    "FSDP without version": ({"distributed_type": "FSDP"}, "{path}: fsdp_config.fsdp_version: set it to 2"),
    "FSDP's other switches": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
        "{path}: fsdp_config.fsdp_offload_params: has no effect here",
    ),
    "a switch without effect": ({"gradient_accumulation_steps": 4}, "{path}: gradient_accumulation_steps"),
    "dynamo": ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "{path}: dynamo_config"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_launch_file_is_one_line(tmp_path: Path, name: str) -> None:
    content, expected = WRONG[name]
    path = tmp_path / "launch.yaml"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        path.write_text(yaml.safe_dump(TWO_ON_A_CPU | content))
    with pytest.raises(UsageError) as caught:
        read_launch_file(str(path))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(expected.format(path=path)), line
    assert len(line) < 240 + len(str(path))


def test_a_launch_file_is_read_before_anything_else(bench: Workbench, tmp_path: Path, capfd: Said) -> None:
    missing = tmp_path / "launch.yaml"
    assert run(["fine-tune", str(bench.recipe("never")), "--launch", str(missing)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith(f"error: --launch: {missing} is no file")
    assert not (bench.root / "never").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {"optimizer": "adafactor"}}, "training.optimizer: adafactor cannot be shared out by FSDP2"),
        ({"training": {"optimizer": "adamw_8bit"}}, "training.optimizer: adamw_8bit cannot be shared out by FSDP2"),
        ({"adapter": {"type": "qlora"}}, "adapter.type: qlora: a base in 4 bit cannot be shared out by FSDP2"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_loaded(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, capfd: Said, changes: dict[str, Any], expected: str
) -> None:
    """As the first of two processes sees it; the model's folder is not even there."""
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (launched | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainkit.cli.is_first_to_fail", lambda _: True)
    monkeypatch.setattr("trainkit.commands.fine_tune.check_extras", lambda _: None)
    recipe = bench.recipe("refused", changes | {"model": {"name": str(bench.root / "nowhere")}})
    assert run(["fine-tune", str(recipe)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")


def test_what_all_find_is_said_once(bench: Workbench) -> None:
    """Here by two processes; each error has its own exit code."""
    changes: dict[str, Any] = {"training": {"tokens_per_step": 128}}
    ended = bench.run(bench.recipe("too-few-rows", changes), "two-ddp")
    assert ended.code == 2, ended.said
    [line] = ended.error_lines()
    assert line.startswith("error: training.tokens_per_step: 128 tokens are 1 rows of 128, fewer than the 2 processes")


def test_what_all_find_under_torchrun_is_said_once_and_leaves_no_mark(bench: Workbench, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainkit")
    options = ("--set", "training.seed=many")
    ended = bench.start(
        bench.recipe("wrong"), None, *options, program=torchrun, environment={"TMPDIR": str(tmp_path)}
    ).end()
    [line] = ended.error_lines()
    assert line.startswith("error: --set training.seed: ")
    assert list(tmp_path.glob("trainkit*")) == []


def test_processes_that_nobody_launched_are_told_what_to_do(bench: Workbench) -> None:
    ended = bench.run(bench.recipe("nobody"), environment={"WORLD_SIZE": "2"})
    assert ended.code == 5, ended.said
    [line] = ended.error_lines()
    assert line.startswith("error: 2 processes were launched and did not meet: ")
    assert line.endswith("; unset WORLD_SIZE, or use --launch or torchrun")
    assert len(line) <= 200 + len("error: ")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["two-ddp", "two-fsdp2"])
def test_errors_of_all_have_their_own_exit_code(bench: Workbench, kind: str) -> None:
    empty = bench.root / "empty.jsonl"
    empty.write_text("")
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"data": {"train": str(empty)}}, 3, str(empty)),
        ({"model": {"name": str(bench.root / "nowhere")}}, 4, "nowhere"),
        ({"adapter": {"target_modules": ["no_proj"]}}, 2, "no_proj"),
    ]
    for number, (changes, code, word) in enumerate(cases):
        ended = bench.run(bench.recipe(f"wrong-{kind}-{number}", changes), kind)
        assert ended.code == code, ended.said
        [line] = ended.error_lines()
        assert word in line
        assert not (bench.root / f"wrong-{kind}-{number}").exists()


@pytest.mark.long
def test_what_only_the_first_finds_stops_the_others(bench: Workbench) -> None:
    """A changed recipe is the first one's to see, while the others wait to meet it."""
    assert bench.run(bench.recipe("changed"), "two-ddp", "--set", "training.steps=2").code == 0
    started = bench.start(bench.recipe("changed"), "two-ddp", "--set", "training.seed=1")
    started.wait_for(lambda: len(started.workers()) == 2)
    started.wait_for(lambda: len(started.workers()) < 2)  # the first one has gone
    begun = time.monotonic()
    ended = started.end()
    print(f"the other one ended {time.monotonic() - begun:.1f} s later")
    assert time.monotonic() - begun < 15
    assert ended.code == 6, ended.said
    [line] = ended.error_lines()
    assert "differs in training.seed: 42 → 1" in line


@pytest.mark.long
def test_torchrun_does_the_same(bench: Workbench) -> None:
    """``accelerate launch`` starts its processes on GPUs the same way; on a CPU it starts one, or asks for MPI."""
    reference = bench.run(bench.recipe("under-none"))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainkit")
    ended = bench.start(bench.recipe("under-torchrun"), program=torchrun).end()
    assert ended.code == 0, ended.said
    assert "x 2 processes" in ended.output
    difference = largest_difference(ended, reference)
    print(f"torchrun: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= 1e-6
    assert ended.output.count("examples read") == 1


def machine_file(bench: Workbench, name: str, rank: int, address: str, port: int, **changes: Any) -> Path:
    """A launch file of one of two machines with one process each."""
    path = bench.root / f"{name}-{rank}.yaml"
    machines = {"num_machines": 2, "machine_rank": rank, "main_process_ip": address, "main_process_port": port}
    path.write_text(yaml.safe_dump(TWO_ON_A_CPU | machines | changes))
    return path


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def wait_until_idle(process: subprocess.Popen[str]) -> None:
    """Return when the process has come to where it waits: it has done something, and then nothing for a second."""
    seen = psutil.Process(process.pid)
    before, deadline = -1.0, time.monotonic() + 120
    while (now := sum(seen.cpu_times()[:2])) < 1 or now - before > 0.02:
        assert time.monotonic() < deadline
        before = now
        time.sleep(1)


@pytest.mark.parametrize(
    ("number", "rank", "code"),
    [
        (signal.SIGINT, 0, 130),
        (signal.SIGUSR1, 1, 75),
        pytest.param(signal.SIGINT, 1, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, 0, 75, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 0, 75, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 1, 75, marks=pytest.mark.long),
    ],
)
def test_a_machine_that_waits_for_the_other_can_be_stopped(
    bench: Workbench, tmp_path: Path, number: signal.Signals, rank: int, code: int
) -> None:
    file = machine_file(bench, f"launch-{number.name}", rank, "127.0.0.1", free_port())
    started = bench.start(
        bench.recipe(f"alone-{number.name}-{rank}"), None, "--launch", str(file), environment={"TMPDIR": str(tmp_path)}
    )
    wait_until_idle(started.process)
    started.send(number)
    begun = time.monotonic()
    ended = started.end()
    assert time.monotonic() - begun < 10
    assert ended.code == code, ended.said
    assert ended.error_lines() == [
        f"error: {number.name} while this machine waited for the others; the same command goes on from here"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_named(bench: Workbench) -> None:
    """As it is where two machines are said to be the first one."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        port = listening.getsockname()[1]
        file = machine_file(bench, "in-use", 0, "127.0.0.1", port)
        ended = bench.run(bench.recipe("in-use"), None, "--launch", str(file))
    assert ended.code == 5, ended.said
    [line] = ended.error_lines()
    assert line.startswith(f"error: main_process_port: {port} is in use on this machine; take another on all machines")


@pytest.mark.long
@pytest.mark.parametrize("kind", [None, "two-ddp"])
def test_under_nohup_a_closed_terminal_stops_nothing(bench: Workbench, kind: str | None) -> None:
    program = ("nohup", sys.executable, "-m", "trainkit")
    started = bench.start(bench.recipe(f"nohup-{kind}"), kind, program=program)
    started.wait_for_step(3)
    for process in [psutil.Process(started.process.pid), *started.workers()]:
        process.send_signal(signal.SIGHUP)
    ended = started.end()
    assert ended.code == 0, ended.said


@pytest.mark.long
@pytest.mark.parametrize("kind", ["MULTI_CPU", "FSDP"])
def test_two_launchers_meet(bench: Workbench, kind: str) -> None:
    """On one machine, as two would; the second one starts later, and one that fails ends both."""
    reference = bench.run(bench.recipe(f"met-one-{kind}"))
    changes = {"distributed_type": kind} | ({"fsdp_config": {"fsdp_version": 2}} if kind == "FSDP" else {})
    recipe, port = bench.recipe(f"met-{kind}"), free_port()
    files = [machine_file(bench, f"met-{kind}", rank, "127.0.0.1", port, **changes) for rank in (0, 1)]
    started = []
    for file in files:
        started.append(bench.start(recipe, None, "--launch", str(file)))
        time.sleep(3)
    first, second = (one.end() for one in started)
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert largest_difference(first, reference) <= 1e-6
    assert second.said == ""

    recipe, port = bench.recipe(f"parted-{kind}"), free_port()
    files = [machine_file(bench, f"parted-{kind}", rank, "127.0.0.1", port, **changes) for rank in (0, 1)]
    started = [bench.start(recipe, None, "--launch", str(file)) for file in files]
    started[0].wait_for_step(6)
    started[1].workers()[0].kill()
    begun = time.monotonic()
    first, second = (one.end() for one in started)
    print(f"both ended after {time.monotonic() - begun:.1f} s")
    assert time.monotonic() - begun < 30
    assert (first.code, second.code) == (75, 75), first.said + second.said
    [line] = second.error_lines()
    assert line.startswith("error: process 1 was killed (SIGKILL)")
    [line] = first.error_lines()
    assert line.startswith("error: another process of this run is gone or does not answer")


ON_MACHINE_TWO: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "learning rate": ({}, ("--set", "training.learning_rate=1e-9"), "training.learning_rate is 1e-09, and 0.003 in"),
    "seed": ({}, ("--set", "training.seed=1"), "training.seed is 1, and 42 in"),
    "folder": ({}, ("--set", "output_dir=another"), "output_dir is ..."),
    "evaluation": ({}, ("--set", "evaluation.every_steps=3"), "evaluation.every_steps is 3, and 7 in"),
    "no adapter": ({}, ("--set", "adapter=null"), "adapter.type is null, and lora in process 0 (7 more differ)"),
    "kind": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
        (),
        "distributed_type is FSDP2, and DDP in",
    ),
}


@pytest.mark.parametrize(
    "what",
    ["learning rate", *(pytest.param(what, marks=pytest.mark.long) for what in list(ON_MACHINE_TWO)[1:])],
)
def test_two_machines_that_were_given_different_things_do_not_train(bench: Workbench, what: str) -> None:
    changes, options, says = ON_MACHINE_TWO[what]
    recipe, port = bench.recipe("disagreeing"), free_port()
    name = f"disagreeing-{what}".replace(" ", "-")
    files = [machine_file(bench, name, rank, "127.0.0.1", port, **given) for rank, given in enumerate(({}, changes))]
    started = [
        bench.start(recipe, None, "--launch", str(file), *given)
        for file, given in zip(files, ((), options), strict=True)
    ]
    first, second = (one.end() for one in started)
    for ended in (first, second):
        assert ended.code == 2, ended.said
        [line] = ended.error_lines()
        assert line.startswith(f"error: process 1 ({socket.gethostname()}): {says}"), line
        assert len(line) <= 207
    assert not (bench.root / "disagreeing").exists()
    assert not (bench.root / "another").exists()


@pytest.mark.long
@pytest.mark.parametrize("what", ["data", "model"])
def test_another_copy_of_data_or_model_under_the_same_name_does_not_train(bench: Workbench, what: str) -> None:
    rooms = [Workbench(bench.root / f"copy-{what}-{side}", bench.base) for side in "ab"]
    for number, room in enumerate(rooms):
        shutil.copytree(bench.base["model"]["name"], room.root / "model")
        write_conversations(room.root / "train.jsonl", 57, seed=number if what == "data" else 7)
    if what == "model":
        weights = rooms[1].root / "model" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    changes = {"model": {"name": "./model"}, "data": {"train": "train.jsonl"}}
    recipe, port = rooms[0].recipe("run", changes), free_port()
    files = [machine_file(bench, f"copy-{what}", rank, "127.0.0.1", port) for rank in (0, 1)]
    started = [room.start(recipe, None, "--launch", str(file)) for room, file in zip(rooms, files, strict=True)]
    says = "data.train: its data, tokenizer or" if what == "data" else "model.name: its base model is another copy"
    for ended in [one.end() for one in started]:
        assert ended.code == 2, ended.said
        [line] = ended.error_lines()
        assert line.startswith(f"error: process 1 ({socket.gethostname()}): {says}"), line


@pytest.fixture
def two_hosts() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Two network namespaces with a cable between them: how to run something in each, and the first one's address."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip`")
    mark = secrets.token_hex(3)
    names = [f"tk{mark}{side}" for side in "ab"]
    cable = [f"v{mark}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        first, second = (("ip", "netns", "exec", name, sys.executable, "-m", "trainkit") for name in names)
        yield first, second, "10.213.7.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["MULTI_CPU", "FSDP"])
def test_two_hosts(bench: Workbench, two_hosts: tuple[tuple[str, ...], tuple[str, ...], str], kind: str) -> None:
    """Each sees the other over one cable only, and the folder that both share."""
    *programs, address = two_hosts
    changes = {"distributed_type": kind} | ({"fsdp_config": {"fsdp_version": 2}} if kind == "FSDP" else {})
    reference = bench.run(bench.recipe(f"hosts-one-{kind}"))
    recipe = bench.recipe(f"hosts-{kind}")
    started: list[Started] = []
    for rank, program in enumerate(programs):
        file = machine_file(bench, f"hosts-{kind}", rank, address, 29517, **changes)
        started.append(bench.start(recipe, None, "--launch", str(file), program=program))
    first, second = (one.end() for one in started)
    assert (first.code, second.code) == (0, 0), first.said + second.said
    difference = largest_difference(first, reference)
    print(f"{kind} on two hosts: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= 1e-6
    assert second.said == ""


@pytest.mark.long
def test_one_that_hangs_alone_on_its_host_is_killed_by_its_launcher(
    bench: Workbench, two_hosts: tuple[tuple[str, ...], tuple[str, ...], str]
) -> None:
    """No process beside it can do that. The second host has a name of its own."""
    *programs, address = two_hosts
    renamed = ("unshare", "--uts", "sh", "-c", 'hostname second-host && exec "$@"', "sh")
    recipe = bench.recipe("hanging-host")
    started: list[Started] = []
    for rank, program in enumerate([programs[0], (*renamed, *programs[1])]):
        file = machine_file(bench, "hanging-host", rank, address, 29518)
        started.append(bench.start(recipe, None, "--launch", str(file), program=program))
    started[0].wait_for_step(6)
    stopped = started[1].workers()[0]
    stopped.suspend()
    begun = time.monotonic()
    first = started[0].end()
    print(f"the first host ended after {time.monotonic() - begun:.1f} s")
    assert first.code == 75, first.said
    [line] = first.error_lines()
    assert line.startswith(f"error: process 1 (pid {stopped.pid} on second-host) has not answered for 90 seconds")
    assert time.monotonic() - begun < 120
    second = started[1].end()
    print(f"the second host ended after {time.monotonic() - begun:.1f} s")
    assert second.code == 75, second.said
    [line] = second.error_lines()
    assert line.startswith("error: process 1 was killed (SIGKILL)")
