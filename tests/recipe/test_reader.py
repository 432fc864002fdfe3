# ruff: noqa: E501 — the tables hold one case a line, and the line that it must get
"""The reader through real files: what is read, what is refused and with which line, where values come from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit.errors import RecipeErrors
from trainkit.recipe.keys import all_keys
from trainkit.recipe.reader import ReadRecipe, read_recipe, shipped_recipes
from trainkit.recipe.schema import Recipe, Source

SMALL = """\
model: {name: tiny}
data: {train: train.jsonl}
training: {epochs: 1}
output_dir: runs/a
"""

FULL = """\
model:
  name: tiny
precision: bf16
adapter:
  type: lora
  r: 16
  target_modules: [q_proj, v_proj]
  rank_pattern: {q_proj: 8}
data:
  train:
    - path: a.jsonl
      weight: 1
    - {path: b.jsonl, weight: 2.5, columns: {prompt: question}}
  eval: 0.05
packing:
  sequence_length: 512
training:
  steps: 100
  tokens_per_step: 4096
  learning_rate: 1e-4
evaluation: {every_steps: 100, samples: 4}
tracking: [tensorboard]
output_dir: runs/quickstart
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *overrides: str, name: str = "recipe.yaml") -> ReadRecipe:
    Path(name).write_text(text, encoding="utf-8")
    return read_recipe(name, overrides)


def lines_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.lines)
    assert all("\n" not in line for line in caught.value.lines)
    return caught.value.lines


def only_line_of(text: str, *overrides: str) -> str:
    lines = lines_of(text, *overrides)
    assert len(lines) == 1, lines
    assert len(lines[0]) <= 200, lines
    return lines[0]


# Reading


@pytest.mark.usefixtures("folder")
def test_a_small_recipe_gets_every_default() -> None:
    recipe = read(SMALL).recipe
    assert recipe.model.name == "tiny"
    assert recipe.data.train == (Source(path="train.jsonl"),)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.packing.sequence_length == 2048
    assert recipe.adapter is None


@pytest.mark.usefixtures("folder")
def test_a_full_recipe_is_read_as_written() -> None:
    got = read(FULL)
    assert got.warnings == ()
    recipe = got.recipe
    assert recipe.adapter is not None
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert recipe.adapter.rank_pattern == {"q_proj": 8}
    assert recipe.data.train == (
        Source(path="a.jsonl", weight=1.0),
        Source(path="b.jsonl", weight=2.5, columns={"prompt": "question"}),
    )
    assert recipe.data.eval == 0.05
    assert recipe.training.learning_rate == 1e-4
    assert recipe.tracking == ("tensorboard",)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("written", "sources"),
    [
        ("a.jsonl", (Source(path="a.jsonl"),)),
        ("[a.jsonl, {path: b}]", (Source(path="a.jsonl"), Source(path="b"))),
        ("{path: a, format: text}", (Source(path="a", format="text"),)),
    ],
)
@pytest.mark.parametrize("key", ["train", "eval"])
def test_sources_may_be_a_path_a_source_or_a_list(key: str, written: str, sources: tuple[Source, ...]) -> None:
    train = "" if key == "train" else "train: other.jsonl, "
    recipe = read(SMALL.replace("train: train.jsonl", f"{train}{key}: {written}")).recipe
    assert getattr(recipe.data, key) == sources


@pytest.mark.usefixtures("folder")
def test_origins_say_where_every_value_comes_from() -> None:
    origins = read(FULL, "training.seed=7").origins
    assert origins["model.name"] == "recipe.yaml:2"
    assert origins["adapter.rank_pattern"] == "recipe.yaml:8"
    assert origins["data.train[0].weight"] == "recipe.yaml:12"
    assert origins["data.train[1].path"] == "recipe.yaml:13"
    assert origins["data.train[1].format"] == "default"
    assert origins["training.seed"] == "--set"
    assert origins["training.weight_decay"] == "default"
    assert read(SMALL).origins["data.train[0].path"] == "recipe.yaml:2"
    sections = {"model", "data", "adapter", "packing", "training", "evaluation", "checkpoints"}
    plain = {key.replace("[0]", "").replace("[1]", "") for key in origins}
    assert plain == set(all_keys()) - sections - {"data.train"}


