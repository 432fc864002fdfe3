"""What the schema says, as it is asked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainkit.recipe.keys import Bounds, all_keys, edit_distance, in_words, keys_of, nearest
from trainkit.recipe.schema import Recipe, Source

words = st.text("abcd", max_size=8)


@given(words, words)
def test_edit_distance_is_a_distance(one: str, other: str) -> None:
    distance = edit_distance(one, other)
    assert distance == edit_distance(other, one)
    assert (distance == 0) == (one == other)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))


def test_a_swap_of_neighbours_is_one_edit() -> None:
    assert edit_distance("leanring", "learning") == 1
    assert edit_distance("tarin", "train") == 1


def test_nearest_needs_most_of_a_short_word() -> None:
    assert nearest("evl", ("eval", "all")) == "eval"
    assert nearest("lr", ("r", "alpha")) is None
    assert nearest("wieght", ("weight", "path")) == "weight"
    assert nearest("x" * 50, ("x" * 50,)) is None


def test_every_key_is_documented() -> None:
    assert [name for name, key in all_keys().items() if len(key.doc) < 4] == []


def test_only_what_has_no_sensible_default_is_required() -> None:
    required = {name for name, key in all_keys().items() if key.required}
    assert required == {"model", "model.name", "data", "data.train", "data.train.path", "training", "output_dir"}


def test_bounds_in_words_and_in_deed() -> None:
    bounds = Bounds(above=0, below=1)
    assert bounds.in_words() == "above 0 and below 1"
    assert [bounds.hold(number) for number in (0, 0.5, 1)] == [False, True, False]
    closed = Bounds(at_least=0, at_most=1)
    assert [closed.hold(number) for number in (-0.1, 0, 1, 1.1)] == [False, True, True, False]


def test_types_in_words() -> None:
    assert in_words(keys_of(Source)["weight"].hint) == "a number or null"
    assert in_words(all_keys()["data.eval"].hint) == "a number, a path, a source or a list of them or null"
    assert in_words(keys_of(Recipe)["tracking"].hint) == "a list of `tensorboard`, `wandb` or `mlflow`"
