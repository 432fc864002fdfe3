from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from trainkit.memory.formula import ModelShape, StepShape, largest_micro_batch, memory_parts

LLAMA_70B = ModelShape(70_553_706_496, 8192, 28672, 1024, 80, 128256)
FULL = StepShape(1, 2048, LLAMA_70B.parameters, 0, 4, "adamw", activation_checkpointing=False)


def test_full_fine_tuning_takes_16_bytes_a_parameter_before_the_first_batch() -> None:
    parts = memory_parts(LLAMA_70B, FULL)
    states = sum(bytes_ for name, bytes_ in parts.items() if name not in {"activations", "logits"})
    assert states == 16 * LLAMA_70B.parameters


def test_lora_leaves_the_base_at_two_bytes() -> None:
    lora = replace(FULL, trainable_parameters=100_000_000, frozen_bytes_per_parameter=2, compute_bytes=2)
    parts = memory_parts(LLAMA_70B, lora)
    assert parts["weights"] == 2 * LLAMA_70B.parameters
    assert parts["gradients"] + parts["optimizer state"] == 12 * 100_000_000


def test_activation_checkpointing_takes_less_and_more_rows_take_more() -> None:
    plain = memory_parts(LLAMA_70B, FULL)["activations"]
    assert memory_parts(LLAMA_70B, replace(FULL, activation_checkpointing=True))["activations"] < plain / 10
    assert memory_parts(LLAMA_70B, replace(FULL, micro_batch_size=3))["activations"] == 3 * plain


def test_largest_micro_batch_divides_the_step_and_fits() -> None:
    def needed(rows: int) -> int:
        return sum(memory_parts(LLAMA_70B, replace(FULL, micro_batch_size=rows)).values())

    assert largest_micro_batch(LLAMA_70B, FULL, available_bytes=needed(5), rows_per_step=12) == 4
    assert largest_micro_batch(LLAMA_70B, FULL, available_bytes=needed(1) - 1, rows_per_step=12) == 0
    assert largest_micro_batch(LLAMA_70B, FULL, available_bytes=needed(12), rows_per_step=12, most_tokens=3 * 2048) == 3


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output: Any = model(ids)
    assert output is not None
    return sum(kept.values())


def test_activations_are_what_autograd_keeps_within_a_quarter() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaModel(config)
    shape = ModelShape(0, 128, 352, 64, 4, 100)
    step = StepShape(2, 256, 0, 4, 4, "adamw", activation_checkpointing=False)
    estimated = memory_parts(shape, step)["activations"]
    measured = saved_bytes(model, torch.zeros(2, 256, dtype=torch.int64))
    assert 0.75 < estimated / measured < 1.25, (estimated, measured)
