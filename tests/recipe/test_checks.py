# ruff: noqa: E501 — the tables hold one case a line, and the line that it must get
"""What must hold between keys, and what is inert."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainkit.errors import RecipeErrors
from trainkit.recipe.reader import read_recipe

SMALL = """\
model: {name: tiny}
data: {train: train.jsonl}
training: {epochs: 1}
output_dir: runs/a
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*overrides: str, text: str = SMALL) -> list[str]:
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeErrors) as caught:
        read_recipe("r.yaml", overrides)
    return caught.value.lines


def warnings(*overrides: str, text: str = SMALL) -> list[str]:
    Path("r.yaml").write_text(text)
    return list(read_recipe("r.yaml", overrides).warnings)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["training.steps=5"], "--set training.steps: give either `steps` or `epochs`, not both; to undo an inherited one, set it to null"),
        (["training.epochs=null"], "--set training.epochs: is missing; give either `epochs` or `steps`"),
        (["training.warmup_steps=5", "training.warmup_ratio=0.1"], "--set training.warmup_steps: give either `warmup_steps` or `warmup_ratio`, not both; to undo an inherited one, set it to null"),
        (["training.tokens_per_step=5000"], "--set training.tokens_per_step: 5000 is no multiple of `packing.sequence_length` 2048; 4096 and 6144 are"),
        (["training.tokens_per_step=2047"], "--set training.tokens_per_step: 2047 is no multiple of `packing.sequence_length` 2048; the smallest is 2048"),
        (["packing.sequence_length=1000"], "--set packing.sequence_length: training.tokens_per_step: 65536 is no multiple of `packing.sequence_length` 1000; 65000 and 66000 are"),
        (["training.micro_batch_size=64"], "--set training.micro_batch_size: 64 rows of 2048 tokens are 131072, more than `tokens_per_step` 65536; at most 32 rows fit"),
        (["packing.overlap=2048"], "--set packing.overlap: 2048 tokens are more than half of `sequence_length` 2048; give at most 1024"),
        (["packing.sequence_length=64"], "--set packing.sequence_length: packing.overlap: 64 tokens are more than half of `sequence_length` 64; give at most 32"),
        (["packing.long_documents=drop", "packing.train_on_overlap=true"], "--set packing.train_on_overlap: only `long_documents: split` makes overlap, and it is `drop`"),
        (["packing.overlap=0", "packing.train_on_overlap=true"], "--set packing.train_on_overlap: there is none to train: `overlap` is 0"),
        (["data.train=[{path: a, weight: 1}, {path: b}]"], "--set data.train: data.train[1]: has no `weight`, other sources have one; give it to all or to none"),
        (["adapter={type: qlora, init_lora_weights: pissa}"], "--set adapter: adapter.init_lora_weights: `pissa` factors the full weights, and qlora holds them in 4 bit; use `type: lora`"),
        (["evaluation.exact_match=5"], "--set evaluation.exact_match: asks for held-out prompts, but `data.eval` is not given; give it, or leave this out"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused(overrides: list[str], line: str) -> None:
    assert lines(*overrides) == [line]


def test_a_conflict_points_at_the_line() -> None:
    text = SMALL.replace("{epochs: 1}", "\n  epochs: 1\n  steps: 5")
    assert lines(text=text)[0].startswith("r.yaml:5:3: training.steps: give either `steps` or `epochs`")
    assert lines(text=SMALL.replace("{epochs: 1}", "{seed: 1}"))[0].startswith(
        "r.yaml:3:1: training.epochs: is missing"
    )


def test_what_depends_on_a_mistake_is_not_judged() -> None:
    assert len(lines("training.epochs=three")) == 1
    assert len(lines("packing.sequence_length=x", "training.tokens_per_step=5")) == 1
    assert len(lines("training=3")) == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["packing.long_documents=truncate", "packing.overlap=64"], "--set packing.overlap: has no effect: only `long_documents: split` makes overlap, and it is `truncate`"),
        (["packing.strategy=none", "packing.reset_positions=false"], "--set packing.reset_positions: has no effect: with `strategy: none` a row holds a single document"),
        (["packing.strategy=none", "packing.isolate_documents=false"], "--set packing.isolate_documents: has no effect: with `strategy: none` a row holds a single document"),
        (["training.optimizer=sgd", "training.adam_beta1=0.5"], "--set training.adam_beta1: has no effect: the optimizer is `sgd`"),
        (["evaluation.samples=4"], "--set evaluation.samples: has no effect: `data.eval` is not given"),
        (["evaluation.every_steps=4"], "--set evaluation.every_steps: has no effect: `data.eval` is not given"),
        (["checkpoints.keep_best=true"], "--set checkpoints.keep_best: has no effect: `data.eval` is not given"),
        (["data.eval=0.1", "evaluation.samples=0", "evaluation.max_new_tokens=9"], "--set evaluation.max_new_tokens: has no effect: `samples` and `exact_match` are 0"),
        (["model.revision=main"], "--set model.revision: has no effect: `tiny` ships with trainkit and has one version"),
        (["data.train={path: a.jsonl, split: test}"], "--set data.train: data.train[0].split: has no effect: only hub data sets have splits, and this is a file"),
        (["data.train={path: a.csv, name: x}"], "--set data.train: data.train[0].name: has no effect: only hub data sets have configurations, and this is a file"),
        (["data.eval={path: a, weight: 2}"], "--set data.eval: data.eval[0].weight: has no effect: evaluation reads every source whole"),
        (["data.train={path: a, format: text}", "data.chat_template=chatml"], "--set data.chat_template: has no effect: no source holds conversations"),
        (["data.eval=train.jsonl"], "--set data.eval: data.eval[0]: `train.jsonl` is also trained on, so the evaluation measures memory; give other examples"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(overrides: list[str], line: str) -> None:
    assert warnings(*overrides) == [line]


def test_warm_up_longer_than_the_run_is_said_with_both_numbers() -> None:
    (line,) = warnings("training.epochs=null", "training.steps=10", "training.warmup_steps=20")
    assert line.startswith("--set training.warmup_steps: 20 steps of warm-up in a run of 10 steps")
    assert warnings("training.epochs=null", "training.steps=10", "training.warmup_steps=9") == []


@pytest.mark.parametrize(
    "override",
    [
        "data.eval=0.1",
        "packing.long_documents=truncate",
        "packing.strategy=none",
        "training.optimizer=sgd",
        "adapter={}",
    ],
)
def test_defaults_trip_nobody(override: str) -> None:
    assert warnings(override) == []