def test_the_path_that_was_read_is_kept(folder: Path) -> None:
    (folder / "r.yaml").write_text(SMALL)
    assert read_recipe("r.yaml").path == "r.yaml"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("training.learning_rate", "1e-4", 1e-4),  # bad-input row 1
        ("training.seed", "010", 10),  # row 9
        ("training.seed", "1e3", 1000),
        ("training.seed", "1000.0", 1000),
        ("training.micro_batch_size", "4", 4),
        ("training.max_grad_norm", "null", None),
        ("output_dir", "no", "no"),
        ("output_dir", "1:30", "1:30"),
        ("output_dir", "'1'", "1"),
        ("model.name", "1e", "1e"),
        ("adapter.init_lora_weights", "false", False),
        ("adapter.init_lora_weights", "gaussian", "gaussian"),
        ("adapter.alpha", "16", 16.0),
        ("data.eval", "null", None),
        ("data.eval", "quickstart", (Source(path="quickstart"),)),
    ],
)
def test_values_mean_what_yaml_1_2_says(key: str, written: str, value: object) -> None:
    got: object = read(SMALL, f"{key}={written}").recipe
    for name in key.split("."):
        got = getattr(got, name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "override", "warning"),
    [
        ("", "training.seed=010", "--set training.seed: `010` is read as 10; tools that follow YAML 1.1 read 8"),
        ("", "output_dir=no", "--set output_dir: `no` is read as the text `no`; tools that follow YAML 1.1 read false"),
        (
            "",
            "output_dir=1:30",
            "--set output_dir: `1:30` is read as the text `1:30`; tools that follow YAML 1.1 read a number",
        ),
        (
            "adapter:\n",
            "training.seed=1",
            "recipe.yaml:5:1: adapter: nothing stands under it, so every weight is trained",
        ),
    ],
)
def test_what_is_read_may_deserve_a_word(text: str, override: str, warning: str) -> None:
    (said,) = read(SMALL + text, override).warnings
    assert said.startswith(warning)


# Bad input, by the rows of the catalogue


