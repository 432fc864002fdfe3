"""The JSON Schema says what the reader says, as far as a schema can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from trainkit.recipe.json_schema import json_schema
from trainkit.recipe.keys import all_keys
from trainkit.recipe.reader import shipped_recipes
from trainkit.recipe.yaml_nodes import Items, Mapping, Node, Place, Scalar, parse_yaml

SMALL: dict[str, Any] = {
    "model": {"name": "tiny"},
    "data": {"train": "train.jsonl"},
    "training": {"epochs": 1},
    "output_dir": "runs/a",
}


def plain(node: Node | None) -> Any:
    """A YAML 1.2 tree as JSON values."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    assert isinstance(node, Mapping)
    return {name: plain(entry.node) for name, entry in node.entries.items()}


def is_valid(recipe: Any) -> bool:
    return Draft202012Validator(json_schema()).is_valid(recipe)


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=str)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert is_valid(plain(parse_yaml(path.read_text(), lambda line, column: Place("", line, column), [])))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"adapter": None},
        {"adapter": {"target_modules": ["q_proj"], "rank_pattern": {"q": 2}, "init_lora_weights": False}},
        {"data": {"train": ["a", {"path": "b", "weight": 2.5}], "eval": 0.1}},
        {"data": {"train": {"path": "b"}, "eval": ["c"]}},
        {"training": {"steps": 3, "micro_batch_size": 4, "max_grad_norm": None}},
        {"tracking": ["wandb"]},
    ],
)
def test_good_recipes_are_valid(change: dict[str, Any]) -> None:
    assert is_valid(SMALL | change)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_r": 8},
        {"model": {}},
        {"model": {"name": 3}},
        {"model": {"name": ""}},
        {"precision": False},
        {"adapter": {"r": 0}},
        {"adapter": {"target_modules": "q_proj"}},
        {"adapter": {"rank_pattern": {"q": 0}}},
        {"data": {"train": []}},
        {"data": {"train": "a", "eval": 1.5}},
        {"data": {"train": [{"pth": "a"}]}},
        {"training": {"epochs": 0}},
        {"training": {"epochs": "1"}},
        {"training": {"learning_rate": 0}},
        {"tracking": ["wandb", "wandb"]},
        {"training": None},
    ],
)
def test_mistakes_are_not(change: dict[str, Any]) -> None:
    assert not is_valid(SMALL | change)


def test_a_recipe_that_extends_another_may_be_partial() -> None:
    assert is_valid({"extends": "base.yaml", "training": {"seed": 3}, "model": {"attention": "sdpa"}})
    assert not is_valid({"training": {"seed": 3}})
    assert not is_valid({"extends": "base.yaml", "training": {"sed": 3}})


def test_every_key_is_described_with_its_default() -> None:
    schema = json_schema()
    for dotted, key in all_keys().items():
        properties = (
            schema["$defs"]["source"]["properties"] if dotted.startswith("data.train.") else schema["properties"]
        )
        path = dotted.removeprefix("data.train.").split(".")
        for name in path[:-1]:
            section = properties[name]
            properties = section.get("properties") or section["anyOf"][0]["properties"]
        entry = properties[path[-1]]
        if key.section is None:
            assert entry["description"].startswith(key.doc)
            assert key.required or "default" in entry
