"""The optimizer that the recipe names, over the weights that train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trainkit.recipe.schema import Training


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights that train, in two groups: matrices decay; vectors (biases, norms) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW (fused kernel), 8-bit AdamW, Adafactor or SGD with the recipe's numbers.

    The learning rate is set before every update from the plan; what is given here is only a start.
    """
    groups = parameter_groups(model, training.weight_decay)
    rate = training.learning_rate
    adam: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True, **adam)
    if training.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=rate, **adam)
        return optimizer
    if training.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
