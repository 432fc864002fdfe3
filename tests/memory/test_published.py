"""What others measured on a real GPU (Tesla T4), predicted without one. Nothing is fitted to these rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainkit.memory.estimate import estimate
from trainkit.memory.scenario import Device, Scenario
from trainkit.recipe.schema import Adapter

MIB = 2**20
T4 = Device("cuda", (7, 5))
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen1.5": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "smol1.7": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "smol135": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}


def rows_of(material: Path) -> list[dict[str, Any]]:
    path = material / "data" / "memory_t4.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def scenario_of_row(row: dict[str, Any]) -> Scenario:
    return Scenario(
        config=CONFIGS[row["key"]],
        sequence_length=row["sequence_length"],
        micro_batch_size=row["batch_size"],
        adapter=Adapter(
            type="qlora" if row["base_quantization"] == "nf4" else "lora",
            r=row["lora_r"],
            alpha=2 * row["lora_r"],
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        ),
        precision="fp16",
        frozen_storage="fp16",
        activation_checkpointing=True,
        attention="eager" if row["attention"] == "eager" else "sdpa",
        device=T4,
        loop="transformers",
    )


def errors(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Relative errors, in percent, of the allocated and the reserved peak."""
    allocated, reserved = [], []
    for row in rows:
        predicted = estimate(scenario_of_row(row), exact=True)
        allocated.append(100 * (predicted.peak_allocated_bytes / MIB / row["peak_allocated_mib"] - 1))
        reserved.append(100 * (predicted.peak_reserved_bytes / MIB / row["peak_reserved_mib"] - 1))
    return allocated, reserved


def mean_absolute(values: list[float]) -> float:
    return sum(map(abs, values)) / len(values)


@pytest.mark.long
def test_every_published_measurement_is_predicted(material: Path) -> None:
    allocated, reserved = errors(rows_of(material))
    assert mean_absolute(allocated) <= 0.5
    assert max(map(abs, allocated)) <= 1.5
    assert mean_absolute(reserved) <= 4


def test_published_measurements_of_each_kind_are_predicted(material: Path) -> None:
    by_kind = {(row["base_quantization"], row["attention"]): row for row in rows_of(material)}
    allocated, reserved = errors(list(by_kind.values()))
    assert len(by_kind) == 4
    assert mean_absolute(allocated) <= 0.5
    assert max(map(abs, allocated)) <= 1.5
    assert mean_absolute(reserved) <= 8