TRAINING = SMALL.replace("{epochs: 1}", "\n  epochs: 1\n  seed: 1")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        # 2: a duplicate key
        (TRAINING.replace("seed", "epochs"), "recipe.yaml:5:3: training.epochs: given twice: first in line 4, again in line 5; keep one"),
        # 3: an unknown key
        (TRAINING.replace("seed", "learning_rte"), "recipe.yaml:5:3: training.learning_rte: unknown key; did you mean `learning_rate`?"),
        # 4: a wrong type
        (TRAINING.replace("epochs: 1", "epochs: three"), "recipe.yaml:4:11: training.epochs: expected a number or null; got the text `three`"),
        # 5: a tab
        (TRAINING.replace("  seed", "\tseed"), "recipe.yaml:5:1: a tab stands in the indentation; YAML indents by spaces only"),
        # 6: an unclosed bracket
        (SMALL.replace("tiny}", "tiny"), "recipe.yaml:2:5: not valid YAML: the `{` of line 1, column 8 is not closed before here"),
        # 7: an empty recipe
        ("", "recipe.yaml:1:1: the recipe is empty; it needs at least `model`, `data`, `training` and `output_dir`"),
        ("# only words\n", "recipe.yaml:1:1: the recipe is empty; it needs at least `model`, `data`, `training` and `output_dir`"),
        # 8: not one mapping
        ("- a\n", "recipe.yaml:1:1: a list stands at the top level; a recipe is made of sections: `model:`, `data:`, …"),
        ("tiny\n", "recipe.yaml:1:1: a single value stands at the top level; a recipe is made of sections: `model:`, `data:`, …"),
        (SMALL + "---\n" + SMALL, "recipe.yaml:5:1: a second document starts here (`---`); a recipe is one document"),
        # 9: YAML 1.1's surprises
        (SMALL + "precision: no\n", "recipe.yaml:5:12: precision: expected `fp32`, `fp16`, `bf16` or `auto`; got the text `no`; write `fp32`"),
        (TRAINING.replace("seed: 1", "seed: 1_000"), "recipe.yaml:5:9: training.seed: expected a whole number; got the text `1_000`; write 1000"),
        (TRAINING.replace("seed: 1", "seed: 1:30"), "recipe.yaml:5:9: training.seed: expected a whole number; got the text `1:30`"),
        (SMALL.replace("tiny", "tiny, activation_checkpointing: on"), "recipe.yaml:1:47: model.activation_checkpointing: expected true or false; got the text `on`; write true"),
        # 10: not finite
        (TRAINING.replace("seed: 1", "learning_rate: .nan"), "recipe.yaml:5:18: training.learning_rate: must be a finite number; got .nan"),
        (SMALL + "adapter: {alpha: .inf}\n", "recipe.yaml:5:18: adapter.alpha: must be a finite number; got .inf"),
        (TRAINING.replace("seed: 1", "seed: .nan"), "recipe.yaml:5:9: training.seed: must be a finite number; got .nan"),
        (TRAINING.replace("seed: 1", "weight_decay: 1e999"), "recipe.yaml:5:17: training.weight_decay: must be a finite number; got 1e999"),
        (TRAINING.replace("seed: 1", f"weight_decay: {'9' * 900}"), "recipe.yaml:5:17: training.weight_decay: must be a finite number; got " + "9" * 39 + "…"),
        # 13: a tag
        (SMALL.replace("runs/a", "!!python/object/apply:os.system [echo]"), "recipe.yaml:4:13: output_dir: the tag `tag:yaml.org,2002:python/object/apply:o…` is refused; a recipe holds plain text, numbers, lists and sections"),
        # 14, 16, 17, 18, 20: out of range
        (TRAINING.replace("seed: 1", "learning_rate: -1e-4"), "recipe.yaml:5:18: training.learning_rate: must be above 0 and at most 3.4e+38; got -1e-4"),
        (TRAINING.replace("seed: 1", "learning_rate: 0"), "recipe.yaml:5:18: training.learning_rate: must be above 0 and at most 3.4e+38; got 0"),
        (TRAINING.replace("seed: 1", "learning_rate: 1e308"), "recipe.yaml:5:18: training.learning_rate: must be above 0 and at most 3.4e+38; got 1e308"),
        (TRAINING.replace("seed: 1", "weight_decay: 1e39"), "recipe.yaml:5:17: training.weight_decay: must be at least 0 and at most 3.4e+38; got 1e39"),
        (TRAINING.replace("seed: 1", "micro_batch_size: 0"), "recipe.yaml:5:21: training.micro_batch_size: must be at least 1; got 0"),
        (TRAINING.replace("seed: 1", "micro_batch_size: -2"), "recipe.yaml:5:21: training.micro_batch_size: must be at least 1; got -2"),
        (TRAINING.replace("epochs: 1", "steps: 0"), "recipe.yaml:4:10: training.steps: must be at least 1; got 0"),
        (TRAINING.replace("epochs: 1", "steps: -1"), "recipe.yaml:4:10: training.steps: must be at least 1; got -1; leave the key out and give `epochs`"),
        (TRAINING.replace("epochs: 1", "epochs: -1"), "recipe.yaml:4:11: training.epochs: must be above 0; got -1"),
        (SMALL + "checkpoints: {every_steps: 0}\n", "recipe.yaml:5:28: checkpoints.every_steps: must be at least 1; got 0"),
        (SMALL + "adapter: {rank_pattern: {q: 0}}\n", "recipe.yaml:5:29: adapter.rank_pattern.q: must be at least 1; got 0"),
        # 15: gradient accumulation
        (TRAINING.replace("seed: 1", "gradient_accumulation: 0"), "recipe.yaml:5:3: training.gradient_accumulation: here it follows from `training.tokens_per_step`: rows per device × accumulation × sequence_length × devices"),
        # 21: an unknown optimizer, scheduler
        (TRAINING.replace("seed: 1", "optimizer: adamv"), "recipe.yaml:5:14: training.optimizer: expected `adamw`, `adamw_8bit`, `adafactor` or `sgd`; got the text `adamv`; did you mean `adamw`?"),
        (TRAINING.replace("seed: 1", "lr_scheduler: polynomial"), "recipe.yaml:5:17: training.lr_scheduler: expected `constant`, `linear`, `cosine` or `wsd`; got the text `polynomial`"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(text: str, line: str) -> None:
    lines = lines_of(text)
    assert lines[0] == line
    assert len(lines) == 1 or "!!python" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SMALL.encode("utf-16"), "recipe.yaml:1:1: is UTF-16; save it as UTF-8"),
        (SMALL.replace("runs/a", "runs/é").encode("latin-1"), "recipe.yaml:4:18: byte 0xe9 at offset 86 is not UTF-8"),
        (b"a: " + b"[" * 2000, "recipe.yaml:1:67: nested deeper than 64 levels"),
        (b"x" * ((1 << 20) + 1), "recipe.yaml:1:1: is larger than 1 MiB"),
    ],
)
def test_bytes_that_are_no_recipe(folder: Path, content: bytes, message: str) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeErrors) as caught:
        read_recipe("recipe.yaml")
    assert str(caught.value).startswith(message)


