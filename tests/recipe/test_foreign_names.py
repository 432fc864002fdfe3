"""Other tools' names lead to ours, and every name that the messages mention is one that exists."""

from __future__ import annotations

import re

import pytest

from trainkit.recipe.foreign_names import KEYS, LEAVE_OUT, MAIN_KEYS, NOTES, VALUES, meaning_here
from trainkit.recipe.keys import all_keys, choices_of
from trainkit.recipe.yaml_nodes import Mapping, Node, Place, parse_yaml


def said(text: str) -> str | None:
    """What is said about the last key of a recipe."""
    root: Node | None = parse_yaml(text, lambda line, column: Place("r.yaml", line, column), [])
    assert isinstance(root, Mapping)
    name, entry = list(root.entries.items())[-1]
    return meaning_here(name, entry.node, root)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lora_r: 16", "write `r: 16` under `adapter`"),
        ("lora_rank: 16", "write `r: 16` under `adapter`"),
        ("lora_alpha: 32", "write `alpha: 32` under `adapter`"),
        ("lora_target: all", "write `target_modules: all-linear` under `adapter`"),
        ("lora_target_linear: true", "write `target_modules: all-linear` under `adapter`"),
        ("lora_target_modules: [q_proj]", "here it is `adapter.target_modules`"),
        ("base_model: meta/llama", "write `name: meta/llama` under `model`"),
        ("model_name_or_path: x", "write `name: x` under `model`"),
        ("sequence_len: 4096", "write `sequence_length: 4096` under `packing`"),
        ("cutoff_len: 4096", "write `sequence_length: 4096` under `packing`"),
        ("max_seq_length: 4096", "write `sequence_length: 4096` under `packing`"),
        ("num_train_epochs: 3", "write `epochs: 3` under `training`"),
        ("max_steps: 100", "write `steps: 100` under `training`"),
        ("max_steps: -1", "needs no key: leave it out"),
        ("per_device_train_batch_size: 4", "write `micro_batch_size: 4` under `training`"),
        ("bf16: true", "write `precision: bf16`"),
        ("bf16: auto", "write `precision: auto`"),
        ("fp16: true", "write `precision: fp16`"),
        ("fp16: false", "needs no key: leave it out"),
        ("dtype: bfloat16", "write `precision: bf16`"),
        ("load_in_4bit: true", "write `type: qlora` under `adapter`"),
        ("finetuning_type: full", "needs no key: leave it out"),
        ("gradient_checkpointing: true", "write `activation_checkpointing: true` under `model`"),
        ("disable_gradient_checkpointing: true", "write `activation_checkpointing: false` under `model`"),
        ("flash_attn: fa2", "write `attention: flash_attention_2` under `model`"),
        ("optim: adamw_torch_fused", "write `optimizer: adamw` under `training`"),
        ("lr_scheduler_type: cosine", "write `lr_scheduler: cosine` under `training`"),
        ("train_on_inputs: true", "write `train_on: all` under `data`"),
        ("train_on_inputs: false", "write `train_on: completions` under `data`"),
        ("assistant_only_loss: true", "write `train_on: completions` under `data`"),
        ("mask_prompt: false", "write `train_on: all` under `data`"),
        ("val_set_size: 0.1", "write `eval: 0.1` under `data`"),
        ("datasets: [{path: a}]", "here it is `data.train`"),
        ("sample_packing: true", "write `strategy: best-fit` under `packing`"),
        ("sample_packing: false", "write `strategy: none` under `packing`"),
        ("save_steps: 50", "write `every_steps: 50` under `checkpoints`"),
        ("eval_steps: 50", "write `every_steps: 50` under `evaluation`"),
        ("report_to: none", "write `tracking: []`"),
        ("report_to: wandb", "write `tracking: [wandb]`"),
        ("use_wandb: true", "write `tracking: [wandb]`"),
        ("lora: {r: 8}", "here it is `adapter`"),
        ("logging_steps: 1", "every step is logged"),
        ("resume_from_checkpoint: x", "resumes by itself"),
        ("trust_remote_code: true", "--trust-remote-code OWNER/NAME@COMMIT"),
        ("code_revision: main", "--trust-remote-code OWNER/NAME@COMMIT"),
        ("deepspeed: zero3.json", "names no machine"),
        ("tf32: true", "`precision: bf16`"),
    ],
)
def test_another_tools_key_gets_our_sentence(written: str, meant: str) -> None:
    message = said(written)
    assert message is not None
    assert meant in message


def test_accumulation_is_computed_from_the_numbers_beside_it() -> None:
    message = said("per_device_train_batch_size: 4\nsequence_len: 2048\ngradient_accumulation_steps: 8")
    assert message is not None
    assert message.endswith("4 rows × 8 × 2048 tokens × 1 device is `tokens_per_step: 65536`")
    inside = said("packing: {sequence_length: 512}\ntraining: {micro_batch_size: 2}\ngradient_accumulation_steps: 3")
    assert inside is not None
    assert inside.endswith("`tokens_per_step: 3072`")


@pytest.mark.parametrize("value", ["0", "auto", "-1", "[4]"])
def test_accumulation_without_numbers_gets_the_formula(value: str) -> None:
    message = said(f"batch_size: 4\nmax_length: 8\ngradient_accumulation_steps: {value}")
    assert message is not None
    assert message.endswith("rows per device × accumulation × sequence_length × devices")


def test_nobodys_key_has_no_meaning() -> None:
    assert said("frobnicate: 1") is None


def test_every_name_of_ours_exists() -> None:
    ours = set(all_keys())
    assert {foreign.ours for foreign in KEYS.values()} <= ours
    assert set(VALUES) <= ours
    assert {f"{section}.{key}" for section, key in MAIN_KEYS.items()} <= ours
    mentioned = {key for note in NOTES.values() for key in re.findall(r"`([a-z]+\.[a-z_]+)[`:]", note)}
    assert len(mentioned) > 4
    assert mentioned - {"report.html"} <= ours


def test_every_word_of_ours_is_a_choice() -> None:
    for key, words in VALUES.items():
        assert set(words.values()) - {LEAVE_OUT} <= set(choices_of(all_keys()[key].hint)), key
        assert not set(words) & set(choices_of(all_keys()[key].hint)), key


def test_no_foreign_name_is_a_key_at_the_same_place() -> None:
    top = {name for name in all_keys() if "." not in name}
    assert not top & (set(KEYS) | set(NOTES))
    assert not set(KEYS) & set(NOTES)
