"""Bytes that CUDA kernels take and return within one operator, from shapes. Torch-free.

Read in torch 2.13's sources, which are named beside each; sizes are rounded as the allocator rounds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit.memory.replay import CUDA_BLOCK_BYTES, rounded_up

if TYPE_CHECKING:
    from collections.abc import Callable


def flash_backward(
    rows: int, tokens: int, heads: int, width: int, key_tokens: int, key_heads: int, number_bytes: int
) -> int:
    """The gradient of queries in fp32 and a sum per query, rows padded to 128; GQA widens keys' gradients first.

    flash_api.cpp, mha_bwd.
    """
    widened = _widened_keys(rows * key_tokens, key_heads, heads, width, number_bytes)
    return _flash_buffers(rows * rounded_up(tokens, 128), heads, width) + widened


def varlen_backward(
    documents: int, tokens: int, heads: int, width: int, key_tokens: int, key_heads: int, number_bytes: int
) -> int:
    """The same for documents end to end (mha_varlen_bwd), each padded by 128 tokens."""
    widened = _widened_keys(key_tokens, key_heads, heads, width, number_bytes)
    return _flash_buffers(tokens + 128 * documents, heads, width) + widened


def efficient_backward(queries: int) -> int:
    """A sum per query in fp32 (delta, mem_eff_attention)."""
    return _blocks(4 * queries)


def softmax_backward(size: int) -> int:
    """The product of gradient and output (SoftMax.cu, softmax_backward_cuda_out)."""
    return _blocks(size)


def index_backward(positions: int) -> int:
    """Positions are sorted: four vectors of 64 bit (Indexing.cu, index_put_with_sort_kernel)."""
    return 4 * _blocks(8 * positions)


BY_NAME: dict[str, Callable[..., int]] = {
    function.__name__: function
    for function in (flash_backward, varlen_backward, efficient_backward, softmax_backward, index_backward)
}
"""So that a stored log can name them."""


def _flash_buffers(tokens: int, heads: int, width: int) -> int:
    return _blocks(4 * tokens * heads * rounded_up(width, 32)) + _blocks(4 * tokens * heads)


def _widened_keys(key_tokens: int, key_heads: int, heads: int, width: int, number_bytes: int) -> int:
    return 2 * _blocks(key_tokens * heads * width * number_bytes) if heads != key_heads else 0


def _blocks(size: int) -> int:
    return rounded_up(size, CUDA_BLOCK_BYTES)
