"""A run is never continued with something else than it began with: each difference is found and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.forks import Fault, Forks, Story, published, tell
from trainkit.errors import CheckpointError
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe, Source
from trainkit.run_folder import RunFolder
from trainkit.training.run_record import FITTING, FREE_TO_CHANGE, LENGTH, POLICY, begin_run, check_continuation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.conftest import Tally


def other_value(value: Any, hint: Any) -> Any:
    """A value of the type ``hint`` that is not ``value``."""
    for option in typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,):
        if (found := _of_type(value, option)) is not None and found != value:
            return found
    raise AssertionError(f"no other value than {value!r} of {hint}")


def _of_type(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return next((option for option in arguments if option != value), None)
    if origin is tuple:
        return () if value else (_of_type(None, arguments[0]),)
    if origin is dict:
        return {"another": _of_type(None, arguments[1])}
    if hint is bool:
        return not value
    if hint in {int, float}:
        return hint(value * 2 + 1 if isinstance(value, int | float) else 1)
    if hint is str:
        return "another"
    return Source(path="another") if hint is Source else None


def changed_recipes(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that a recipe has by the schema, each with the recipe in which it alone has another value."""
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            for inner, changed in changed_recipes(value, f"{name}."):
                yield inner, dataclasses.replace(part, **{field.name: changed})
        else:
            yield name, dataclasses.replace(part, **{field.name: other_value(value, hints[field.name])})
    if prefix == "":
        yield "adapter", dataclasses.replace(part, adapter=None)


@pytest.mark.goal("A12 a changed key of the recipe: refused and named, or free to change")
def test_every_key_of_the_schema(small: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**small, "output_dir": str(tmp_path / "run")}))
    recipe = read_recipe(str(path)).recipe
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    record = begin_run(folder, recipe, data_key="data", base_model="base", micro_batch_size=3)
    begun = read_recipe(str(folder.recipe)).recipe
    assert check_continuation(folder, record, begun, data_key="data", base_model="base") == []
    names = []
    for name, changed in changed_recipes(begun):
        assert isinstance(changed, Recipe)
        names.append(name)
        free = name.split(".")[0] in FREE_TO_CHANGE or name in LENGTH + FITTING + POLICY
        try:
            check_continuation(folder, record, changed, data_key="data", base_model="base")
            problems = [] if free else ["accepted"]
        except CheckpointError as error:
            problems = ["refused"] if free else [] if name in str(error) and "→" in str(error) else [str(error)]
        tally.count(name, problems)
    assert {"model.name", "adapter.r", "data.train", "packing.overlap", "training.seed", "precision"} <= set(names)
    tally.note(at_least=56)


def one_word(place: Path) -> None:
    path = place / "data.jsonl"
    path.write_text(path.read_text().replace("quick", "quack", 1))


def one_row_less(place: Path) -> None:
    path = place / "data.jsonl"
    path.write_text(path.read_text().partition("\n")[2])


def order_of_rows(place: Path) -> None:
    path = place / "data.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")


def in_json(place: Path, name: str, change: Callable[[Any], None]) -> None:
    path = place / "model" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def tokenizer_merges(place: Path) -> None:
    in_json(place, "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop())


def chat_template(place: Path) -> None:
    path = place / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|end|> ", 1))


def config_of_model(place: Path) -> None:
    in_json(place, "config.json", lambda config: config.update(rms_norm_eps=1e-4))


def in_weights(place: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = place / "model" / "model.safetensors"
    save_file({name: change(weight) for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})


def type_of_weights(place: Path) -> None:
    in_weights(place, lambda weight: weight.to(torch.bfloat16))


def values_of_weights(place: Path) -> None:
    in_weights(place, lambda weight: weight * 1.001)


CHANGES = [
    one_word,
    one_row_less,
    order_of_rows,
    tokenizer_merges,
    chat_template,
    config_of_model,
    type_of_weights,
    values_of_weights,
]


@pytest.fixture(scope="session")
def begun(
    forks: Forks, small: dict[str, Any], tiny_model_folder: Path, conversations_file: Path
) -> tuple[Story, Path, Path]:
    """A run of its own model and data that was killed, and where these lie."""
    place = forks.folder / "inputs"
    place.mkdir()
    shutil.copytree(tiny_model_folder, place / "model")
    shutil.copy(conversations_file, place / "data.jsonl")
    recipe = {**small, "model": {"name": str(place / "model")}}
    recipe["data"] = {**small["data"], "train": str(place / "data.jsonl")}
    story = tell(forks, forks.folder / "of-these-inputs", recipe)
    folder = forks.folder / "begun"
    fault = Fault(at=9, path=r"metrics\.jsonl$", operation="write", signal=signal.SIGKILL)
    assert forks.run(story.command(folder), fault=fault).code == -signal.SIGKILL
    assert published(folder)
    return story, place, folder


@pytest.mark.goal("A12 changed content of data, tokenizer, template, base model: refused and named")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_content_is_refused_and_nothing_is_touched(
    begun: tuple[Story, Path, Path], tmp_path: Path, change: Callable[[Path], None], tally: Tally
) -> None:
    story, place, folder = begun
    kept = tmp_path / "kept"
    shutil.copytree(place, kept)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change(place)
    refused = story.forks.run(story.command(folder))
    shutil.rmtree(place)
    shutil.copytree(kept, place)
    of_model = {config_of_model, type_of_weights, values_of_weights}
    what = "the base model" if change in of_model else "the data, the tokenizer"
    problems = [] if refused.code == 6 and what in refused.said else [f"{refused.code}: {refused.said[-400:]}"]
    if before != {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}:
        problems.append("something was changed")
    tally.count(change.__name__, problems)
    tally.note()


def test_with_the_same_inputs_it_goes_on(begun: tuple[Story, Path, Path], tmp_path: Path) -> None:
    story, _, folder = begun
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    assert story.forks.run(story.command(copied)).code == 0
    assert story.differences(copied) == []
