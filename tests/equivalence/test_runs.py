"""Numbers that must be equal, through the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel


def relative(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right)
    return max(abs(one - other) / abs(other) for one, other in zip(left, right, strict=True))


@pytest.fixture
def learned_positions(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A random GPT-2 with the tokenizer of the tiny model."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_model_folder / "tokenizer_config.json", folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=6, eos_token_id=6)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def trained_weights(run: Any) -> dict[str, torch.Tensor]:
    newest = max((run.folder / "checkpoints").glob("step-*"))
    return load_file(newest / "weights.safetensors")


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 4, "alpha": 8}, None], ids=["lora", "full"])
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(fine_tune: Any, adapter: dict[str, Any] | None) -> None:
    """8 x 1, 4 x 2, 3 x 3 (the last smaller) and 1 x 8 rows; trained tokens differ from row to row."""
    runs = {
        size: fine_tune({"adapter": adapter, "training": {"micro_batch_size": size}}, name=f"micro-{size}")
        for size in (8, 4, 3, 1)
    }
    reference = runs[8].losses()
    assert len(set(runs[8].lines("loss")[0])) > 3
    for size in (4, 3, 1):
        assert relative(runs[size].losses(), reference) <= 1e-6, size


def test_packed_equals_one_document_a_row(fine_tune: Any) -> None:
    """All documents in one step: the loss and the gradient's norm do not know how they were laid out."""
    everything = {"training": {"steps": 1, "tokens_per_step": 128 * 128}, "data": {"eval": None}}
    packed = fine_tune(everything, name="packed").lines("loss")[0]
    padded = fine_tune({**everything, "packing": {"strategy": "none"}}, name="padded").lines("loss")[0]
    assert packed["trained_tokens"] == padded["trained_tokens"]
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-6)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-5)


def test_documents_that_see_each_other_give_another_loss(fine_tune: Any) -> None:
    changes = {"training": {"steps": 1}, "data": {"eval": None}}
    apart = fine_tune(changes, name="apart").losses()
    together = fine_tune({**changes, "packing": {"isolate_documents": False}}, name="together").losses()
    assert relative(together, apart) > 1e-6


def test_positions_that_run_through_the_row_give_another_loss(fine_tune: Any, learned_positions: Path) -> None:
    """With learned positions; rotary ones are relative, so that moving a whole document changes nothing."""
    changes = {"model": {"name": str(learned_positions)}, "training": {"steps": 1}, "data": {"eval": None}}
    reset = fine_tune(changes, name="reset").losses()
    running = fine_tune({**changes, "packing": {"reset_positions": False}}, name="running").losses()
    assert relative(running, reset) > 1e-6


def test_the_separator_ends_plain_texts(fine_tune: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"it is the end of day {day}"}) + "\n" for day in range(40)))
    changes = {"training": {"steps": 1}, "data": {"train": str(path), "eval": None}}
    ledgers = {
        separator: fine_tune({**changes, "packing": {"separator": separator}}, name=f"run-{number}").summary["ledger"]
        for number, separator in enumerate(("eos", "none", "<|endoftext|>"))
    }
    assert [ledger["separators"] for ledger in ledgers.values()] == [40, 0, 40]
    assert ledgers["eos"]["trained"] == ledgers["none"]["trained"]


def test_the_first_loss_is_what_transformers_alone_computes(
    fine_tune: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """One conversation of one turn; transformers' own loss over the answer and its end-of-turn token."""
    path = tmp_path / "one.jsonl"
    messages = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "the end of the day."}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    run = fine_tune(
        {"data": {"train": str(path), "eval": None}, "training": {"steps": 1, "micro_batch_size": 1}}, name="one"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    prompt = tokenizer("<|user|>what is it?<|end|>\n<|assistant|>", add_special_tokens=False)["input_ids"]
    answer = tokenizer("the end of the day.<|end|>", add_special_tokens=False)["input_ids"]
    tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer + tail])
    labels = torch.tensor([[-100] * len(prompt) + answer + [-100] * len(tail)])
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert run.lines("loss")[0]["trained_tokens"] == len(answer)
    assert run.losses()[0] == pytest.approx(expected, rel=1e-6)


def test_lora_starts_at_the_base(fine_tune: Any) -> None:
    """B is zero, so that the evaluation before the first step is the base model's."""
    lora = fine_tune({"training": {"steps": 1}}, name="lora").lines("eval_loss")[0]
    full = fine_tune({"training": {"steps": 1}, "adapter": None}, name="full").lines("eval_loss")[0]
    assert lora["eval_tokens"] == full["eval_tokens"]
    assert lora["eval_loss"] == pytest.approx(full["eval_loss"], rel=1e-7)


@pytest.mark.parametrize(("precision", "band"), [("bf16", 0.02), ("fp16", 0.005)])
def test_sixteen_bit_stays_in_a_band_around_fp32(fine_tune: Any, precision: str, band: float) -> None:
    """The band is relative to the fp32 loss at every step: 2 % for bf16's 8 bits of mantissa, 0.5 % for fp16's 11."""
    exact = fine_tune({"adapter": None}, name="fp32").losses()
    rounded = fine_tune({"adapter": None, "precision": precision}, name=precision)
    assert 0 < relative(rounded.losses(), exact) <= band
    assert all(math.isfinite(line["grad_norm"]) for line in rounded.lines("loss"))


def test_activation_checkpointing_changes_no_number(fine_tune: Any) -> None:
    plain = fine_tune(name="plain").losses()
    recomputed = fine_tune({"model": {"activation_checkpointing": True}}, name="recomputed").losses()
    assert relative(recomputed, plain) <= 1e-6


def test_eager_attention_gives_the_same_curve(fine_tune: Any) -> None:
    reference = fine_tune(name="sdpa").losses()
    assert relative(fine_tune({"model": {"attention": "eager"}}, name="eager").losses(), reference) <= 1e-6


def test_the_same_recipe_twice_gives_the_same_bits(fine_tune: Any) -> None:
    one = fine_tune({"adapter": {"dropout": 0.1}}, name="one")
    two = fine_tune({"adapter": {"dropout": 0.1}}, name="two")
    assert one.losses() == two.losses()
    for name, tensor in trained_weights(one).items():
        assert torch.equal(tensor, trained_weights(two)[name])
