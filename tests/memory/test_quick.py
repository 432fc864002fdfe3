"""The recorded logs against the trace that they stand for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainkit.memory
from trainkit.memory import quick
from trainkit.memory.estimate import estimate, quick_peak_bytes
from trainkit.memory.quick import LogKey, all_keys, covers, key_of
from trainkit.memory.recording import record
from trainkit.memory.replay import CUDA_BLOCK_BYTES
from trainkit.memory.scenario import Device, Scenario
from trainkit.memory.symbolic_log import SymbolicLog
from trainkit.model.loss import _PLAIN_LOGITS, CHUNK_TOKENS
from trainkit.recipe.schema import Adapter

LOGS = Path(trainkit.memory.__file__).parent / "logs"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 512}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 8}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 64}
FULL = Scenario(config=LLAMA, sequence_length=2048)
COVERED = {
    "llama": FULL,
    "mistral-uneven-chunks": replace(FULL, config=MISTRAL, sequence_length=1000, micro_batch_size=3),
    "qwen2-tied": replace(FULL, config=QWEN2, micro_batch_size=2, micro_batches=4),
    "qwen3-lora": replace(FULL, config=QWEN3, adapter=Adapter(r=8), activation_checkpointing=True),
    "llama-qlora": replace(
        FULL,
        config=LLAMA,
        adapter=Adapter(type="qlora", r=32, alpha=8),
        sequence_length=1500,
        micro_batch_size=5,
        device=Device("cuda", (8, 0)),
    ),
    "qwen2-one-chunk": replace(FULL, config=QWEN2, sequence_length=1000),
    "llama-ddp": replace(FULL, gpus=8, shard="ddp"),
}


@pytest.mark.parametrize("case", COVERED)
def test_the_recorded_answer_is_the_traced_one(case: str) -> None:
    scenario = COVERED[case]
    recorded, traced = estimate(scenario), estimate(scenario, exact=True)
    assert (recorded.engine, traced.engine) == ("quick", "trace")
    for name in ("parameters", "trainable_parameters", "peak_allocated_bytes", "peak_reserved_bytes", "peak_place"):
        assert getattr(recorded, name) == getattr(traced, name), name
    # Where the rows of a batch begin and end is a list whose length is no product; it lies within one block.
    assert recorded.parts == pytest.approx(traced.parts, abs=CUDA_BLOCK_BYTES)
    totals = [[point.total_bytes for point in found.timeline] for found in (recorded, traced)]
    assert totals[0] == totals[1]
    assert quick_peak_bytes(scenario) == recorded.peak_allocated_bytes


def assert_current(key: LogKey) -> None:
    stored = SymbolicLog.from_bytes((LOGS / key.file_name).read_bytes())
    assert stored == SymbolicLog.from_bytes(record(key).to_bytes()), "run scripts/record_memory_logs"


def test_a_stored_log_is_what_a_trace_records_today() -> None:
    assert_current(LogKey("llama", tied=False, method="lora", checkpointed=True, accumulates=False, one_chunk=False))


@pytest.mark.long
@pytest.mark.parametrize("key", list(all_keys()), ids=lambda key: key.file_name)
def test_every_stored_log_is_what_a_trace_records_today(key: LogKey) -> None:
    assert_current(key)


def test_no_other_logs_are_stored() -> None:
    stored = {path.name for path in (LOGS).iterdir()}
    assert stored == {key.file_name for key in all_keys()}


def test_the_loss_is_cut_as_the_run_cuts_it() -> None:
    assert CHUNK_TOKENS["cuda"] == quick._CHUNK_TOKENS
    assert quick._PLAIN_LOGITS == _PLAIN_LOGITS


@pytest.mark.parametrize(
    "changed",
    [
        replace(FULL, config={**LLAMA, "model_type": "gemma"}),
        replace(FULL, config={**LLAMA, "attention_bias": True}),
        replace(FULL, config={**LLAMA, "hidden_act": "gelu"}),
        replace(FULL, config={**LLAMA, "rope_scaling": {"rope_type": "longrope"}}),
        replace(FULL, config={**LLAMA, "num_hidden_layers": 3}),
        replace(FULL, config={**LLAMA, "head_dim": 36}),
        replace(FULL, config={**QWEN2, "use_sliding_window": True}),
        replace(FULL, config={**QWEN3, "layer_types": ["sliding_attention"] * 6}),
        replace(FULL, sequence_length=128),
        replace(FULL, precision="fp16"),
        replace(FULL, attention="eager"),
        replace(FULL, optimizer="sgd"),
        replace(FULL, documents_per_row=2),
        replace(FULL, device=Device("cuda", (7, 5))),
        replace(FULL, device=Device("cpu")),
        replace(FULL, gpus=2, shard="fsdp2"),
        replace(FULL, adapter=Adapter(dropout=0.1)),
        replace(FULL, adapter=Adapter(target_modules=("q_proj",))),
        replace(FULL, adapter=Adapter(modules_to_save=("lm_head",))),
        replace(FULL, adapter=Adapter(use_dora=True)),
    ],
)
def test_what_was_not_recorded_is_left_to_the_trace(changed: Scenario) -> None:
    assert covers(FULL)
    assert not covers(changed)
    assert quick_peak_bytes(changed) is None


def test_linear_layers_named_one_by_one_are_all_of_them() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    named, all_linear = (replace(FULL, adapter=Adapter(target_modules=names)), replace(FULL, adapter=Adapter()))
    assert key_of(named) == key_of(all_linear)
    assert estimate(named).parts == estimate(all_linear).parts


def test_an_answer_loads_nothing_heavy() -> None:
    program = f"""
import sys
from trainkit.memory.estimate import estimate
from trainkit.memory.scenario import Scenario
estimate(Scenario(config={LLAMA!r}, sequence_length=2048))
print([name for name in ("torch", "transformers", "peft", "numpy") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
