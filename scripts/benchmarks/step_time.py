"""How long a step takes on paper: shapes of a Llama and stated speeds in, seconds out. Pure, and without torch.

Two sums are made, of what a GPU computes in a step and of what it sends; whether they run beside each other or one
after the other makes two bounds, and the step lies between them. What is assumed, and not read off a data sheet or off
trainkit's own code, is called an assumption where it stands.

A "machine" holds :data:`GPUS_PER_MACHINE` GPUs. Every row is one document of full length, all of whose tokens train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

GPUS_PER_MACHINE = 8
BYTES_GATHERED = 2
"""Of a number: weights are gathered in the compute type, bf16 (trainkit/model/sharding.py, ``param_dtype``)."""
BYTES_REDUCED = 4
"""Of a number: gradients are reduced in fp32 (trainkit/model/sharding.py, ``reduce_dtype``)."""
BYTES_UPDATED = 40
"""Memory traffic of clipping and AdamW for each trained number, all of it fp32: the gradient is read for its norm, read
and written when it is scaled, and read for the update; the weight and two moments are read and written."""
BACKWARD_ATTENTION = 2.5
"""Backward attention against forward: five matrix products instead of two, since scores are not kept (Dao et al. 2022,
FlashAttention, section 3)."""


@dataclass(frozen=True)
class Speeds:
    """What the hardware does in a second; the defaults are an H100 SXM in a machine like NVIDIA's DGX H100."""

    peak_flops: float = 989.4e12
    """bf16 without sparsity (H100 data sheet)."""
    utilisation: float = 0.40
    """Assumption: share of the peak that a step's computation reaches, recomputation counted as work."""
    nvlink_bytes: float = 450e9
    """Out of a GPU, and as much into it (H100 data sheet: 900 GB/s in both directions together)."""
    network_bytes: float = 400e9
    """Out of a machine, and as much into it: eight ports of 400 Gbit/s (DGX H100 data sheet)."""
    link_utilisation: float = 0.80
    """Assumption: share of the links' speed that large collectives reach."""
    memory_bytes: float = 3350e9
    """Of a GPU's own memory (H100 data sheet)."""
    first_hop_seconds: float = 8.4e-6
    nvlink_hop_seconds: float = 3.4e-6
    network_hop_seconds: float = 9.6e-6
    """What a ring takes even for nothing: once, and for each hop within and between machines. NCCL's own estimates, by
    which it chooses its algorithms (src/graph/tuning.cc: ring, protocol "simple")."""


H100 = Speeds()


