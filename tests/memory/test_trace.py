"""The traced step against the real one: torch's own allocator is asked what a step on the CPU takes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from trainkit.errors import ModelError, UsageError
from trainkit.memory.estimate import PARTS, estimate
from trainkit.memory.event_log import TRACED, Axis, unfold
from trainkit.memory.fake_model import equal_layers, fake_model, parse_config
from trainkit.memory.scenario import Device, Scenario
from trainkit.memory.trace import make_batch_of, step_log
from trainkit.model.adapters import attach_adapter
from trainkit.model.attention import choose_attention
from trainkit.model.loading import enable_activation_checkpointing
from trainkit.model.loss import LossModel
from trainkit.model.precision import make_scaler, plan_precision
from trainkit.recipe.schema import Adapter, Training
from trainkit.training.optimizer import make_optimizer
from trainkit.training.step import training_step

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = Device("cpu")
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LARGE_VOCABULARY = {**SMALL, "vocab_size": 16384}
PLAIN = Scenario(
    config=SMALL, sequence_length=256, micro_batch_size=2, precision="fp32", frozen_storage="fp32", device=CPU
)
LORA = Adapter(r=8)


def real_step(scenario: Scenario) -> Iterator[int]:
    """Bytes that are allocated after each event of the run's real second step."""
    config = parse_config(scenario.config)
    device = torch.device("cpu")
    precision = plan_precision(scenario.precision, device)
    attention = choose_attention(scenario.attention, device, config)
    torch.manual_seed(0)
    dtype = torch.float32 if scenario.adapter is None else precision.frozen_storage
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.implementation)
    model.config.use_cache = False
    if scenario.activation_checkpointing:
        enable_activation_checkpointing(model)
    adapted, _ = attach_adapter(model, scenario.adapter, 0)
    loss_model = LossModel(adapted, attention, precision)
    loss_model.train()
    optimizer = make_optimizer(loss_model, Training(steps=1, optimizer=scenario.optimizer))
    alone = SimpleNamespace(device=device, num_processes=1, reduce=lambda tensor, reduction: tensor)
    run = cast(
        "Any",
        SimpleNamespace(
            loss_model=loss_model,
            optimizer=optimizer,
            scaler=make_scaler(precision, device),
            accelerator=alone,
            max_grad_norm=1.0,
        ),
    )
    batch = make_batch_of(scenario)

    def step() -> None:
        training_step(run, [batch] * scenario.micro_batches, 1e-4, describe_rows=str, should_stop=lambda: False)

    step()
    live = sum(storage_bytes([*loss_model.parameters(), *loss_model.buffers(), *state_of(optimizer)]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    assert watched.profiler is not None
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        yield live


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def storage_bytes(tensors: list[torch.Tensor]) -> Iterator[int]:
    yield from {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values()


@pytest.mark.parametrize(
    "scenario",
    [
        PLAIN,
        replace(PLAIN, adapter=LORA),
        replace(PLAIN, activation_checkpointing=True),
        replace(PLAIN, adapter=LORA, activation_checkpointing=True),
        replace(PLAIN, documents_per_row=3),
        replace(PLAIN, attention="eager", documents_per_row=3),
        replace(PLAIN, precision="bf16", frozen_storage="bf16"),
        replace(PLAIN, precision="bf16", frozen_storage="bf16", adapter=LORA, activation_checkpointing=True),
        replace(PLAIN, precision="fp16", frozen_storage="fp16"),
        replace(PLAIN, config=LARGE_VOCABULARY),
        replace(PLAIN, config=LARGE_VOCABULARY, precision="bf16", frozen_storage="bf16"),
        replace(PLAIN, config={**LARGE_VOCABULARY, "tie_word_embeddings": True}),
        replace(PLAIN, micro_batches=2),
        replace(PLAIN, optimizer="sgd"),
    ],
    ids=[
        "full",
        "lora",
        "full-checkpointed",
        "lora-checkpointed",
        "packed",
        "packed-eager",
        "bf16",
        "bf16-lora-checkpointed",
        "fp16",
        "chunked-loss",
        "bf16-chunked-loss",
        "tied-chunked-loss",
        "accumulated",
        "sgd",
    ],
)
def test_the_traced_peak_is_that_of_the_real_step(scenario: Scenario) -> None:
    predicted = estimate(scenario, exact=True).peak_allocated_bytes
    measured = max(real_step(scenario))
    assert predicted == pytest.approx(measured, rel=0.01)
