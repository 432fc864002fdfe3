"""The launch files in configs/: Accelerate and `--launch` read each alike, and a launched process is what it says.

Those for several processes on a CPU are run in tests/distributed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.commands.launch import read_launch_file

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LAUNCH_FILES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "gpus.yaml")  # which is a table
SHARED_OUT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ON_A_CPU = {"ACCELERATE_USE_CPU": "true"}

# machines, processes on each of them, what the processes are told
SAID: dict[str, tuple[int, int, dict[str, str]]] = {
    "cpu.yaml": (1, 1, ON_A_CPU),
    "cpu-ddp.yaml": (1, 2, ON_A_CPU),
    "cpu-fsdp2.yaml": (1, 2, ON_A_CPU | SHARED_OUT),
    "one-gpu.yaml": (1, 1, {"CUDA_VISIBLE_DEVICES": "0"}),
    "ddp.yaml": (1, 2, {}),
    "fsdp2.yaml": (1, 2, SHARED_OUT),
    "two-machines.yaml": (2, 8, SHARED_OUT),
}


def test_each_launch_file_is_looked_at_here() -> None:
    assert {path.name for path in LAUNCH_FILES} == SAID.keys()


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_accelerate_accepts_it_and_it_leaves_precision_to_the_recipe(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    machines, each, told = SAID[path.name]
    assert (config.num_machines, config.num_processes) == (machines, machines * each)
    assert config.mixed_precision == "no"
    assert config.use_cpu == (told.get("ACCELERATE_USE_CPU") == "true")


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_reads_it_as_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    read = read_launch_file(str(path))
    assert (read.machines, read.processes, dict(read.environment)) == SAID[path.name]


def test_the_file_for_two_machines_says_where_they_meet() -> None:
    read = read_launch_file(str(CONFIGS / "two-machines.yaml"))
    assert (read.machine, read.address, read.port) == (0, "10.0.0.1", 29500)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_its_first_lines_say_how_to_use_it(path: Path) -> None:
    text = path.read_text()
    ours = f"trainkit fine-tune RECIPE --launch configs/{path.name}"
    accelerates = f"accelerate launch --config_file configs/{path.name} -m trainkit fine-tune RECIPE"
    machines, each, told = SAID[path.name]
    assert (ours in text) == (machines * each > 1)
    # On a CPU its launcher starts one process; several machines are described in docs/distributed.md.
    on_a_cpu = "ACCELERATE_USE_CPU" in told
    assert (accelerates in text) == (machines == 1 and not (on_a_cpu and each > 1))


def test_without_threads_asked_for_each_process_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(7)), raising=False)
    assert read_launch_file(str(CONFIGS / "cpu-ddp.yaml")).environment["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in read_launch_file(str(CONFIGS / "cpu.yaml")).environment


def test_a_process_launched_with_cpu_yaml_runs_on_the_cpu(tmp_path: Path) -> None:
    script = tmp_path / "where.py"
    script.write_text("from accelerate import Accelerator; a = Accelerator(); print(a.device, a.num_processes)")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launched = subprocess.run(
        [*command, "--config_file", str(CONFIGS / "cpu.yaml"), str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert launched.stdout.split() == ["cpu", "1"]
