"""`pack-data` without a recipe: its options are one, read by the same reader."""

from __future__ import annotations

import pytest

from trainkit.errors import RecipeErrors, UsageError
from trainkit.recipe.packing_options import PackingOptions
from trainkit.recipe.reader import ReadRecipe, read_recipe
from trainkit.recipe.schema import Packing


def read(options: PackingOptions, *overrides: str) -> ReadRecipe:
    return read_recipe(None, overrides, options.flags(None, overrides))


def test_options_are_keys_and_what_they_leave_out_has_its_default() -> None:
    found = read(PackingOptions(("a.jsonl", "b's: #.jsonl"), "models/x", 1000, "plain"))
    assert [source.path for source in found.recipe.data.train] == ["a.jsonl", "b's: #.jsonl"]
    assert (found.recipe.model.name, found.recipe.data.chat_template) == ("models/x", "plain")
    assert found.recipe.packing == Packing(sequence_length=1000)
    assert found.warnings == ()
    assert found.origins["model.name"] == "--tokenizer"
    assert found.origins["packing.sequence_length"] == "--sequence-length"
    assert read(PackingOptions(("a.jsonl",), "x")).recipe.packing == Packing()


@pytest.mark.parametrize("sequence_length", [8, 9, 100, 127, 128, 129])
def test_a_short_row_has_an_overlap_that_fits(sequence_length: int) -> None:
    packing = read(PackingOptions(("a.jsonl",), "x", sequence_length)).recipe.packing
    assert packing.overlap == min(64, sequence_length // 2)


def test_set_goes_over_the_options() -> None:
    found = read(PackingOptions(("a.jsonl",), "x", 16), "packing.long_documents=drop", "training.seed=3")
    assert (found.recipe.packing.long_documents, found.recipe.training.seed) == ("drop", 3)
    assert found.warnings == ()
    assert read(PackingOptions(("a.jsonl",), "x", 16), "packing.overlap=0").recipe.packing.overlap == 0


@pytest.mark.parametrize(
    ("options", "recipe", "says"),
    [
        (PackingOptions(), None, "give a RECIPE, or --data and --tokenizer; see"),
        (PackingOptions(data=("a",)), None, "--data: needs --tokenizer beside it"),
        (PackingOptions(tokenizer="a"), None, "--tokenizer: needs --data beside it"),
        (PackingOptions(sequence_length=8), None, "--sequence-length: needs --data beside it"),
        (PackingOptions(data=("a",)), "r.yaml", r"--data: RECIPE says it already.*--set data\.train=VALUE"),
        (PackingOptions(tokenizer="a"), "r.yaml", r"--tokenizer: RECIPE .*--set model\.name="),
        (PackingOptions(sequence_length=8), "r.yaml", r"--sequence-length: .*--set packing\.sequence_length="),
        (PackingOptions(chat_template="a"), "r.yaml", r"--chat-template: .*--set data\.chat_template="),
    ],
)
def test_a_recipe_or_options_but_whole(options: PackingOptions, recipe: str | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        options.flags(recipe, ())


def test_nothing_is_added_to_a_recipe() -> None:
    assert PackingOptions().flags("r.yaml", ()) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (PackingOptions(("a",), "x", 1), "--sequence-length: must be at least 8; got 1"),
        (PackingOptions(("a",), "x", 0), "--sequence-length: must be at least 8; got 0"),
        (PackingOptions(("a",), "x", -3), "--sequence-length: must be at least 8; got -3"),
        (PackingOptions(("",), "x"), "--data: is empty"),
        (PackingOptions(("a",), ""), "--tokenizer: is empty"),
    ],
)
def test_a_wrong_value_is_said_of_the_option(options: PackingOptions, line: str) -> None:
    with pytest.raises(RecipeErrors) as raised:
        read(options)
    assert raised.value.lines == [line]


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(RecipeErrors) as raised:
        read(PackingOptions(("a\udc80",), "x"))
    assert "--data: the value is not UTF-8" in raised.value.lines
