from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainkit.cli import run as trainkit
from trainkit.model.adapters import attach_adapter
from trainkit.model.export import save_result
from trainkit.model.loading import load_model, load_tokenizer
from trainkit.model.locating import locate_model
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Adapter, Model
from trainkit.run_folder import RunFolder
from trainkit.training.run_record import continue_run, read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def make_run(tiny_model_folder: Path, tmp_path: Path) -> Callable[[Adapter | None], Path]:
    """`make_run(adapter)` leaves a run folder whose final/ is a trained adapter, or for None a full model."""

    def make(adapter: Adapter | None) -> Path:
        location = locate_model(Model(name=str(tiny_model_folder)))
        loaded = load_model(location, adapter, torch.float32, torch.device("cpu"))
        model, _ = attach_adapter(loaded.model, adapter, 0)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.01
        tokenizer = load_tokenizer(location)
        save_result(
            model, tokenizer, tmp_path / "run/final", location=location, recipe_yaml="", ledger_lines=[], metrics={}
        )
        return tmp_path / "run"

    return make


def test_merge_says_what_was_verified(
    make_run: Callable[[Adapter | None], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(Adapter(r=4))
    assert trainkit(["export", str(run), "--merge"]) == 0
    out = capsys.readouterr().out
    assert "14 of 21 tensors changed, exactly those with an adapter" in out
    assert f"written to {run / 'merged'}" in out
    AutoModelForCausalLM.from_pretrained(run / "merged")


def test_json_is_one_object(
    make_run: Callable[[Adapter | None], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(Adapter(r=4, target_modules=("q_proj",)))
    assert trainkit(["export", str(run), "--merge", "--output", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(tmp_path / "out")
    assert result["changed_tensors"] == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    assert result["logits_difference_relative"] <= result["tolerance_relative"]


def test_what_cannot_be_exported(
    make_run: Callable[[Adapter | None], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(Adapter(r=4))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ([str(run)], "--merge makes one model"),
        ([str(run), "--merge", "--output", str(tmp_path / "taken")], "exists already and is not overwritten"),
        ([str(tmp_path / "nowhere"), "--merge"], "no such run folder"),
        ([str(tmp_path / "empty"), "--merge"], "has no final/: the run is not finished"),
    ):
        assert trainkit(["export", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


def test_a_full_model_has_nothing_to_merge(
    make_run: Callable[[Adapter | None], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainkit(["export", str(make_run(None)), "--merge"]) == 2
    assert "is a full model, there is no adapter to merge" in capsys.readouterr().err


def test_the_result_of_a_run_that_has_gone_on_is_not_merged(
    fine_tune: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is there, and older than the run: of the steps that the run was first given."""
    folder = RunFolder(fine_tune().folder)
    finished = read_record(folder)
    assert finished is not None
    begun = continue_run(folder, finished, read_recipe(str(folder.recipe)).recipe, micro_batch_size=4)
    arguments = ["export", str(folder.root), "--merge", "--output", str(tmp_path / "merged")]
    for trusted, flag in (("", ""), ("a/b@c", " --trust-remote-code a/b@c")):
        write_record(folder, replace(begun, trusted_code=trusted))
        assert trainkit(arguments) == 2
        [line] = capfd.readouterr().err.splitlines()
        command = f"trainkit fine-tune {folder.recipe}{flag}"
        assert line.startswith(f"error: {folder.root}: the run is not finished, and final/ may be older; ")
        assert line.endswith(f"to finish it: {command}")
    assert not (tmp_path / "merged").exists()
    write_record(folder, finished)
    assert trainkit(arguments) == 0


@pytest.mark.parametrize("also_gone", ["adapter_model.safetensors", "SHA256SUMS"])
def test_an_adapter_without_its_configuration_is_no_full_model(
    make_run: Callable[[Adapter | None], Path], also_gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    final = make_run(Adapter(r=4)) / "final"
    (final / "adapter_config.json").unlink()
    (final / also_gone).unlink()
    assert trainkit(["export", str(final.parent), "--merge"]) == 4
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: {final / 'adapter_config.json'}: missing; restore it"
