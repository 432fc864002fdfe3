"""A recipe that is written reads back to the equal recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trainkit.recipe.checks import conflicts
from trainkit.recipe.keys import Bounds, Key, keys_of, members
from trainkit.recipe.reader import read_recipe, recipe_as_yaml
from trainkit.recipe.schema import Adapter, Data, Evaluation, Model, Packing, Recipe, Source, Training
from trainkit.recipe.written import text_as_yaml, value_as_yaml
from trainkit.recipe.yaml_nodes import Place, Scalar, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Callable

TRICKY = ["no", "1e-4", "010", "1_000", "null", "~", "1:30", "a: b", "- x", "#", "é", " x ", "2024-01-01", "😀"]
TRICKY += ["\ufeff", "\u2028", "\x7f"]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12) | st.sampled_from(TRICKY)


def numbers(kind: type, bounds: Bounds) -> st.SearchStrategy[Any]:
    low = bounds.at_least if bounds.at_least is not None else bounds.above
    high = bounds.at_most if bounds.at_most is not None else bounds.below
    if kind is int:
        return st.integers(None if low is None else int(low), 2**40 if high is None else int(high)).filter(bounds.hold)
    return st.floats(low, high, allow_nan=False, allow_infinity=False).filter(bounds.hold)


def values(hint: Any, bounds: Bounds) -> st.SearchStrategy[Any]:
    """Any value that a key allows."""
    if len(members(hint)) > 1:
        return st.one_of([values(member, bounds) for member in members(hint)])
    if hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint in (int, float):
        return numbers(hint, bounds)
    if hint is str:
        return TEXTS
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        smallest = 1 if inner is Source else 0
        unique = inner is not Source
        return st.lists(values(inner, bounds), min_size=smallest, max_size=3, unique=unique).map(tuple)
    if get_origin(hint) is dict:
        return st.dictionaries(TEXTS, values(get_args(hint)[1], bounds), max_size=2)
    assert is_dataclass(hint)
    return sections(hint)


def sections(section: Any) -> st.SearchStrategy[Any]:
    def strategy(key: Key) -> st.SearchStrategy[Any]:
        return values(key.hint, key.bounds)

    return st.builds(section, **{name: strategy(key) for name, key in keys_of(section).items()})


@st.composite
def valid_recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe; what must hold between its keys is set right afterwards."""
    recipe: Recipe = draw(sections(Recipe))
    packing = dataclasses.replace(recipe.packing, overlap=draw(st.integers(1, recipe.packing.sequence_length // 2)))
    packing = dataclasses.replace(
        packing, train_on_overlap=packing.train_on_overlap and packing.long_documents == "split"
    )
    rows = draw(st.integers(1, 100))
    by_steps, by_ratio = draw(st.booleans()), draw(st.booleans())
    training = dataclasses.replace(
        recipe.training,
        tokens_per_step=rows * packing.sequence_length,
        micro_batch_size=draw(st.one_of(st.just("auto"), st.integers(1, rows))),
        steps=7 if by_steps else None,
        epochs=None if by_steps else 0.5,
        warmup_steps=None if by_ratio else recipe.training.warmup_steps,
        warmup_ratio=recipe.training.warmup_ratio if by_ratio else None,
    )
    weighed = draw(st.booleans())
    train = tuple(dataclasses.replace(source, weight=2.0 if weighed else None) for source in recipe.data.train)
    data = dataclasses.replace(recipe.data, train=train)
    evaluation = recipe.evaluation if data.eval else dataclasses.replace(recipe.evaluation, exact_match=0)
    made = dataclasses.replace(recipe, packing=packing, training=training, data=data, evaluation=evaluation)
    assume(not list(conflicts(made)))
    return made


def read_back(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    return read_recipe(str(path)).recipe


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(valid_recipes(), st.sampled_from([None, "about {}".format]))
def test_any_recipe_reads_back_equal(tmp_path: Path, recipe: Recipe, comment: Callable[[str], str] | None) -> None:
    assert read_back(recipe_as_yaml(recipe, comment), tmp_path) == recipe


@given(TEXTS)
def test_text_is_text_to_readers_of_both_yamls(text: str) -> None:
    written = text_as_yaml(text)
    node = parse_yaml(written, lambda line, column: Place("", line, column), [])
    assert isinstance(node, Scalar)
    assert node.value == text
    assert yaml.safe_load(written) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_numbers_to_readers_of_both_yamls(number: float) -> None:
    assert yaml.safe_load(value_as_yaml(number)) == number


def small(**more: Any) -> Recipe:
    return Recipe(
        model=Model(name="tiny"),
        data=Data(train=(Source(path="a"),)),
        training=Training(epochs=1),
        output_dir="o",
        **more,
    )


def test_what_is_inert_at_its_default_is_written_as_a_comment() -> None:
    lines = recipe_as_yaml(small(packing=Packing(long_documents="truncate"))).splitlines()
    (overlap,) = [line.split() for line in lines if "overlap: 64" in line]
    assert " ".join(overlap).startswith("# overlap: 64 # no effect: only `long_documents: split` makes overlap")
    assert "  samples: 5" in recipe_as_yaml(small(evaluation=Evaluation(samples=5))).splitlines()


def test_what_was_written_gives_no_new_warning(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        recipe_as_yaml(small(packing=Packing(long_documents="drop"), adapter=Adapter()))
    )
    assert read_recipe(str(tmp_path / "recipe.yaml")).warnings == ()


def test_comments_stand_in_one_column() -> None:
    lines = recipe_as_yaml(small(), lambda _key: "said").splitlines()
    assert len({line.index("# said") for line in lines if "# said" in line}) == 1
