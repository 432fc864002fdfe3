"""What is stored, computed and optimized in which type, and what a device refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from trainkit.errors import MachineError
from trainkit.model.precision import autocast, make_scaler, plan_precision

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], torch.device]:
    """A CUDA device of the given capability, as far as torch can tell."""

    def of_capability(major: int, minor: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Test GPU")
        return torch.device("cuda", 0)

    return of_capability


@pytest.mark.parametrize(
    ("requested", "compute"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_trained_weights_stay_in_fp32_and_frozen_ones_follow_the_arithmetic(
    requested: Any, compute: torch.dtype
) -> None:
    plan = plan_precision(requested, CPU)
    assert plan.name == requested
    assert plan.compute == plan.frozen_storage == compute
    assert plan.trained_storage == plan.gradient == plan.optimizer == torch.float32


def test_the_sentence_names_every_type() -> None:
    assert plan_precision("fp32", CPU).sentence() == (
        "fp32 (as the recipe says): compute fp32; trained weights fp32, frozen weights fp32; gradients fp32; "
        "optimizer fp32"
    )
    assert plan_precision("fp16", CPU).sentence().endswith("optimizer fp32, loss scaled dynamically")


def test_auto_on_the_cpu_is_fp32_and_says_why() -> None:
    plan = plan_precision("auto", CPU)
    assert plan.name == "fp32"
    assert "16 bit saves no time on the CPU" in plan.sentence()


def test_16_bit_on_a_cpu_without_its_instructions_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, test, lambda: False, raising=False)
    assert "no bf16 instructions" in plan_precision("bf16", CPU).sentence()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert "slower" not in plan_precision("bf16", CPU).sentence()
    assert "no fp16 instructions" in plan_precision("fp16", CPU).sentence()


def test_auto_on_a_gpu_takes_bf16_where_it_is_native(gpu: Callable[[int, int], torch.device]) -> None:
    assert plan_precision("auto", gpu(8, 0)).name == "bf16"
    assert plan_precision("auto", gpu(7, 5)).name == "fp16"


def test_what_a_gpu_lacks_is_refused_with_the_alternative(gpu: Callable[[int, int], torch.device]) -> None:
    with pytest.raises(MachineError, match=r"Test GPU, capability 7\.5 has no bf16 arithmetic; set precision: fp16"):
        plan_precision("bf16", gpu(7, 5))
    with pytest.raises(MachineError, match="set precision: fp32"):
        plan_precision("fp16", gpu(5, 0))
    assert plan_precision("bf16", gpu(9, 0)).sentence().startswith("bf16 (as the recipe says)")


def test_other_devices_get_fp32() -> None:
    elsewhere = torch.device("mps")
    assert plan_precision("auto", elsewhere).name == "fp32"
    with pytest.raises(MachineError, match="set precision: fp32"):
        plan_precision("bf16", elsewhere)


@pytest.mark.parametrize("requested", ["bf16", "fp16"])
def test_autocast_really_computes_in_16_bit_on_the_cpu(requested: Any) -> None:
    plan = plan_precision(requested, CPU)
    one = torch.ones(2, 2)
    with autocast(plan, CPU):
        assert (one @ one).dtype == plan.compute
    assert (one @ one).dtype == torch.float32


def test_fp32_has_no_autocast_and_no_scaler() -> None:
    plan = plan_precision("fp32", CPU)
    assert isinstance(autocast(plan, CPU), nullcontext)
    assert make_scaler(plan, CPU) is None
    assert make_scaler(plan_precision("bf16", CPU), CPU) is None


def test_the_fp16_scaler_works_on_the_cpu() -> None:
    """It scales the loss, and skips a step whose gradient is infinite."""
    scaler = make_scaler(plan_precision("fp16", CPU), CPU)
    assert scaler is not None
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for factor, expected in ((0.5, 0.5), (float("inf"), 0.5)):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale((weight * factor).sum()))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert weight.item() == expected
    assert scaler.get_scale() < scale
