"""The run's optimizer over fake weights, with the state that it has from the second step on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainkit.recipe.schema import Training
from trainkit.training.optimizer import make_optimizer, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainkit.memory.scenario import Scenario

_SMALLEST_8_BIT_STATE = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in fp32
_BLOCK = 256


def optimizer_of(model: torch.nn.Module, scenario: Scenario) -> torch.optim.Optimizer:
    """What the run makes, in the form that it takes on the scenario's device."""
    if scenario.optimizer == "adamw_8bit":
        return EightBitAdamW(parameter_groups(model, 0.0))
    optimizer = make_optimizer(model, Training(steps=1, optimizer=scenario.optimizer))
    if scenario.device.kind == "cuda" and isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            group["foreach"] = True  # torch's choice on CUDA; it looks at the device, which is "cpu" here
    return optimizer


def make_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, as its first step does, and drop the gradients.

    They are clipped as well, as in a step: what distributed tensors find out about an operator, they find out once, on
    tensors of the whole size.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter with each tensor that is kept for it on the device.

    A count of steps (a tensor without dimensions) lies there only for a fused kernel.
    """
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and (value.dim() > 0 or id(parameter) in fused):
                yield parameter, value


class EightBitAdamW(torch.optim.Optimizer):
    """Stands for bitsandbytes' AdamW8bit, which need not be installed: its state, and an update in place.

    The moments are bytes with an fp32 scale for each 256 of them (arXiv 2110.02861; bitsandbytes 0.50,
    optim/optimizer.py, ``Optimizer2State.init_state``).
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state where there is none."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = dict(enumerate(_eight_bit_state(parameter)))


def _eight_bit_state(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    for _ in range(2):
        if parameter.numel() < _SMALLEST_8_BIT_STATE:
            yield torch.zeros_like(parameter, dtype=torch.float32)
        else:
            yield torch.zeros_like(parameter, dtype=torch.uint8)
            yield torch.zeros(-(-parameter.numel() // _BLOCK), dtype=torch.float32)
