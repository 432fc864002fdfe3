"""The traced step against the real one: torch's own allocator is asked what a step on the CPU takes."""

from __future__ import annotations

import subprocess
import sys
from bisect import bisect_right
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from trainkit.errors import ModelError, UsageError
from trainkit.memory.allocator import peak_reserved_bytes
from trainkit.memory.device_look import cuda_scratch
from trainkit.memory.estimate import PARTS, estimate
from trainkit.memory.event_log import Axis, EventLog, Kind, unfold
from trainkit.memory.fake_model import fake_model, parse_config, period_of
from trainkit.memory.models import known_models
from trainkit.memory.replay import CUDA_BLOCK_BYTES, highest_moments, peak_of_folded
from trainkit.memory.scenario import Device, Scenario
from trainkit.memory.trace import REACH, make_batch_of, step_log
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
    for change in changes_without_matrix_scratch(watched.profiler.kineto_results.events()):
        live += change
        yield live


def changes_without_matrix_scratch(events: list[Any]) -> Iterator[int]:
    """Bytes taken and given back (negative) in order, but for what oneDNN takes and returns within a 16-bit product.

    That grows with the number of threads and differs from CPU to CPU (on one: 42 KB a thread, of the same product), so
    that it is no part of an estimate.
    """
    products = [event for event in events if event.name() == "aten::mm"]
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in products)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    starts = [start for start, _ in spans]
    index = 0
    while index < len(changes):
        time, change = changes[index]
        span = bisect_right(starts, time) - 1
        inside = span >= 0 and time <= spans[span][1]
        returned = index + 1 < len(changes) and change > 0 and changes[index + 1][1] == -change
        if inside and returned and changes[index + 1][0] <= spans[span][1]:
            index += 2
        else:
            yield change
            index += 1


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def storage_bytes(tensors: list[torch.Tensor]) -> Iterator[int]:
    yield from {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values()


BF16 = replace(PLAIN, precision="bf16", frozen_storage="bf16")
REAL = {
    "full": PLAIN,
    "lora": replace(PLAIN, adapter=LORA),
    "lora-checkpointed": replace(PLAIN, adapter=LORA, activation_checkpointing=True),
    "packed": replace(PLAIN, documents_per_row=3),
    "bf16-lora-checkpointed": replace(BF16, adapter=LORA, activation_checkpointing=True),
    "bf16-chunked-loss": replace(BF16, config=LARGE_VOCABULARY),
    "tied-chunked-loss": replace(PLAIN, config={**LARGE_VOCABULARY, "tie_word_embeddings": True}),
    "accumulated": replace(PLAIN, micro_batches=2),
}
MORE_REAL = {
    "full-checkpointed": replace(PLAIN, activation_checkpointing=True),
    "packed-eager": replace(PLAIN, attention="eager", documents_per_row=3),
    "bf16": BF16,
    "fp16": replace(PLAIN, precision="fp16", frozen_storage="fp16"),
    "chunked-loss": replace(PLAIN, config=LARGE_VOCABULARY),
    "sgd": replace(PLAIN, optimizer="sgd"),
    "tied-lora": replace(PLAIN, config={**SMALL, "tie_word_embeddings": True}, adapter=LORA),
    "qwen3": replace(PLAIN, config={**SMALL, "model_type": "qwen3", "head_dim": 32}),
    "gpt2": replace(PLAIN, config={"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512}),
    "gemma2": replace(
        PLAIN, config={**SMALL, "model_type": "gemma2", "head_dim": 32, "sliding_window": 64}, documents_per_row=2
    ),
}


def long(cases: dict[str, Scenario]) -> list[Any]:
    return [pytest.param(scenario, marks=pytest.mark.long, id=name) for name, scenario in cases.items()]


@pytest.mark.parametrize("scenario", [*(pytest.param(case, id=name) for name, case in REAL.items()), *long(MORE_REAL)])
def test_the_traced_peak_is_that_of_the_real_step(scenario: Scenario) -> None:
    predicted = estimate(scenario, exact=True).peak_allocated_bytes
    measured = max(real_step(scenario))
    assert predicted == pytest.approx(measured, rel=0.01)


def events_of(scenario: Scenario) -> tuple[EventLog, list[tuple[object, ...]]]:
    """A traced log, and its events in a form that can be compared."""
    log = step_log(scenario, fake_model(scenario, full_depth=True))
    return log, comparable(log)


def comparable(log: EventLog) -> list[tuple[object, ...]]:
    """Events with sizes instead of numbers; the vector of all gradients' norms, which grows with them, left out."""
    result: list[tuple[object, ...]] = []
    for kind, subject, label in log.events:
        if kind == Kind.MOMENT:
            result.append((label, *log.moments[subject]))
        elif kind == Kind.SCRATCH:
            result.append((label, log.sizes[subject]))
        else:
            allocation = log.allocations[subject]
            size = log.sizes[allocation.size]
            norms = allocation.part == "temporary buffers" and allocation.label is None and size < 1024
            result.append((kind, label, allocation.label, allocation.part, None if norms else size))
    return result


def with_layers(scenario: Scenario, layers: int) -> Scenario:
    return replace(scenario, config={**scenario.config, "num_hidden_layers": layers})


ON_GPU = replace(PLAIN, device=Device("cuda", (8, 0)), precision="bf16", frozen_storage="bf16")
UNFOLDED = {
    "full": ON_GPU,
    "lora-checkpointed": replace(ON_GPU, adapter=LORA, activation_checkpointing=True),
    "qlora": replace(ON_GPU, adapter=Adapter(type="qlora", r=8), optimizer="adamw_8bit"),
}
MORE_UNFOLDED = {
    "accumulated": replace(ON_GPU, micro_batches=2),
    "sgd-fp16": replace(ON_GPU, optimizer="sgd", precision="fp16"),
    "eager": replace(ON_GPU, attention="eager"),
    "turing": replace(ON_GPU, device=Device("cuda", (7, 5)), precision="fp16", documents_per_row=2),
}


@pytest.mark.parametrize(
    "scenario", [*(pytest.param(case, id=name) for name, case in UNFOLDED.items()), *long(MORE_UNFOLDED)]
)
def test_four_layers_unfold_to_the_trace_of_seven(scenario: Scenario) -> None:
    four, _ = events_of(with_layers(scenario, 4))
    seven, expected = events_of(with_layers(scenario, 7))
    unfolded = unfold(four, 7)
    assert comparable(unfolded) == expected
    assert peak_of_folded(four, {Axis.LAYER: 7}) == max(m.allocated_bytes for m in highest_moments(seven))
    assert peak_reserved_bytes(unfolded) == peak_reserved_bytes(seven)


@pytest.mark.parametrize("depth", [10, pytest.param(11, marks=pytest.mark.long)])
def test_units_of_two_kinds_of_layers_unfold_to_the_trace_of_all(depth: int) -> None:
    kinds = ["sliding_attention", "full_attention"] * depth
    config = {**SMALL, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
    config |= {"num_hidden_layers": depth, "layer_types": kinds[:depth]}
    scenario = replace(ON_GPU, config=config, attention="eager", adapter=LORA)
    few = fake_model(scenario, full_depth=False, period=2)
    assert len(few.layers) == 8 + depth % 2
    all_layers = fake_model(scenario, full_depth=True)
    unfolded, expected = unfold(step_log(scenario, few), few.units, period=2), step_log(scenario, all_layers)
    peaks = [max(moment.allocated_bytes for moment in highest_moments(log)) for log in (unfolded, expected)]
    assert peaks[0] == peaks[1]
    assert set(unfolded.moments) == set(expected.moments)
    assert peak_reserved_bytes(unfolded) == peak_reserved_bytes(expected)
    assert (few.parameters, few.trainable_parameters) == (all_layers.parameters, all_layers.trainable_parameters)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_four_chunks_of_the_loss_unfold_to_any_number(adapter: Adapter | None) -> None:
    def traced(count: int) -> EventLog:
        scenario = replace(ON_GPU, config=LARGE_VOCABULARY, adapter=adapter, micro_batch_size=count)
        model = fake_model(scenario, full_depth=True)
        return step_log(scenario, model, chunk_tokens=scenario.sequence_length)

    four = traced(4)
    for chunks in (2, 3, 6):
        # All sizes depend on the number of tokens too, so that only what happens is compared, and where.
        unfolded, expected = unfold(four, chunks, Axis.CHUNK), traced(chunks)
        what = [(event.kind, event.label) for event in unfolded.events if event.kind != Kind.DEATH]
        assert what == [(event.kind, event.label) for event in expected.events if event.kind != Kind.DEATH]
        assert deaths(unfolded) == deaths(expected)


def deaths(log: EventLog) -> int:
    return sum(event.kind == Kind.DEATH for event in log.events)


def test_parts_add_up_to_the_peak_which_the_timeline_keeps() -> None:
    found = estimate(with_layers(ON_GPU, 40), exact=True)
    assert tuple(found.parts) == PARTS
    assert sum(found.parts.values()) == found.peak_allocated_bytes
    assert max(point.total_bytes for point in found.timeline) == found.peak_allocated_bytes
    assert len(found.timeline) < 300
    assert found.peak_reserved_bytes >= found.peak_allocated_bytes


@pytest.mark.parametrize("adapter", [None, LORA, Adapter(type="qlora", r=4, target_modules=("q_proj",))])
def test_parameters_are_counted_exactly_at_any_depth(adapter: Adapter | None) -> None:
    scenario = with_layers(replace(ON_GPU, adapter=adapter), 9)
    found = estimate(scenario, exact=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parse_config(scenario.config))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted, _ = attach_adapter(model, None if adapter is None else replace(adapter, type="lora"), 0)
    assert found.trainable_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_layers_of_several_kinds_are_traced_one_by_one() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    mixed = {**SMALL, "model_type": "qwen2", "num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 16}
    mixed |= {"use_sliding_window": True}
    assert period_of({**mixed, "num_hidden_layers": 9, "layer_types": [kinds[0], *kinds, *kinds[:2]]}) == 2
    assert period_of(mixed) is None  # too few to repeat
    assert period_of(with_layers(ON_GPU, 6).config) == 1
    found = estimate(replace(PLAIN, config=mixed, attention="eager"))
    assert found.engine == "trace"
    assert {point.place for point in found.timeline} >= {f"layer {index}" for index in range(6)}


def test_experts_can_be_traced() -> None:
    config = {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    found = estimate(replace(ON_GPU, config=config, adapter=Adapter(target_modules=("q_proj",))))
    assert found.engine == "trace"
    experts = 3 * 4 * 3 * 128 * 256
    assert experts < found.parameters < 1.5 * experts


@pytest.mark.parametrize("kind", [{"model_type": "mixtral", "num_local_experts": 4}, {"model_type": "qwen3_moe"}])
def test_a_model_of_experts_is_refused_with_a_way_out_that_works(kind: dict[str, Any]) -> None:
    config = SMALL | {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 32} | kind
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    with pytest.raises(ModelError, match=r"experts' kernel takes bf16 alone.*target_modules: \[q_proj, k_proj, v_proj"):
        estimate(replace(ON_GPU, config=config))
    with pytest.raises(UsageError, match=r"set adapter.target_modules: \[q_proj, k_proj, v_proj, o_proj\]"):
        estimate(replace(ON_GPU, config=config, adapter=LORA))
    found = estimate(replace(ON_GPU, config=config, adapter=Adapter(r=8, target_modules=names)))
    assert found.trainable_parameters == 3 * 8 * (4 * 128 + 2 * 128 + 2 * 64)


def test_falcon_is_refused_without_advice_that_cannot_help() -> None:
    falcon = {"model_type": "falcon", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
    with pytest.raises(ModelError, match="does not let its attention be replaced; train another model"):
        estimate(replace(ON_GPU, config=falcon, attention="eager"))


def test_nothing_is_said_of_kernels_that_could_be_downloaded() -> None:
    program = """
from trainkit.model.loading import quiet_libraries
with quiet_libraries():
    import peft
import bitsandbytes
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stderr == ""


def test_a_capped_head_is_not_taken_apart_from_its_model() -> None:
    """Gemma 2 caps its logits, so that the loss is made on all of them, and uncut."""
    gemma = {**LARGE_VOCABULARY, "model_type": "gemma2", "head_dim": 32, "sliding_window": 1024}
    capped = estimate(replace(ON_GPU, config=gemma, micro_batch_size=8))
    plain = estimate(replace(ON_GPU, config=LARGE_VOCABULARY, micro_batch_size=8), exact=True)
    assert capped.parts["logits and loss"] > 1.5 * plain.parts["logits and loss"]


def test_ddp_adds_a_second_set_of_gradients() -> None:
    alone = estimate(ON_GPU, exact=True)
    shared = estimate(replace(ON_GPU, gpus=8, shard="ddp"), exact=True)
    assert shared.parts["sharding buffers"] == 4 * alone.trainable_parameters
    assert "not counted" in shared.remarks[0]
    assert shared.peak_allocated_bytes == pytest.approx(
        alone.peak_allocated_bytes + 4 * alone.trainable_parameters, abs=2**16
    )


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_fsdp2_shares_out_what_it_holds_between_steps(adapter: Adapter | None) -> None:
    scenario = replace(with_layers(ON_GPU, 4), adapter=adapter, activation_checkpointing=True)
    alone = estimate(scenario, exact=True)
    shared = estimate(replace(scenario, gpus=4, shard="fsdp2"))
    for part in ("weights", "adapters", "optimizer state"):
        # Small vectors are padded to a number for each process.
        assert shared.parts[part] == pytest.approx(alone.parts[part] / 4, rel=0.02, abs=2**12)
    assert (shared.parameters, shared.trainable_parameters) == (alone.parameters, alone.trainable_parameters)
    assert shared.peak_allocated_bytes < alone.peak_allocated_bytes
    assert not torch.distributed.is_initialized()


SHARDED = {
    "full-checkpointed": {"activation_checkpointing": True},
    "full": {"micro_batches": 2},
    "lora": {"adapter": LORA, "activation_checkpointing": True},
    "lora-accumulated": {"adapter": LORA, "micro_batches": 2},
    "qlora": {"adapter": Adapter(type="qlora", r=4), "activation_checkpointing": True},
}
SHARDED_MODELS = ("llama-3.1-8b", "qwen2.5-0.5b", "gemma-2-9b", "gemma-3-4b", "pythia-410m", "phi-2", "gpt2-xl")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) == ("llama-3.1-8b", "lora") else pytest.mark.long)
        for name in SHARDED_MODELS
        for way in SHARDED
    ],
)
def test_a_sharded_step_of_few_layers_unfolds_to_the_trace_of_all(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(known_models()[name].config)
    scenario = Scenario(config=config, sequence_length=1024, gpus=16, shard="fsdp2")
    period = period_of(config) or 0
    unit = period * -(-REACH // period)
    layers = 5 * unit + 1
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    scenario = replace(scenario, config={**config, key: layers}, **SHARDED[way])  # type: ignore[arg-type]
    unfolded_from = []

    def counted(log: EventLog, *arguments: Any, **options: Any) -> EventLog:
        unfolded_from.append(options["period"])
        return unfold(log, *arguments, **options)

    monkeypatch.setattr("trainkit.memory.trace.unfold", counted)
    few = estimate(scenario)
    assert unfolded_from == [unit]
    monkeypatch.setattr("trainkit.memory.trace.period_of", lambda *_given: None)
    whole = estimate(scenario)
    assert unfolded_from == [unit]
    assert replace(few, seconds=0, timeline=()) == replace(whole, seconds=0, timeline=())
    totals = [[point.total_bytes for point in found.timeline] for found in (few, whole)]
    # Clipping stacks a norm of 4 bytes for each tensor that trains, in four vectors, and few layers have fewer.
    assert totals[0] == pytest.approx(totals[1], abs=4 * CUDA_BLOCK_BYTES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"hidden_size": 64}, "model_type"),
        ({**SMALL, "model_type": "own", "auto_map": {"AutoModel": "own.Model"}}, "trust_remote_code"),
        ({"model_type": "t5"}, "causal language model"),
        ({**SMALL, "num_attention_heads": 5}, r"config\.json: The hidden size \(128\) is not a multiple of the number"),
    ],
    ids=["unknown", "no-type", "remote-code", "no-causal-model", "heads"],
)
def test_what_is_no_model_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        estimate(replace(PLAIN, config=config))
    assert "\n" not in str(caught.value)


def test_an_adapter_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="q_porj"):
        estimate(replace(PLAIN, adapter=Adapter(target_modules=("q_porj",))))


def test_adafactor_which_takes_weights_one_by_one_can_be_traced() -> None:
    """Its temporary copies of one weight live into the next, so that all layers are traced."""
    found = estimate(replace(with_layers(ON_GPU, 6), optimizer="adafactor"))
    factors = found.parts["optimizer state"]
    assert 0 < factors < 0.1 * found.parts["weights"]


def test_attention_without_a_kernel_is_said() -> None:
    turing = replace(ON_GPU, device=Device("cuda", (7, 5)), precision="fp16", frozen_storage="fp16")
    found, usual = estimate(turing), estimate(ON_GPU)
    assert "square of the length" in found.remarks[0]
    assert usual.remarks == ()
    assert found.peak_allocated_bytes > usual.peak_allocated_bytes


def test_the_flash_attn_package_is_estimated_without_it() -> None:
    assert estimate(replace(ON_GPU, attention="flash_attention_2")).parts == estimate(ON_GPU).parts


def test_every_layer_asks_for_its_fused_kernel_once() -> None:
    """Should the run's attention ever go past what stands for the GPU's kernels, this is where it shows."""
    model = fake_model(ON_GPU, full_depth=True)
    kernels: list[str] = []

    def noted(func: Any, args: tuple[Any, ...]) -> int:
        if (call := cuda_scratch(func, args)) is not None:
            kernels.append(call[0])
        return 0

    step_log(ON_GPU, model, scratch_bytes=noted)
    assert kernels.count("varlen_backward") == SMALL["num_hidden_layers"]
