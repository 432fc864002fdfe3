"""Stands for bitsandbytes' 4-bit linear layer where only memory counts: its weight's size and its temporary copies.

bitsandbytes itself need not be installed. NF4: two weights in a byte; for each 64 of them a scale, of 32 bit, or of 8
bit with a second scale for each 256 of them (double quantisation; QLoRA, arXiv 2305.14314, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BLOCK = 64
_BLOCK_OF_SCALES = 256
_LARGEST_PACKED_PRODUCT = 1536  # rows; for more, gemm_4bit of bitsandbytes 0.50 unpacks the weight first


class FourBitLinear(nn.Linear):
    """A frozen linear layer that holds packed weights, and multiplies as bitsandbytes' ``Linear4bit`` does."""

    def __init__(self, layer: nn.Linear, compute: torch.dtype, *, double_quantisation: bool) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
            numbers = layer.in_features * layer.out_features
            scales = -(-numbers // _BLOCK)
            self.weight = nn.Parameter(torch.empty(-(-numbers // 2), 1, dtype=torch.uint8), requires_grad=False)
            self.scales: torch.Tensor
            self.register_buffer("code", torch.empty(16))
            if double_quantisation:
                self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
                self.register_buffer("scales_of_scales", torch.empty(-(-scales // _BLOCK_OF_SCALES)))
                self.register_buffer("code_of_scales", torch.empty(256))
                self.register_buffer("offset", torch.empty(()))
            else:
                self.register_buffer("scales", torch.empty(scales))
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.to(compute), requires_grad=False)
        self.compute = compute
        self.is_adapted = False
        self.double_quantisation = double_quantisation

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the signature of nn.Linear
        """The product in the compute type, then in the input's type; peft's layer around an adapted one copies it."""
        out: torch.Tensor = _FourBitProduct.apply(input.to(self.compute), self)  # type: ignore[no-untyped-call]
        out = out.to(input.dtype)
        return out.clone() if self.is_adapted else out


class _FourBitProduct(torch.autograd.Function):
    """Allocates what bitsandbytes' MatMul4Bit allocates, in its order."""

    @staticmethod
    def forward(_context: Any, activations: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        _context.layer = layer
        rows = activations.numel() // layer.in_features
        unpacked = _unpacked(layer, activations.dtype) if rows > _LARGEST_PACKED_PRODUCT else None
        out = activations.new_empty(*activations.shape[:-1], layer.out_features)
        del unpacked
        return out

    @staticmethod
    def backward(_context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        unpacked = _unpacked(_context.layer, grad.dtype)
        return torch.matmul(grad, unpacked), None


def _unpacked(layer: FourBitLinear, dtype: torch.dtype) -> torch.Tensor:
    scales = torch.empty_like(layer.scales, dtype=torch.float32) if layer.double_quantisation else None
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    del scales
    return weight


def quantise(model: nn.Module, head: nn.Module | None, compute: torch.dtype, *, double_quantisation: bool) -> None:
    """Put packed layers in place of the linear ones, all but the output head (as transformers does)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, FourBitLinear(child, compute, double_quantisation=double_quantisation))
