"""Unknown keys: what is suggested, from near to far."""

from __future__ import annotations

import pytest

from trainkit.recipe.schema import Recipe, Source
from trainkit.recipe.values import Notes, section_of
from trainkit.recipe.yaml_nodes import Mapping, Place, parse_yaml

MINIMAL = "model: {name: tiny}\ndata: {train: a}\noutput_dir: o\n"


def notes_of(text: str) -> tuple[Recipe, Notes]:
    root = parse_yaml(text, lambda line, column: Place("r.yaml", line, column), [])
    assert isinstance(root, Mapping)
    notes = Notes(root)
    return section_of(root, Recipe, "", notes), notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rte: 1}", "training.learning_rte: unknown key; did you mean `learning_rate`?"),
        ("training: {Seed: 1}", "training.Seed: unknown key; keys are written small: `seed`"),
        ("training: {}\nlearning_rate: 1", "learning_rate: unknown key here; it belongs under `training`"),
        ("training: {output_dir: x}", "training.output_dir: unknown key here; it belongs under no section"),
        (
            "training: {}\nevery_steps: 1",
            "every_steps: unknown key here; it belongs under `evaluation` or `checkpoints`",
        ),
        ("training: {}\nsequence_lenght: 1", "sequence_lenght: unknown key; did you mean `packing.sequence_length`?"),
        ("training: {}\nadpter: {r: 4}", "adpter: unknown key; did you mean `adapter`?"),
        (
            "training: {num_epochs: 3}",
            "training.num_epochs: the name in axolotl; here write `epochs: 3` under `training`",
        ),
        (
            "training: {}\nadapter: {lora_alpha: 3}",
            "adapter.lora_alpha: the name in peft, axolotl, TRL; here write `alpha: 3`",
        ),
        (
            "training: {}\nevaluation: {frobnicate: 1}",
            "evaluation.frobnicate: unknown key; the keys here are every_steps, samples, exact_match, max_new_tokens",
        ),
    ],
)
def test_an_unknown_key_gets_the_best_suggestion(text: str, message: str) -> None:
    _, notes = notes_of(MINIMAL + text)
    assert [line for line in map(str, notes.mistakes) if message in line], notes.mistakes


def test_a_recipe_with_mistakes_has_stand_ins_and_says_where_they_are() -> None:
    recipe, notes = notes_of("model: {name: 3}\ndata: {train: [{path: 1}]}\ntraining: {seed: x}\nadapter: 3\n")
    assert recipe.model.name == "?"
    assert recipe.data.train == (Source(path="?"),)
    assert recipe.training.seed == 42
    assert recipe.adapter is None
    assert notes.bad == {"model.name", "data.train[0].path", "training.seed", "adapter", "output_dir"}
    assert notes.is_bad("data.train")
    assert notes.is_bad("adapter.r")
    assert not notes.is_bad("training.steps")
    assert not notes.is_bad("model.revision")
