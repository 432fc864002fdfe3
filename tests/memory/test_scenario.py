"""From a recipe to what decides its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainkit.memory.scenario import AMPERE, Device, Scenario, resolve_precision, scenario_of
from trainkit.model.precision import plan_precision
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


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_auto_is_the_precision_that_a_run_would_choose(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "some GPU")
    run = plan_precision("auto", torch.device("cuda"))
    assert resolve_precision("auto", Device("cuda", capability)) == run.name
    assert resolve_precision("auto", Device("cpu")) == plan_precision("auto", torch.device("cpu")).name
