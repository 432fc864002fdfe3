"""The README's tour and every shipped recipe, as a reader would run them: the installed program, an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
PROGRAM = Path(sys.executable).with_name("trainkit")
SHIPPED = REPOSITORY / "trainkit" / "shipped"
RECIPES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))
LAUNCH_FILES = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.name != "gpus.yaml")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRAINKIT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def test_the_tour_in_its_order(tmp_path: Path) -> None:
    """Every trainkit command of the README, with a model folder and a train.jsonl as its own recipe names them."""
    [recipe] = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    model = tmp_path / "models" / "my-model"
    shutil.copytree(SHIPPED / "models" / "tiny", model, ignore=shutil.ignore_patterns("SHA256SUMS"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    lines = (SHIPPED / "data" / "quickstart" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:300]))
    commands = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
    tour = [command for command in commands if command[:1] == ["trainkit"]]
    assert [command[1] for command in tour].count("fine-tune") == 3
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    for command in tour:
        # Two processes on the CPU stand for two GPUs.
        on_this_machine = [word.replace("configs/fsdp2.yaml", "configs/cpu-fsdp2.yaml") for word in command[1:]]
        run([str(PROGRAM), *on_this_machine], tmp_path)
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["exact_match_before"] <= 0.1
    assert summary["exact_match_after"] >= 0.8
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    for block in blocks("python"):
        run([sys.executable, "-c", block], tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name: str, tmp_path: Path) -> None:
    few = ["training.epochs=null", "training.steps=2", "evaluation.exact_match=2", "evaluation.max_new_tokens=4"]
    overrides = [argument for setting in few for argument in ("--set", setting)]
    finished = run([str(PROGRAM), "fine-tune", name, "--json", *overrides], tmp_path)
    summary = json.loads(finished.stdout)
    assert summary["steps"] == 2
    assert (Path(summary["final"]) / "README.md").is_file()


@pytest.mark.parametrize("launch_file", LAUNCH_FILES, ids=lambda path: path.stem)
def test_every_launch_file_launches(launch_file: Path, tmp_path: Path) -> None:
    said = launch_file.read_text()
    if "num_machines: 1\n" not in said:
        pytest.skip("needs several machines; tests/distributed has two of them")
    if "use_cpu: true" not in said:
        pytest.importorskip("torch").cuda.is_available() or pytest.skip("needs a GPU")
    few = ["--set", "training.epochs=null", "--set", "training.steps=1", "--set", "evaluation.exact_match=0"]
    if "num_processes: 1\n" not in said:
        run([str(PROGRAM), "fine-tune", "quickstart", "--launch", str(launch_file), *few], tmp_path)
        assert (tmp_path / "runs" / "quickstart" / "final").is_dir()
        return
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file)]
    run([*launcher, "-m", "trainkit", "fine-tune", "quickstart", *few], tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "final").is_dir()