@dataclass(frozen=True)
class Weight:
    """A weight of ``rows`` x ``columns`` (a vector has one column); ``multiplied`` with every token, or looked up."""

    rows: int
    columns: int = 1
    trained: bool = True
    multiplied: bool = True

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return self.rows * self.columns

    def gathered_numbers(self, gpus: int) -> int:
        """How many travel: FSDP2 cuts the first dimension into equal parts, so that it is filled up to ``gpus``.

        The first factor of an adapter of rank 16 has 16 rows; among 1,024 GPUs it travels as 1,024.

        >>> Weight(16, 4096).gathered_numbers(8) // 4096, Weight(16, 4096).gathered_numbers(1024) // 4096
        (16, 1024)
        """
        return -(-self.rows // gpus) * gpus * self.columns


@dataclass(frozen=True)
class Group:
    """Weights that FSDP2 gathers together, and how often it does in a micro-batch."""

    weights: tuple[Weight, ...]
    gathers: int

    @property
    def trains(self) -> bool:
        """Whether gradients of it are reduced."""
        return any(weight.trained for weight in self.weights)


@dataclass(frozen=True)
class Shapes:
    """A Llama as :func:`trainkit.model.sharding.shard_fully` groups it; all ``layers`` are alike."""

    layers: int
    layer: Group
    embedding: Group
    rest: Group
    attention_width: int
    """Heads x their width."""
    head: Weight

    def groups(self) -> tuple[tuple[Group, int], ...]:
        """Each kind of group, and how many there are of it."""
        return ((self.layer, self.layers), (self.embedding, 1), (self.rest, 1))

    def parameters(self, *, trained: bool) -> int:
        """All numbers, or those that train."""
        return sum(
            count * weight.numbers
            for group, count in self.groups()
            for weight in group.weights
            if weight.trained or not trained
        )


def llama_shapes(config: Mapping[str, Any], adapter_rank: int | None = None) -> Shapes:
    """The weights of a Llama with untied embeddings, from its config.json.

    Without ``adapter_rank`` every weight trains; with it, two factors beside each linear layer of the decoder do, as
    ``adapter: {type: lora}`` attaches them. A layer is gathered for the forward and again for the backward pass, the
    embedding too; the head and the last norm stay gathered in between (fully_shard's default for the root). A test
    holds this to the collectives that trainkit's step asks for.
    """
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linear = [(queries, width), (keys, width), (keys, width), (width, queries)]
    linear += [(inner, width), (inner, width), (width, inner)]
    full = adapter_rank is None
    layer = [Weight(out, into, trained=full) for out, into in linear]
    layer += [Weight(width, trained=full, multiplied=False)] * 2
    if adapter_rank is not None:
        layer += [Weight(adapter_rank, into) for _, into in linear] + [Weight(out, adapter_rank) for out, _ in linear]
    head = Weight(vocabulary, width, trained=full)
    return Shapes(
        layers=config["num_hidden_layers"],
        layer=Group(tuple(layer), gathers=2),
        embedding=Group((Weight(vocabulary, width, trained=full, multiplied=False),), gathers=2),
        rest=Group((head, Weight(width, trained=full, multiplied=False)), gathers=1),
        attention_width=queries,
        head=head,
    )


def row_flops(shapes: Shapes, tokens: int, *, checkpointing: bool) -> float:
    """Floating-point operations of one row, forward and backward.

    A weight takes 2 a token forward, 2 backward for what lies before it, and 2 for its own gradient where it trains:
    the "6 N D" of Kaplan et al. 2020, section 2.1, over the N numbers that are multiplied, and 4 N D below an adapter.
    Activation checkpointing computes the layers forward once more (8 N D and 6 N D), but for the last product of each,
    whose result nobody needs (torch.utils.checkpoint stops there). The head is always computed forward twice: the loss
    is made in chunks that are not kept (trainkit/model/loss.py). Attention takes, forward and in each layer,
    2 x tokens² x width: two products of 2 x tokens² x width, half of each behind the causal mask.

    Without recomputation of layers, and with attention left out:

    >>> one = Weight(10, 10)
    >>> none = Group((), 0)
    >>> row_flops(Shapes(3, Group((one,), 2), none, none, 0, Weight(0)), 5, checkpointing=False) == 6 * 300 * 5
    True
    """
    forwards = 2 if checkpointing else 1
    products = [weight for weight in shapes.layer.weights if weight.multiplied]
    layer = 2.0 * tokens * sum(weight.numbers * (forwards + 1 + weight.trained) for weight in products)
    layer -= 2 * tokens * products[-1].numbers * (forwards - 1)
    layer += 2 * tokens**2 * shapes.attention_width * (forwards + BACKWARD_ATTENTION)
    return shapes.layers * layer + 2 * shapes.head.numbers * tokens * (3 + shapes.head.trained)


def ring_seconds(numbers_bytes: float, gpus: int, speeds: Speeds = H100) -> float:
    """Seconds of one all-gather of ``numbers_bytes`` (all parts together) over ``gpus``, or of one reduce-scatter.

    A ring: every GPU passes on all parts but its own, over the narrowest link of the ring, after as many hops as there
    are other GPUs (NCCL's own model of it, src/graph/tuning.cc). A machine's eight rings use a network port each, so
    that its network carries what each of its GPUs receives.
    """
    if gpus == 1:
        return 0.0
    machines = -(-gpus // GPUS_PER_MACHINE)
    link = speeds.nvlink_bytes if machines == 1 else min(speeds.nvlink_bytes, speeds.network_bytes)
    hops = (gpus - machines) * speeds.nvlink_hop_seconds + (machines - 1) * speeds.network_hop_seconds
    travelling = numbers_bytes * (gpus - 1) / gpus / (link * speeds.link_utilisation)
    return speeds.first_hop_seconds + hops + travelling


def exchange(shapes: Shapes, gpus: int) -> tuple[tuple[int, int], ...]:
    """The collectives of one micro-batch under FSDP2, as (bytes of one, how many of them).

    trainkit reduces in every micro-batch: a sharded gradient is never kept whole.
    """
    found = []
    for group, count in shapes.groups():
        gathered = sum(weight.gathered_numbers(gpus) for weight in group.weights)
        found.append((gathered * BYTES_GATHERED, count * group.gathers))
        if group.trains:
            reduced = sum(weight.gathered_numbers(gpus) for weight in group.weights if weight.trained)
            found.append((reduced * BYTES_REDUCED, count))
    return tuple(found)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on every GPU: what is computed, what is exchanged, and the update of the weights."""

    computing: float
    exchanging: float
    updating: float

    @property
    def overlapped(self) -> float:
        """The lower bound: the exchange runs wholly beside the computation."""
        return max(self.computing, self.exchanging) + self.updating

    @property
    def in_turn(self) -> float:
        """The upper bound: nothing runs beside anything."""
        return self.computing + self.exchanging + self.updating


def step_time(
    shapes: Shapes,
    gpus: int,
    *,
    row_tokens: int,
    rows_per_gpu: float,
    micro_batch_size: int = 1,
    checkpointing: bool = True,
    speeds: Speeds = H100,
) -> StepTime:
    """A step of ``rows_per_gpu`` rows on each of ``gpus``, in micro-batches of ``micro_batch_size`` rows."""
    rows = -(-rows_per_gpu // 1)
    passes = -(-rows // micro_batch_size)
    exchanged = sum(count * ring_seconds(size, gpus, speeds) for size, count in exchange(shapes, gpus))
    updated = shapes.parameters(trained=True) / gpus * BYTES_UPDATED / speeds.memory_bytes
    flops = rows * row_flops(shapes, row_tokens, checkpointing=checkpointing)
    return StepTime(flops / (speeds.peak_flops * speeds.utilisation), passes * exchanged, updated)


def balancing_tokens(shapes: Shapes, gpus: int, *, checkpointing: bool = True, speeds: Speeds = H100) -> int:
    """The shortest row, in tokens, that takes as long to compute as its micro-batch takes to exchange.

    Below it, links decide; the size of the model hardly matters, for both grow with it.
    """
    exchanged = sum(count * ring_seconds(size, gpus, speeds) for size, count in exchange(shapes, gpus))
    wanted = exchanged * speeds.peak_flops * speeds.utilisation
    too_few, enough = 0, 1
    while row_flops(shapes, enough, checkpointing=checkpointing) < wanted:
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if row_flops(shapes, middle, checkpointing=checkpointing) < wanted:
            too_few = middle
        else:
            enough = middle
    return enough