def test_a_byte_order_mark_is_no_mistake(folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(SMALL.encode("utf-8-sig"))
    assert read_recipe("recipe.yaml").recipe.model.name == "tiny"


@pytest.mark.usefixtures("folder")
def test_all_mistakes_come_at_once_and_in_order() -> None:
    lines = lines_of(
        """\
model: {nam: tiny}
training:
  epochs: three
  learning_rate: -1
  optimizer: adamv
output_dir: []
""",
        "packing.overlap=-1",
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:1:1", "data"],
        ["recipe.yaml:1:8", "model.name"],
        ["recipe.yaml:1:9", "model.nam"],
        ["recipe.yaml:3:11", "training.epochs"],
        ["recipe.yaml:4:18", "training.learning_rate"],
        ["recipe.yaml:5:14", "training.optimizer"],
        ["recipe.yaml:6:13", "output_dir"],
        ["--set packing.overlap", "must be at least 0; got -1"],
    ]


@pytest.mark.usefixtures("folder")
def test_a_file_full_of_mistakes_stops_at_a_hundred() -> None:
    text = SMALL + "".join(f"key_number_{n}: 1\n" for n in range(5000))
    start = time.process_time()
    lines = lines_of(text)
    assert time.process_time() - start < 2
    assert len(lines) == 101
    assert lines[-1] == "… and 4900 more mistakes"


# Values and hints


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('training.learning_rate="1e-4"', "expected a number; got the quoted text `1e-4`; write 1e-4 without quotes"),
        ("training.seed=65,536", "expected a whole number; got the text `65,536`; write 65536"),
        ("training.seed=1.5", "expected a whole number; got the number `1.5`"),
        ("training.seed=true", "expected a whole number; got `true`"),
        ("training.seed=null", "expected a whole number; got null; leave the key out for its default"),
        ("training.warmup_steps=0.03", "a share of the steps is `warmup_ratio`"),
        ("training.epochs=[1]", "expected a number or null; got a list"),
        ("training=5", "expected a section; got the number `5`"),
        ("model=tiny", "expected a section; got the text `tiny`; write `model: {name: tiny}`"),
        ("adapter=lora", "write `adapter: {type: lora}`"),
        ("adapter=none", "leave the section out"),
        ("packing=true", "write `packing: {strategy: best-fit}`"),
        ("data=a.jsonl", "write `data: {train: a.jsonl}`"),
        ("evaluation=50", "write `evaluation: {every_steps: 50}`"),
        ("adapter.target_modules=q_proj", "expected `all-linear` or a list of text; got the text `q_proj`; write [q_proj]"),
        ("adapter.target_modules=all", "write `all-linear`"),
        ("adapter.target_modules=[q_proj, q_proj]", "`q_proj` stands in the list twice"),
        ("adapter.target_modules=[]", "an empty list adapts nothing"),
        ("adapter.layers_to_transform=[]", "an empty list adapts nothing"),
        ("adapter.layers_to_transform=[0, -1]", "layers_to_transform[1]: must be at least 0; got -1"),
        ("adapter.rank_pattern=4", "expected a section of names with whole numbers; got the number `4`"),
        ("tracking=wandb", "expected a list of `tensorboard`, `wandb` or `mlflow`; got the text `wandb`; write [wandb]"),
        ("tracking=[wandbb]", "tracking[0]: expected `tensorboard`, `wandb` or `mlflow`; got the text `wandbb`; did you mean `wandb`?"),
        ("model.revision=1234567", 'expected text or null; got the number `1234567`; put it in quotes: "1234567"'),
        ("model.name=''", "is empty"),
        ("output_dir=[a]", "expected text; got a list; give one value without brackets"),
        ("data.train=[]", "an empty list; give at least one path or source"),
        ("data.train=5", "expected text; got the number `5`"),
        ("data.train=[{pth: a}]", "data.train[0].pth: unknown key; did you mean `path`?"),
        ("data.train={format: text}", "data.train[0].path: is missing; jsonl, json, parquet"),
        ("data.train={path: a, format: chatml}", "data.train[0].format: expected `auto`, "),
        ("data.eval=0", "must be above 0 and below 1; got 0; leave the key out for no evaluation"),
        ("data.eval=1.5", "must be above 0 and below 1; got 1.5"),
        ('data.eval="0.05"', "write 0.05 without quotes"),
        ("data.eval=true", "expected a number, a path, a source or a list of them or null; got `true`"),
        ("model.attention=flash_attn", "write `flash_attention_2`"),
        ("training.optimizer=adamw_torch", "write `adamw`"),
        ("training.tokens_per_step=99999999999999999999", "must be at least 1; got 99999999999999999999"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_to_write(override: str, message: str) -> None:
    line = lines_of(SMALL, override)[0]
    assert line.startswith(f"--set {override.partition('=')[0]}: ")
    assert message in line
    assert len(line) <= 240


# Other files


def test_extends_merges_sections_and_replaces_lists(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "base" / "full.yaml").write_text(FULL)
    got = read("extends: base/full.yaml\nadapter: {r: 4, target_modules: [k_proj]}\ndata: {train: c.jsonl}\n")
    assert got.recipe.adapter is not None
    assert (got.recipe.adapter.r, got.recipe.adapter.type) == (4, "lora")
    assert got.recipe.adapter.target_modules == ("k_proj",)
    assert got.recipe.data.train == (Source(path="c.jsonl"),)
    assert got.recipe.data.eval == 0.05
    assert got.origins["adapter.r"] == "recipe.yaml:2"
    assert got.origins["adapter.type"] == "base/full.yaml:5"


def test_null_takes_an_inherited_section_away(folder: Path) -> None:
    (folder / "full.yaml").write_text(FULL)
    assert read("extends: full.yaml\nadapter: null\n").recipe.adapter is None
    assert read(FULL, "adapter=null").recipe.adapter is None


def test_a_mistake_of_a_base_points_into_it(folder: Path) -> None:
    (folder / "base.yaml").write_text(FULL.replace("1e-4", "-1"))
    assert (
        only_line_of("extends: base.yaml\n")
        == "base.yaml:20:18: training.learning_rate: must be above 0 and at most 3.4e+38; got -1"
    )
    (folder / "base.yaml").write_text(FULL.replace("[q_proj", "q_proj"))
    assert only_line_of("extends: base.yaml\n").startswith("base.yaml:7:")


def test_extends_goes_on_from_file_to_file(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "one.yaml").write_text("extends: ../two.yaml\ntraining: {seed: 5}\n")
    (folder / "two.yaml").write_text(SMALL)
    assert read("extends: a/one.yaml\n").recipe.training.seed == 5


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("recipe.yaml", "recipe.yaml:1:10: extends: goes round in a circle back to recipe.yaml"),
        ("bse.yaml", "recipe.yaml:1:10: extends: bse.yaml does not exist; did you mean base.yaml?"),
        ("base.yml", "recipe.yaml:1:10: extends: base.yml does not exist; did you mean base.yaml?"),
        ("far/away.yaml", "recipe.yaml:1:10: extends: far/away.yaml does not exist"),
        (".", "recipe.yaml:1:10: extends: . is a folder; give a YAML file"),
        ("[a, b]", "recipe.yaml:1:10: extends: expected one path, relative to this file"),
        ("loop.yaml", "loop.yaml:1:10: extends: goes round in a circle back to recipe.yaml"),
    ],
)
def test_extends_of_what_cannot_be_extended(folder: Path, extends: str, message: str) -> None:
    (folder / "base.yaml").write_text("training: {seed: 3}\n")
    (folder / "loop.yaml").write_text("extends: recipe.yaml\n")
    assert only_line_of(f"extends: {extends}\n{SMALL}") == message


