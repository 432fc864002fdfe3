"""Peak memory of a training step in closed form, from the model's shape: good to a few tens of percent, and instant.

It counts what is large: weights, gradients, optimizer state, the activations that the backward pass needs, and one
chunk of logits. Allocator rounding, kernels' scratch space and the device context are not in it. Torch-free.

Symbols: h hidden size, i size between the two matrices of the MLP, kv width of keys or values, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BYTES_OF_FP32 = 4
LOGIT_CHUNK_TOKENS = 1024
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0, "sgd": 0}  # a parameter; Adam keeps two moments in fp32


@dataclass(frozen=True)
class ModelShape:
    """What the formula needs to know of a decoder-only transformer; counts are of numbers, not of bytes."""

    parameters: int
    hidden_size: int
    intermediate_size: int
    key_value_size: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class StepShape:
    """How it is trained: rows of a micro-batch, tokens in a row, bytes of a number in frozen base and compute."""

    micro_batch_size: int
    sequence_length: int
    trainable_parameters: int
    frozen_bytes_per_parameter: float
    compute_bytes: int
    optimizer: str
    activation_checkpointing: bool


def memory_parts(model: ModelShape, step: StepShape) -> dict[str, int]:
    """Bytes by part at the peak, which is the start of the backward pass.

    Activations: a pre-norm block with a gated MLP keeps, for every token, 9 h + 2 kv + 4 i numbers (two norms with
    their fp32 inputs, the inputs of the projections, queries, keys, values, the attention's output, and the four
    vectors of the MLP). With activation checkpointing only the h numbers between blocks stay, and one block at a time
    is recomputed.

    >>> llama_8b = ModelShape(8_030_261_248, 4096, 14336, 1024, 32, 128256)
    >>> full = StepShape(1, 2048, 8_030_261_248, 0, 2, "adamw", activation_checkpointing=True)
    >>> round(sum(memory_parts(llama_8b, full).values()) / 2**30)
    122
    """
    tokens = step.micro_batch_size * step.sequence_length
    h, i, kv = model.hidden_size, model.intermediate_size, model.key_value_size
    norms = 4 * h * BYTES_OF_FP32  # norms compute in fp32 whatever the precision
    block = norms + (5 * h + 2 * kv + 4 * i) * step.compute_bytes
    between_blocks = h * max(step.compute_bytes, 2)
    kept = (model.layers * between_blocks + block) if step.activation_checkpointing else model.layers * block
    frozen = model.parameters - min(step.trainable_parameters, model.parameters)
    full = frozen == 0
    return {
        "weights": 0 if full else int(model.parameters * step.frozen_bytes_per_parameter),
        "trained weights": step.trainable_parameters * BYTES_OF_FP32,
        "gradients": step.trainable_parameters * BYTES_OF_FP32,
        "optimizer state": step.trainable_parameters * OPTIMIZER_BYTES[step.optimizer],
        "activations": tokens * kept,
        "logits": 2 * min(tokens, LOGIT_CHUNK_TOKENS) * model.vocabulary * BYTES_OF_FP32,
    }


def largest_micro_batch(
    model: ModelShape, step: StepShape, *, available_bytes: int, rows_per_step: int, most_tokens: int | None = None
) -> int:
    """Rows of the largest micro-batch that the formula fits into ``available_bytes``; 0 when not even one row fits.

    A divisor of ``rows_per_step``, so that every micro-batch of a step is equally large. ``most_tokens`` caps it where
    larger ones are no faster.
    """
    best = 0
    for rows in range(1, rows_per_step + 1):
        if rows_per_step % rows or (most_tokens and rows > 1 and rows * step.sequence_length > most_tokens):
            continue
        parts = memory_parts(model, replace(step, micro_batch_size=rows))
        if sum(parts.values()) <= available_bytes:
            best = rows
    return best
