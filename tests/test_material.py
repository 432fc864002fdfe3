"""A real pretrained model and real data sets that nobody here made, to the end and to a lower held-out loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

# file → how many of its examples, and what else the recipe says. The toolcalls need a template with a place for tools.
SETS: dict[str, dict[str, Any]] = {
    "alpaca_data.json": {"examples": 600},
    "gsm8k_train.jsonl": {"examples": 400},
    "dolly_hhrlhf_1000.jsonl": {"examples": 300},
    "sharegpt_fastchat_dummy.json": {},
    "sharegpt_toolcall_en.json": {"examples": 150, "chat_template": "chatml"},
    "messages_openai_sft.jsonl": {},
    "v1_sft_demo.jsonl": {},
    "wikisql_text_train.jsonl": {"examples": 400},
    "wikitext2_valid.txt": {"eval": "war_and_peace_2600-0.txt", "characters": 200_000},
    "war_and_peace_2600-0.txt": {"eval": "wikitext2_valid.txt", "characters": 200_000},
    "ru_crime_and_punishment.txt": {"eval": "ru_crime_and_punishment.txt", "characters": 100_000},
}


def shortened(source: Path, folder: Path, wanted: dict[str, Any], *, tail: bool = False) -> Path:
    """The first part of a file (or the last), so that a test takes seconds."""
    target = folder / ("tail-" * tail + source.name)
    if "characters" in wanted:
        text = source.read_text()
        target.write_text(text[-wanted["characters"] // 4 :] if tail else text[: wanted["characters"]])
    elif source.suffix == ".json":
        target.write_text(json.dumps(json.loads(source.read_text())[: wanted.get("examples")]))
    else:
        target.write_text("\n".join(source.read_text().splitlines()[: wanted.get("examples")]) + "\n")
    return target


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", SETS)
def test_every_format_trains_to_a_lower_held_out_loss(
    fine_tune: Any, material: Path, tmp_path: Path, name: str, method: str
) -> None:
    wanted = SETS[name]
    train = shortened(material / "data" / name, tmp_path, wanted)
    other = wanted.get("eval")
    held_out = 0.1 if other is None else str(shortened(material / "data" / other, tmp_path, wanted, tail=True))
    run = fine_tune(
        {
            "model": {"name": str(material / "models" / "stories260K")},
            "adapter": {"type": "lora", "r": 8, "alpha": 16} if method == "lora" else None,
            "data": {
                "train": str(train),
                "eval": held_out,
                "chat_template": wanted.get("chat_template", "plain"),
                "max_dropped": 0.02,
            },
            "packing": {"sequence_length": 512, "overlap": 32},
            "training": {
                "steps": 20,
                "tokens_per_step": 4096,
                "micro_batch_size": "auto",
                "learning_rate": 5e-3 if method == "lora" else 1e-3,
            },
            "evaluation": {"every_steps": None, "samples": 1, "max_new_tokens": 16},
        }
    )
    print(f"{name} {method}: {run.summary['eval_loss_before']:.4f} -> {run.summary['eval_loss_after']:.4f}")
    assert run.summary["eval_loss_after"] < run.summary["eval_loss_before"] - 0.02
    ledger = run.summary["ledger"]
    kept = ledger["trained"] + ledger["masked"] + ledger["truncated"] + sum(ledger["dropped"].values())
    assert ledger["read"] + ledger["repeated"] == kept
    if method == "lora" and name == "v1_sft_demo.jsonl":
        assert_loads_without_trainkit(run.folder / "final")


def assert_loads_without_trainkit(final: Path) -> None:
    """In a process that never imports trainkit: the adapter loads by plain peft, and it changes the logits."""
    program = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
final = sys.argv[1]
import json
base = json.load(open(final + "/adapter_config.json"))["base_model_name_or_path"]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final).eval()
ids = AutoTokenizer.from_pretrained(final)("hello", return_tensors="pt")["input_ids"]
with torch.no_grad():
    adapted = model(input_ids=ids).logits
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
assert (adapted - plain).abs().max() > 1e-3
assert not any(name.startswith("trainkit") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(final)], check=True, capture_output=True)
