"""From a recipe to what decides its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainkit.errors import MachineError
from trainkit.memory.scenario import AMPERE, Device, Scenario, scenario_of
from trainkit.recipe.schema import Adapter, Data, Model, Packing, Recipe, Source, Training

RECIPE = Recipe(
    model=Model(name="some/model", activation_checkpointing=True),
    adapter=Adapter(type="qlora", r=4),
    data=Data(train=(Source(path="data.jsonl"),)),
    packing=Packing(sequence_length=512),
    training=Training(steps=1, tokens_per_step=8192, micro_batch_size=4, optimizer="adamw_8bit"),
    output_dir="run",
)


def test_a_recipe_says_everything_but_the_device() -> None:
    found = scenario_of(RECIPE, {"model_type": "llama"}, device=Device("cuda", (8, 6)))
    assert found == Scenario(
        config={"model_type": "llama"},
        sequence_length=512,
        micro_batch_size=4,
        micro_batches=4,
        adapter=RECIPE.adapter,
        activation_checkpointing=True,
        optimizer="adamw_8bit",
        device=Device("cuda", (8, 6)),
    )
    assert (found.tokens, found.method) == (2048, "qlora")


@pytest.mark.parametrize(
    ("rows", "gpus", "expected"),
    [("auto", 1, (1, 16)), (5, 1, (5, 4)), (16, 1, (16, 1)), (16, 4, (4, 1)), (1, 4, (1, 4))],
)
def test_a_step_is_cut_into_micro_batches(rows: Any, gpus: int, expected: tuple[int, int]) -> None:
    recipe = replace(RECIPE, training=replace(RECIPE.training, micro_batch_size=rows))
    found = scenario_of(recipe, {}, gpus=gpus, shard="ddp")
    assert (found.micro_batch_size, found.micro_batches) == expected


def test_another_micro_batch_keeps_the_tokens_of_a_step() -> None:
    found = scenario_of(RECIPE, {}).with_micro_batch_size(16)
    assert (found.micro_batch_size, found.micro_batches) == (16, 1)
    assert found.with_micro_batch_size(2).micro_batches == 8


def test_documents_cost_a_copy_only_where_the_kernel_takes_them_one_by_one() -> None:
    cpu, turing, ampere = Device("cpu"), Device("cuda", (7, 5)), Device("cuda", AMPERE)
    counts = [scenario_of(RECIPE, {}, device=device).documents_per_row for device in (cpu, turing, ampere)]
    assert counts == [2, 2, 1]
    joined = replace(RECIPE, packing=replace(RECIPE.packing, isolate_documents=False))
    assert scenario_of(joined, {}, device=cpu).documents_per_row == 1


def test_the_precision_is_the_devices_and_must_be_one_that_it_has() -> None:
    turing = Device("cuda", (7, 5))
    assert [scenario_of(RECIPE, {}, device=device).precision for device in (Device("cpu"), turing)] == ["fp32", "fp16"]
    with pytest.raises(MachineError, match="precision: this GPU has no bf16 arithmetic; set precision: fp16"):
        scenario_of(replace(RECIPE, precision="bf16"), {}, device=turing)
