"""However a run trains, it is resumed to the same bits: in the middle of an epoch and at its end, on every axis."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import merged
from tests.faults.forks import Fault, Forks, lines_of, tell

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.faults.conftest import Tally

METHODS = ("full", "lora", "qlora")
PACKINGS = ("best-fit", "none")
ACCUMULATIONS = (1, 3)
DROPOUTS = (0.0, 0.1)
CELLS = [
    pytest.param(*cell, id="-".join(map(str, cell)))
    for cell in itertools.product(METHODS, PACKINGS, ACCUMULATIONS, DROPOUTS)
]
FURTHER: dict[str, dict[str, Any]] = {
    "sgd": {"training": {"optimizer": "sgd"}},
    "adafactor": {"training": {"optimizer": "adafactor"}},
    "adamw_8bit": {"training": {"optimizer": "adamw_8bit"}},
    "adamw_8bit-full": {"adapter": None, "training": {"optimizer": "adamw_8bit", "learning_rate": 1e-3}},
    "bf16": {"precision": "bf16"},
    "dora": {"adapter": {"use_dora": True}},
    "modules_to_save": {"adapter": {"modules_to_save": ["lm_head"]}},
    "activation_checkpointing": {"model": {"activation_checkpointing": True}},
    "wsd": {"training": {"lr_scheduler": "wsd", "warmup_steps": 2, "weight_decay": 0.1}},
    "weights_of_sources": {},
}


def recipe_of(model: Path, data: Path, method: str, packing: str, accumulation: int, dropout: float) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "model": {"name": str(model)},
        "precision": "fp32",
        "data": {"train": str(data)},
        "packing": {"sequence_length": 128, "overlap": 8, "strategy": packing},
        "training": {"epochs": 2, "tokens_per_step": 1024, "micro_batch_size": 8 // accumulation + accumulation // 2},
        "evaluation": {"every_steps": None, "samples": 0},
        "checkpoints": {"every_steps": None, "keep_last": 1, "keep_best": False},
    }
    if method != "full":
        recipe["adapter"] = {"type": method, "r": 4, "alpha": 8, "dropout": dropout}
    recipe["training"]["learning_rate"] = 1e-3 if method == "full" else 1e-2
    return recipe


def with_dropout(model: Path, folder: Path, dropout: float) -> Path:
    """The model with dropout of its own."""
    if dropout:
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
        return folder
    return model


def check(forks: Forks, recipe: Mapping[str, Any], tmp_path: Path, tally: Tally) -> None:
    """Kill a run after the save in the middle of its first epoch, and another after the save at that epoch's end."""
    story = tell(forks, tmp_path / "uninterrupted", recipe)
    steps = [json.loads(line) for line in lines_of(tmp_path / "uninterrupted" / "metrics.jsonl")]
    in_epoch = sum(line["epoch"] == 0 for line in steps)
    assert 3 <= in_epoch < len(steps) - 2
    for where, saved in (("middle", in_epoch // 2 + 1), ("end", in_epoch)):
        folder = tmp_path / where
        command = story.command(folder, {"checkpoints": {"every_steps": saved, "keep_last": 1, "keep_best": False}})
        fault = Fault(
            at=saved + 2,
            path=r"metrics\.jsonl$",
            operation="write",
            wait_for=str(folder / "checkpoints" / f"step-{saved:06d}"),
            signal=signal.SIGKILL,
        )
        killed = forks.run(command, fault=fault)
        again = forks.run(command)
        problems = [] if killed.code == -signal.SIGKILL else [f"not killed: {killed.code} {killed.said[-300:]}"]
        if again.code != 0 or again.continued_after != saved:
            problems.append(f"exit code {again.code}, continued after {again.continued_after}: {again.said[-300:]}")
        else:
            problems += story.differences(folder)
        tally.count(where, problems)
    tally.note(at_least=2)


@pytest.mark.goal("A2 cells: method, packing, accumulation, dropout, place in the epoch")
@pytest.mark.long
@pytest.mark.parametrize(("method", "packing", "accumulation", "dropout"), CELLS)
def test_in_every_cell_it_ends_in_the_same_bits(
    method: str,
    packing: str,
    accumulation: int,
    dropout: float,
    forks: Forks,
    tiny_model_folder: Path,
    model_for_4_bit: Path,
    conversations_file: Path,
    tmp_path: Path,
    tally: Tally,
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    model = model_for_4_bit if method == "qlora" else tiny_model_folder
    if method == "full":
        model = with_dropout(model, tmp_path / "model", dropout)
    check(forks, recipe_of(model, conversations_file, method, packing, accumulation, dropout), tmp_path, tally)


@pytest.mark.goal("A2 further cells: optimizer, precision, kind of adapter, schedule, mix")
@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER)
def test_in_further_cells_it_ends_in_the_same_bits(
    name: str, forks: Forks, tiny_model_folder: Path, conversations_file: Path, tmp_path: Path, tally: Tally
) -> None:
    if name.startswith("adamw_8bit"):
        pytest.importorskip("bitsandbytes")
    recipe = recipe_of(tiny_model_folder, conversations_file, "lora", "best-fit", 3, 0.1)
    if name == "weights_of_sources":
        other = tmp_path / "other.jsonl"
        shutil.copy(conversations_file, other)
        sources = [{"path": str(conversations_file), "weight": 2.0}, {"path": str(other), "weight": 1.0}]
        recipe["data"]["train"] = sources
    else:
        recipe = merged(recipe, FURTHER[name])
    check(forks, recipe, tmp_path, tally)