def test_a_long_row_of_files_is_refused(folder: Path) -> None:
    for index in range(40):
        (folder / f"{index}.yaml").write_text(f"extends: {index + 1}.yaml\n")
    assert "extends too many files in a row" in only_line_of("extends: 0.yaml\n")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=-1", "--set training.learning_rate: must be above 0 and at most 3.4e+38; got -1"),
        ("trainng.seed=1", "--set trainng.seed: trainng: unknown key; did you mean `training`?"),
        ("training.sed=1", "--set training.sed: unknown key; did you mean `seed`?"),
        ("training.seed", "--set training.seed: expected section.key=value"),
        ("=1", "--set : expected section.key=value"),
        ("adapter=", "--set adapter: nothing stands behind the `=`; write null to unset a key"),
        ("training..seed=1", "--set training..seed: the key has an empty part between its dots"),
        ("extends=a.yaml", "--set extends: only a file can extend another"),
        ("data.train[0].path=a", "--set data.train[0].path: lists are replaced whole; write the list"),
        ("training.seed=[1", "--set training.seed: not valid YAML: the `[` of line 1, column 1 is not closed"),
        ("adapter={r: 1, r: 2}", "--set adapter: r: given twice; keep one"),
        ("output_dir=\udcff", "--set output_dir: the value is not UTF-8"),
        ("a.b.c.d.e.f.g.h.i=1", "--set a.b.c.d.e.f.g.h.i: the key has too many parts"),
    ],
)  # fmt: skip
def test_a_wrong_override_names_itself(override: str, message: str) -> None:
    assert message in only_line_of(SMALL, override)


