"""What a run asks before it starts; a stand-in answers, so that the memory there is can be anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainkit.errors import MachineError, ModelError
from trainkit.memory.estimate import PARTS, Estimate
from trainkit.memory.fit import fit
from trainkit.memory.scenario import Scenario
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe

MIB = 2**20
CPU = torch.device("cpu")
A_ROW, STATES = 10 * MIB, 40 * MIB


def stand_in(scenario: Scenario, *, exact: bool = False) -> Estimate:
    assert scenario.device.kind == "cpu"
    row = A_ROW // 4 if scenario.activation_checkpointing else A_ROW
    peak = STATES + row * scenario.micro_batch_size
    parts = dict.fromkeys(PARTS, 0) | {"weights": STATES, "activations": peak - STATES}
    return Estimate(10**6, 10**6, peak, 2 * peak, "backward", "layer 1", parts, (), "trace", 1.0)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MiB are free; the process has 7 of its own."""
    monkeypatch.setattr("trainkit.memory.fit.estimate", stand_in)
    monkeypatch.setattr("trainkit.memory.fit.available_memory_bytes", lambda _device: 100 * MIB)
    monkeypatch.setattr("trainkit.memory.fit.process_memory_bytes", lambda: 7 * MIB)


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> Recipe:
    """8 rows of 128 tokens in a step."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny_model_folder}}}\ndata: {{train: a.jsonl}}\noutput_dir: runs/a\n"
        "packing: {sequence_length: 128}\ntraining: {steps: 1, tokens_per_step: 1024}\n"
    )
    return read_recipe(str(path)).recipe


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    return replace(recipe, training=replace(recipe.training, micro_batch_size=rows))


@pytest.mark.usefixtures("free")
def test_auto_takes_what_fits_and_divides_the_step(recipe: Recipe, tiny_model_folder: Path) -> None:
    found = fit(recipe, tiny_model_folder, CPU)
    assert found.micro_batch_size == 4  # five fit
    assert found.predicted_bytes == 7 * MIB + STATES + 4 * A_ROW
    assert found.sentences == (
        "a step takes 80.0 MiB of 100.0 MiB free on cpu (fits); the peak is in the backward phase",
    )


@pytest.mark.usefixtures("free")
def test_auto_goes_no_further_than_pays_on_a_cpu(
    recipe: Recipe, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainkit.memory.fit.CPU_MICRO_BATCH_TOKENS", 256)
    assert fit(recipe, tiny_model_folder, CPU).micro_batch_size == 2


@pytest.mark.usefixtures("free")
def test_a_given_micro_batch_is_kept_where_it_may_run(recipe: Recipe, tiny_model_folder: Path) -> None:
    found = fit(with_rows(recipe, 6), tiny_model_folder, CPU)
    assert found.micro_batch_size == 6
    assert "(tight)" in found.sentences[0]


@pytest.mark.usefixtures("free")
def test_what_cannot_fit_is_refused_with_what_would(recipe: Recipe, tiny_model_folder: Path) -> None:
    with pytest.raises(
        MachineError,
        match=r"memory: a step with 8 rows of 128 tokens takes .* cpu has .* free; with micro_batch_size: 4 it takes",
    ):
        fit(with_rows(recipe, 8), tiny_model_folder, CPU)


@pytest.mark.usefixtures("free")
def test_auto_is_refused_where_not_one_row_fits(
    recipe: Recipe, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainkit.memory.fit.available_memory_bytes", lambda _device: 45 * MIB)
    with pytest.raises(
        MachineError, match=r"1 row of 128 tokens takes .* with activation_checkpointing: true it takes"
    ):
        fit(recipe, tiny_model_folder, CPU)
    monkeypatch.setattr("trainkit.memory.fit.available_memory_bytes", lambda _device: 5 * MIB)
    with pytest.raises(MachineError, match="take a smaller model"):
        fit(recipe, tiny_model_folder, CPU)


@pytest.mark.usefixtures("free")
def test_a_model_that_cannot_be_traced_trains_all_the_same(
    recipe: Recipe, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(_scenario: Scenario) -> Estimate:
        raise ModelError("its step cannot be traced: it asks for data")

    monkeypatch.setattr("trainkit.memory.fit.estimate", untraceable)
    found = fit(recipe, tiny_model_folder, CPU)
    assert (found.micro_batch_size, found.predicted_bytes) == (1, None)
    assert found.sentences == (
        "not estimated: its step cannot be traced: it asks for data; training.micro_batch_size: auto is 1",
    )
    assert fit(with_rows(recipe, 2), tiny_model_folder, CPU).micro_batch_size == 2
