"""What is said of a process that was given something else; that nothing is trained then is for tests/distributed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainkit.recipe.schema import Data, Model, Recipe, Source, Training
from trainkit.training.agreement import Given, disagreement, given_here

RECIPE = Recipe(
    model=Model(name="tiny"),
    data=Data(train=(Source(path="train.jsonl"),)),
    training=Training(steps=4),
    output_dir="run",
)


def given(recipe: Recipe = RECIPE, *, output_dir: str = "/runs/a", shards: bool = False, code: str = "") -> Given:
    found = given_here(
        recipe,
        output_dir=Path(output_dir),
        precision="fp32",
        shards=shards,
        trusted_code=code,
        data_key="data",
        base_model="base",
    )
    return Given(**json.loads(json.dumps(asdict(found))))


def test_what_is_written_otherwise_and_comes_to_the_same_is_the_same() -> None:
    assert disagreement([given(), given(replace(RECIPE, precision="fp32")), given()]) is None
    assert disagreement([given(), given(replace(RECIPE, output_dir="../runs/a"))]) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (given(replace(RECIPE, training=Training(steps=5))), "training.steps is 5, and 4 in process 0; give the same"),
        (given(replace(RECIPE, tracking=("wandb",))), "tracking.0 is wandb, and null in process 0; give the same"),
        (given(output_dir="/runs/b"), "output_dir is /runs/b, and /runs/a in process 0"),
        (given(shards=True), "distributed_type is FSDP2, and DDP in process 0"),
        (given(code="a/b@c"), "--trust-remote-code is a/b@c, and not given in process 0"),
        (replace(given(), choices=given().choices | {"precision": "bf16"}), "precision is bf16, and fp32 in process 0"),
        (replace(given(), data_key="other"), "data.train: its data, tokenizer or chat template are another copy"),
        (replace(given(), base_model="other"), "model.name: its base model is another copy"),
    ],
)
def test_the_first_process_that_differs_is_named_with_what_differs(other: Given, says: str) -> None:
    said = disagreement([given(), given(), replace(other, host="node2"), replace(other, host="node3")])
    assert said is not None
    assert said.startswith(f"process 2 (node2): {says}"), said


def test_the_line_is_short_whatever_the_values() -> None:
    longer = replace(RECIPE, model=Model(name="/" + 500 * "b"), data=Data(train=(Source(path=500 * "ä\n"),)))
    said = disagreement([given(output_dir="/" + 500 * "a"), replace(given(longer), host=300 * "h")])
    assert said is not None
    assert len(said) <= 200
    assert "\n" not in said