@pytest.mark.usefixtures("folder")
def test_overrides_use_the_rules_of_the_file() -> None:
    recipe = read(SMALL, "training.learning_rate=1e-5", "data.train=[a.jsonl, b.jsonl]", "adapter.r=8").recipe
    assert recipe.training.learning_rate == 1e-5
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert recipe.adapter is not None
    assert recipe.adapter.r == 8


@pytest.mark.usefixtures("folder")
def test_the_last_override_of_a_key_holds() -> None:
    assert read(SMALL, "training.seed=1", "training.seed=2").recipe.training.seed == 2


def test_a_missing_recipe_is_named_with_what_is_near(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(SMALL)
    for wrong in ("recipe.yml", "recip.yaml", "recipe"):
        with pytest.raises(RecipeErrors, match=rf"^{wrong}: no such recipe; did you mean recipe.yaml\?$"):
            read_recipe(wrong)
    with pytest.raises(RecipeErrors, match="no such recipe; recipes that ship with trainkit: "):
        read_recipe("")
    with pytest.raises(RecipeErrors, match=r"is a folder; give a YAML file$"):
        read_recipe(str(folder))


def test_a_pipe_without_a_writer_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    with pytest.raises(RecipeErrors, match="is no regular file"):
        read_recipe("pipe.yaml")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_read_by_name_without_a_warning(folder: Path, name: str) -> None:
    (folder / name).mkdir()  # a folder of that name is not meant
    got = read_recipe(name)
    assert got.warnings == ()
    assert isinstance(got.recipe, Recipe)
    # a file of that name is
    (folder / name).rmdir()
    (folder / name).write_text(SMALL)
    assert read_recipe(name).recipe.output_dir == "runs/a"


def test_reading_loads_nothing_heavy(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(FULL)
    program = (
        "import sys; from trainkit.recipe.reader import read_recipe, json_schema; read_recipe('recipe.yaml'); json_schema();"
        "print({'torch', 'transformers', 'datasets', 'accelerate', 'peft', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == "set()"


# Nothing but a recipe or its mistakes ever comes back

PIECES = st.sampled_from(
    [*"\n\t :-[]{}&*!|>'\"%@`#,?~", "  ", "- ", ": ", "null", "no", ".nan", "1e999", "-1", "0x1", "'", "&a ", "*a", "!!x ", "---\n",
     "<<: ", "extends: ", "recipe.yaml", "lora_r: 8\n", "training:\n", "data: ", "[[[[", "é", "\ufeff", "\x00", "\x85", "\u2028", "😀"]
)  # fmt: skip


@settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, len(FULL)), st.integers(0, 12), PIECES | st.text(max_size=3)), min_size=1, max_size=5
    )
)
def test_a_mutated_recipe_is_read_or_refused(folder: Path, edits: list[tuple[int, int, str]]) -> None:
    text = FULL
    for start, removed, piece in edits:
        text = text[:start] + piece + text[start + removed :]
    (folder / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        got = read_recipe("recipe.yaml")
    except RecipeErrors as error:
        lines = error.lines
    else:
        assert isinstance(got.recipe, Recipe)
        return
    assert lines
    assert all("\n" not in line and line.startswith(("recipe.yaml:", "…")) for line in lines)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(all_keys())), PIECES | st.text(max_size=12))
def test_any_override_is_read_or_refused(folder: Path, key: str, value: str) -> None:
    (folder / "recipe.yaml").write_text(FULL)
    try:
        got = read_recipe("recipe.yaml", [f"{key}={value}"])
    except RecipeErrors as error:
        lines = error.lines
    else:
        assert isinstance(got.recipe, Recipe)
        return
    assert lines
