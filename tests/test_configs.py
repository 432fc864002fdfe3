"""The launch files in configs/: Accelerate accepts each, and a launched process is what the file says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LAUNCH_FILES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "gpus.yaml")  # which is a table


def test_there_are_launch_files() -> None:
    assert {path.name for path in LAUNCH_FILES} >= {"cpu.yaml", "one-gpu.yaml"}


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_accelerate_accepts_it_and_it_leaves_precision_to_the_recipe(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 1
    assert config.mixed_precision == "no"
    assert config.use_cpu == (path.name == "cpu.yaml")


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_its_first_lines_say_how_to_use_it(path: Path) -> None:
    assert f"accelerate launch --config_file configs/{path.name} -m trainkit fine-tune RECIPE" in path.read_text()


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
